"""Network slots: a place on the network for one sandbox each, taken when it starts and given back when it ends."""

from __future__ import annotations

import asyncio
import functools
import subprocess
from collections import deque
from collections.abc import Callable
from ipaddress import IPv4Address
from pathlib import Path
from typing import TypeVar

import structlog

from tartarus.model.contract import OPEN
from tartarus.model.errors import InvalidState, NoSpace, TartarusError, Unsupported
from tartarus.network import failures
from tartarus.network.compiled import Compiled, compiled
from tartarus.network.egress.proxy import EgressProxy, Launch
from tartarus.network.host import Host
from tartarus.network.links import Traffic
from tartarus.network.netlink import NETLINK_NETFILTER, NETLINK_ROUTE, Events
from tartarus.network.oaths import Answer
from tartarus.network.resolver import Asker, Resolver, host_name_servers
from tartarus.network.router import Router, slot_addresses
from tartarus.network.settings import NetworkSettings
from tartarus.network.slot import Slot
from tartarus.network.threads import finish, in_thread
from tartarus.network.tracking import Counted, of_slot, traffic_of

_log = structlog.get_logger("tartarus.network")
# rtnetlink: links, and both families' addresses, routes, and whether links forward; nftables: every change of rules.
_ROUTE_GROUPS = (1, 5, 7, 24, 9, 11, 25)
_FILTER_GROUPS = (7,)
# Changes come in bursts (a link comes up, gets its address, its routes): after a look at once, the next one waits.
_SETTLE_S = 0.1
_SWEEP_AFTER_S = 0.3
# Somebody else's change may be under way, or the host out of memory for a moment; the router's rules stand meanwhile.
_TRIES = 3

_OPEN = compiled(OPEN)
T = TypeVar("T")


class SlotPool:
    """All slots of one daemon. `clean` at start, `open` before the first `take`, `close` at the end."""

    def __init__(self, state_dir: Path, settings: NetworkSettings | None = None, launch: Launch | None = None) -> None:
        """`launch`: starts the egress proxy, without which domains are shut. Raises InvalidRequest for bad settings."""
        self._launch = launch
        self._proxy: EgressProxy | None = None
        self._settings = settings or NetworkSettings()
        self._settings.check()
        self._host = Host(state_dir)
        self._router: Router | None = None
        self._resolver: Resolver | None = None
        self._free: deque[int] = deque()
        self._taken: dict[int, Slot] = {}
        self._before: dict[int, dict[str, int]] = {}
        self.mtu = 0
        self._events: list[Events] = []
        self._following: asyncio.Task[None] | None = None
        self._failure = ""
        self._opening = asyncio.Lock()
        self._dirty = asyncio.Event()
        self._sweeping: asyncio.Task[None] | None = None

    unavailable = staticmethod(failures.unavailable)

    async def clean(self) -> bool:
        """Put back what a killed daemon left on the host; whether there was anything. Costs one look at a file."""
        return await asyncio.to_thread(self._host.clean)

    async def open(self) -> None:
        """Make the router and its rules, unless that is done. When this raises, nothing is left of it.

        Raises Unsupported where this host can't, NoSpace without a free range of addresses, InvalidState when
        another daemon has the state directory.
        """
        async with self._opening:
            if self._router is not None:
                return
            why = self.unavailable()
            if why:
                raise Unsupported(
                    "sandboxes can't have a network here", why=why, fix="leave out --network, or use root's daemon"
                )
            try:
                await in_thread(self._open_host)
                await self._open_resolver()
            except BaseException as error:
                await self._close()
                if isinstance(error, OSError):
                    raise Unsupported("sandboxes can't have a network here", why=str(error)) from error
                raise
            self._watch()
            for obstacle in await asyncio.to_thread(self._host.obstacles):
                _log.warning("network_obstacle", what=obstacle)

    def _open_host(self) -> None:
        avoid = [IPv4Address(text) for text in self._settings.name_servers or host_name_servers() if ":" not in text]
        networks = self._host.reserve(self._settings, avoid)
        self._router = Router.create(networks, self._settings)
        self.mtu = self._host.mtu()
        self._host.connect(self._router, self.mtu)
        self._free = deque(range(self._settings.slots))
        self._before = {}
        self._failure = ""

    async def _open_resolver(self) -> None:
        assert self._router is not None
        self._resolver = Resolver(self._settings, self._host.refuses)
        await self._resolver.start(*await asyncio.to_thread(self._router.listen))
        if self._launch is not None:
            self._proxy = EgressProxy(
                self._launch, self._router.listen_for_proxy, self._router.namespace, self._resolver, self._host.refuses
            )

    async def take(self, contract: Compiled = _OPEN) -> Slot:
        """A free slot, held to a contract: the one that has been free longest. `open` comes first, by itself.

        Raises NoSpace when all are taken, and what `open` raises.
        """
        await self.open()
        router, resolver = self._parts()
        if not self._free:
            raise NoSpace(
                "no network slot is free",
                why=f"{self._settings.slots} sandboxes have a network now",
                fix="end one of them, or raise the daemon's network setting slots",
            )
        number = self._free.popleft()
        slot = Slot(number, slot_addresses(router.networks, number), router.gateway, self, contract)
        if self._host.why_not_6:
            slot.address_6 = None
        self._taken[number] = slot
        if self._proxy is not None:
            self._proxy.opened(slot)
        try:
            await self._start_proxy(contract)
            await in_thread(lambda: self._swear(router, slot, contract, []))
        except BaseException as error:
            await self.give_back(slot)
            if isinstance(error, OSError):
                raise failures.not_sworn(error) from error
            raise
        resolver.opened(slot.address, self._asker(router, slot))
        return slot

    @property
    def resolv_conf(self) -> bytes:
        """What every guest's /etc/resolv.conf must say, once the pool is open."""
        return f"nameserver {self._parts()[0].gateway}\n".encode()

    async def swear(self, slot: Slot, contract: Compiled) -> None:
        """Hold a slot to another contract, from one moment on. What it does not open any more ends then.

        A connection that it opens too goes on. Raises InvalidState for a slot that was given back or cut.
        """
        async with slot.busy:
            router, resolver = self._parts()
            if slot.given_back or slot.cut:
                raise InvalidState("the sandbox's network was cut")
            asker = resolver.asker(slot.address)
            await self._start_proxy(contract)
            still = asker.still_open(contract) if asker is not None else []
            if asker is not None:
                asker.replace(contract)  # what is being answered by the old one opens nothing any more
            try:
                await in_thread(lambda: self._swear(router, slot, contract, still))
            except OSError as error:
                if asker is not None:
                    asker.replace(slot.contract)
                raise failures.not_sworn(error) from error
            slot.contract = contract
            if self._proxy is not None:
                await self._proxy.review(slot.address)
            self._sweep_soon(router)

    async def _start_proxy(self, contract: Compiled) -> None:
        if self._proxy is not None and contract.is_proxied:
            await self._proxy.start()

    def _sweep_soon(self, router: Router) -> None:
        async def sweep() -> None:
            await asyncio.sleep(_SWEEP_AFTER_S)
            try:
                await in_thread(router.sweep)
            except OSError as error:
                _log.warning("network_not_swept", error=str(error))

        if self._sweeping is None or self._sweeping.done():
            self._sweeping = asyncio.create_task(sweep())

    def _swear(self, router: Router, slot: Slot, contract: Compiled, answers: list[Answer]) -> None:
        # The wall behind the router opens before it, and closes after it.
        self._host.let(slot.address, private=not contract.deny_private or not slot.contract.deny_private,
                       metadata=not contract.deny_metadata or not slot.contract.deny_metadata)  # fmt: skip
        slot.why_not_6 = self._host.carry_6(router, contract, has_address=slot.address_6 is not None)
        router.swear(slot.number, contract, answers, carries_6=not slot.why_not_6)
        self._host.let(slot.address, private=not contract.deny_private, metadata=not contract.deny_metadata)

    def _asker(self, router: Router, slot: Slot) -> Asker:
        async def opened(answer: Answer) -> None:
            await asyncio.to_thread(router.answer, slot.number, answer)

        return Asker(slot.contract, opened)

    async def cut(self, slot: Slot) -> None:
        """Let nothing of a slot's pass any more; its link stays until it is given back. Safe to repeat."""
        async with slot.busy:
            if self._router is not None and not slot.given_back:
                slot.cut = True
                await in_thread(functools.partial(self._router.release, slot.number))
                if self._proxy is not None:
                    await self._proxy.forget(slot.address)

    async def restore(self, slot: Slot) -> None:
        """Hold a slot that was cut to its contract again. Connections of before go on as far as it opens them."""
        async with slot.busy:
            router, _ = self._parts()
            if slot.cut and not slot.given_back:
                await in_thread(lambda: router.swear(slot.number, slot.contract, carries_6=not slot.why_not_6))
                slot.cut = False

    async def attach(self, slot: Slot, guest: int) -> None:
        """Join a guest's network namespace to the slot: link `eth0`, and the slot's addresses, with default routes.

        `guest` is a pidfd of any of its processes, or the open file of its network namespace. Everything is done from
        outside, and nothing can leave before the rules stand, which they do. Raises GuestFailed, NoSpace, InvalidState.
        """
        with_6 = slot.address_6 is not None
        await self._joined(slot, lambda router: router.attach(slot.number, guest, self.mtu, with_6=with_6))

    async def attach_tap(self, slot: Slot) -> int:
        """The slot's link as a tap, for a machine's monitor: an open file that is the caller's.

        What comes through it before the machine has the slot's address is not let pass. Raises as `attach` does.
        """
        with_6 = slot.address_6 is not None
        return await self._joined(slot, lambda router: router.attach_tap(slot.number, self.mtu, with_6=with_6))

    async def _joined(self, slot: Slot, join: Callable[[Router], T]) -> T:
        async with slot.busy:
            router, _ = self._parts()
            if slot.given_back:
                raise InvalidState("the network slot was given back")
            try:
                return await in_thread(lambda: join(router))
            except OSError as error:
                raise failures.not_joined(error) from error

    async def give_back(self, slot: Slot) -> dict[str, int]:
        """Cut the slot's link, forget its connections, and free it; safe to repeat. Returns what it did meanwhile.

        That is: connections `opened`, packets and bytes sent and received, DNS questions (`dns_…`), and packets
        refused, by reason (`refused_private` and so on).
        """
        return await finish(self._give_back(slot))

    async def _give_back(self, slot: Slot) -> dict[str, int]:
        async with slot.busy:
            if slot.given_back:
                return slot.final
            slot.given_back = True
            names = self._resolver.closed(slot.address) if self._resolver is not None else {}
            found: dict[str, int] = dict(names)
            if self._router is not None:
                router = self._router
                traffic, counted = await in_thread(lambda: self._end(router, slot))
                total = of_slot(slot.number, counted)
                found |= self._since_taken(slot.number, total) | traffic_of(traffic)
                if self._proxy is not None:
                    found |= await self._proxy.closed(slot.address)
                self._before[slot.number] = total
                self._free.append(slot.number)
                self._sweep_soon(router)
            self._taken.pop(slot.number, None)
            slot.final = found
            return found

    def _end(self, router: Router, slot: Slot) -> tuple[Traffic | None, Counted]:
        try:
            router.release(slot.number)  # first: it holds from that moment on
        finally:
            traffic = router.detach(slot.number)
        self._host.let(slot.address, private=False, metadata=False)
        return traffic, router.counted()

    def all_counters(self) -> dict[int, dict[str, int]]:
        """What every slot did that is taken, by its number, from one look at what the rules counted."""
        if self._router is None:
            return {}
        counted = self._router.counted()
        return {
            number: self._since_taken(number, of_slot(number, counted)) | self._asked(slot)
            for number, slot in list(self._taken.items())
        }

    def _asked(self, slot: Slot) -> dict[str, int]:
        """What the resolver and the proxy counted."""
        parts = (self._resolver, self._proxy)
        return {name: count for part in parts if part is not None for name, count in part.counted(slot.address).items()}

    def counters(self, slot: Slot) -> dict[str, int]:
        """What a slot did since it was taken, with the names of `give_back`."""
        if slot.given_back or self._router is None or self._resolver is None:
            return slot.final
        found = self._since_taken(slot.number, of_slot(slot.number, self._router.counted()))
        return found | self._asked(slot) | traffic_of(self._router.traffic(slot.number))

    async def close(self) -> None:
        """Cut every slot and put the host back as it was; safe to repeat."""
        async with self._opening:
            await self._close()

    async def _close(self) -> None:
        beside = [task for task in (self._sweeping, self._following) if task is not None]
        for task in beside:
            task.cancel()
        await asyncio.gather(*beside, return_exceptions=True)
        self._sweeping = self._following = None
        loop = asyncio.get_running_loop()
        for events in self._events:
            loop.remove_reader(events.fileno())
            events.close()
        self._events = []
        if self._proxy is not None:
            await self._proxy.close()
            self._proxy = None
        if self._resolver is not None:
            await self._resolver.close()
            self._resolver = None
        for slot in list(self._taken.values()):
            async with slot.busy:  # what is under way with one ends before the router does
                slot.given_back = True
        self._taken = {}
        router, self._router = self._router, None
        await in_thread(lambda: self._close_host(router))

    def _close_host(self, router: Router | None) -> None:
        try:
            if router is not None:
                router.close()
        finally:
            self._host.close()

    def _parts(self) -> tuple[Router, Resolver]:
        if self._failure:
            raise TartarusError(
                "the sandboxes' network is cut", why=self._failure, fix="restart the daemon when that is mended"
            )
        if self._router is None or self._resolver is None:
            raise InvalidState("the network is closed", fix="try again in a moment")
        return self._router, self._resolver

    def _since_taken(self, number: int, total: dict[str, int]) -> dict[str, int]:
        before = self._before.get(number, {})
        return {name: value - before.get(name, 0) for name, value in total.items() if value > before.get(name, 0)}

    def _watch(self) -> None:
        """Follow the host's routes, and whoever takes our rules away."""
        self._dirty.set()  # for what changed before we looked
        self._events = [Events(NETLINK_ROUTE, _ROUTE_GROUPS), Events(NETLINK_NETFILTER, _FILTER_GROUPS)]
        for events in self._events:
            asyncio.get_running_loop().add_reader(events.fileno(), self._changed, events)
        self._following = asyncio.create_task(self._follow())

    def _changed(self, events: Events) -> None:
        events.drain()
        self._dirty.set()

    async def _follow(self) -> None:
        while True:
            await self._dirty.wait()
            self._dirty.clear()
            failure = await self._follow_once()
            for _ in range(_TRIES - 1):
                if failure:
                    await asyncio.sleep(_SETTLE_S)
                    failure = await self._follow_once()
            if failure:
                # Rules that may not stand are as good as none.
                self._failure = failure
                _log.error("network_cut", error=failure)
                await in_thread(self._host.cut)
                return
            await asyncio.sleep(_SETTLE_S)

    async def _follow_once(self) -> str:
        """Have the rules fit the host as it is now; what failed, or nothing."""
        router, _ = self._parts()
        try:
            if await in_thread(lambda: self._host.follow(router)):
                _log.info("network_followed", networks=len(self._host.networks.neighbours))
        except (TartarusError, OSError, subprocess.SubprocessError) as error:
            _log.warning("network_not_followed", error=str(error))
            return str(error) or type(error).__name__
        return ""
