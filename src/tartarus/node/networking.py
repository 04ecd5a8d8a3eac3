"""The networks of sandboxes: each has a slot, held to its contract from before its first instruction to its end."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import structlog

from tartarus.model.audit import AuditEntry
from tartarus.model.contract import HTTPS_PORT, Contract
from tartarus.model.errors import GuestFailed, InvalidRequest, TartarusError, Unsupported
from tartarus.model.sandbox import Isolation, Mount, Network, SandboxRecord, SandboxSpec
from tartarus.model.settings import Settings
from tartarus.runtimes.base import Guest, Wire
from tartarus.telemetry.metrics import Metrics, is_refusal

if TYPE_CHECKING:
    from tartarus.network.egress.messages import Carried, Credential
    from tartarus.network.pool import SlotPool
    from tartarus.network.slot import Slot

_log = structlog.get_logger("tartarus.node.networking")
LEDGER = "network.json"
"""What of the host's network was changed for sandboxes, as tartarus.network.ledger keeps it in the state directory."""
LEVELS = frozenset({Isolation.CONTAINER, Isolation.GVISOR, Isolation.MICROVM})
_RESOLV_CONF = "/etc/resolv.conf"
_OPENED_BY = {"private": "deny_private", "metadata": "deny_metadata"}


class Line:
    """One sandbox's network."""

    def __init__(self, record: SandboxRecord, networking: Networking, slot: Slot, contract: Contract) -> None:
        self.sandbox = record.id
        self.tenant = record.tenant
        self.isolation = record.isolation
        self.contract = contract
        self.sworn_anew = False
        """Whether it is another contract than its sandbox began with."""
        self._networking = networking
        self._slot = slot

    @contextlib.asynccontextmanager
    async def wire(self) -> AsyncIterator[Wire | None]:
        """What a guest takes that must find its link when it starts; nothing at a level where it comes afterwards.

        Raises as `attach`.
        """
        if self.isolation is Isolation.CONTAINER:
            yield None
            return
        slots, slot = self._networking.slots, self._slot
        if self.isolation is Isolation.MICROVM:
            made = await slots.attach_tap(slot)
        else:
            from tartarus.network import namespace

            made = await asyncio.to_thread(namespace.create)
        try:
            if self.isolation is not Isolation.MICROVM:
                await slots.attach(slot, made)
            yield Wire(made, slot.address, slot.gateway, slot.mtu, slot.address_6, slot.gateway_6)
        finally:
            os.close(made)

    async def attach(self, guest: Guest) -> None:
        """Join a guest that has run nothing yet, unless `wire` did. Raises GuestFailed, NoSpace, InvalidState."""
        if self.isolation is not Isolation.CONTAINER:
            return
        if guest.pidfd < 0:
            raise GuestFailed("the sandbox ended before it was joined to the network")
        process = os.dup(guest.pidfd)
        try:
            await self._networking.slots.attach(self._slot, process)
        finally:
            os.close(process)

    async def swear(self, contract: Contract) -> None:
        """Put another contract in force, at one moment. Raises InvalidRequest, InvalidState."""
        from tartarus.network.compiled import compiled
        from tartarus.network.threads import finish

        async def both() -> None:
            await self._networking.slots.swear(self._slot, compiled(contract))
            self.contract = contract
            self.sworn_anew = True

        await finish(both())  # whoever goes away meanwhile must not leave it half sworn

    def described(self, spec: SandboxSpec) -> SandboxSpec:
        """Its sandbox's specification, with the contract that is in force."""
        if not self.sworn_anew:
            return spec
        return msgspec.structs.replace(spec, network=Network.CONTRACT, contract=self.contract)

    def add(self, credential: Callable[[str], Credential | None]) -> None:
        """What the egress proxy adds to its requests for a domain."""
        self._slot.credential = credential

    async def cut(self) -> None:
        """Nothing passes any more. Safe to repeat."""
        await self._networking.slots.cut(self._slot)

    async def restore(self) -> None:
        """Hold it to its contract again."""
        await self._networking.slots.restore(self._slot)

    async def close(self) -> dict[str, int]:
        """Cut it for good; what it did. Safe to repeat."""
        return await self._networking.closed(self, self._slot)

    def counters(self) -> dict[str, int]:
        """What it did since it was opened."""
        return self._slot.counters()

    @property
    def number(self) -> int:
        """Its slot's number."""
        return self._slot.number

    @property
    def address(self) -> str:
        """Its own address."""
        return str(self._slot.address)

    @property
    def address_6(self) -> str:
        """Its own address of IPv6; nothing where the host can't carry that."""
        return str(self._slot.address_6 or "")

    @property
    def why_not_6(self) -> str:
        """Why no packet of IPv6 passes; nothing if some do."""
        return self._slot.why_not_6


class Networking:
    """All sandboxes' networks of a node. Nothing is made before the first of them."""

    def __init__(self, settings: Settings, metrics: Metrics, note: Callable[[AuditEntry], None]) -> None:
        self._note = note
        self._settings = settings
        self._state_dir = settings.state_dir
        self._metrics = metrics
        self.last_counts: Callable[[str, dict[str, int]], None] | None = None
        """Told what a sandbox's network did in all, by its id, when it is closed."""
        self._lines: dict[str, Line] = {}
        self._closing: set[asyncio.Task[Any]] = set()

    @functools.cached_property
    def slots(self) -> SlotPool:
        """The slots, of builds too."""
        from tartarus.network.pool import SlotPool
        from tartarus.network.settings import NetworkSettings
        from tartarus.node.egress import launch

        settings = self._settings
        usual = NetworkSettings()
        return SlotPool(self._state_dir, NetworkSettings(
            slots=settings.network_slots, ranges=settings.network_ranges or usual.ranges,
            name_servers=settings.network_name_servers,
        ), launch)  # fmt: skip

    @property
    def place(self) -> Path:
        """Where files for guests lie."""
        return self._state_dir / "network"

    async def open(self) -> None:
        """Put back on the host what a killed daemon left there."""
        if (self._state_dir / LEDGER).exists() and not self.slots.unavailable():
            await self.slots.clean()

    async def close(self) -> None:
        """End every network and put the host back."""
        await asyncio.gather(*self._closing, return_exceptions=True)
        if "slots" in vars(self):
            await self.slots.close()

    def check(self, spec: SandboxSpec, contract: Contract | None, isolation: Isolation) -> None:
        """Raise Unsupported or InvalidRequest for a network that this sandbox can't have."""
        if spec.publish:
            refuse_without_loopback(isolation)
        from tartarus.network.compiled import compiled

        for use in spec.secrets:
            ports = frozenset() if contract is None else compiled(contract).ports_of(use.target)
            if use.as_ == "proxy" and ports is not None and HTTPS_PORT not in ports:
                raise InvalidRequest(
                    f"secret {use.ref!r} is for requests to {use.target}, which this sandbox can't make",
                    fix=f"allow it: --allow {use.target}:{HTTPS_PORT}",
                )
        if contract is None:
            return
        refuse_closed(spec.contract)
        if isolation not in LEVELS:
            raise Unsupported(
                f"sandboxes at the {isolation.value} level can't have a network here", why=_WHY_NOT.get(isolation, ""),
                fix="use --isolation container, or leave the network out",
            )  # fmt: skip
        why = self.slots.unavailable()
        if why:
            raise Unsupported(
                "sandboxes can't have a network here", why=why, fix="run the daemon as root, or use --network none"
            )
        compiled(contract)

    async def mounts(self, isolation: Isolation) -> tuple[Mount, ...]:
        """The files by which a sandbox finds its network, the same for all of a level. Raises NoSpace, Unsupported."""
        if isolation is Isolation.MICROVM:  # whose agent writes it
            return ()
        await self.slots.open()
        return (self.file("resolv.conf", self.slots.resolv_conf, _RESOLV_CONF),)

    async def line(self, record: SandboxRecord, contract: Contract) -> Line:
        """A network for a sandbox to come, held to its contract already. Raises NoSpace, Unsupported."""
        from tartarus.network.compiled import compiled

        slot = await self.slots.take(compiled(contract))
        slot.told = functools.partial(_audited, self._note, record)
        line = self._lines[record.id] = Line(record, self, slot, contract)
        self._metrics.contracts_active(len(self._lines))
        return line

    async def closed(self, line: Line, slot: Slot) -> dict[str, int]:
        """Give a line's slot back, and count what it did, once."""
        found = await self.slots.give_back(slot)
        if self._lines.get(line.sandbox) is line:
            del self._lines[line.sandbox]
            self._metrics.contracts_active(len(self._lines))
            self._metrics.network_used(found)
            if self.last_counts is not None:
                self.last_counts(line.sandbox, found)
            refused = {name.removeprefix("refused_"): count for name, count in found.items() if is_refusal(name)}
            if refused:
                words = ", ".join(f"{name} {count}" for name, count in sorted(refused.items()))
                self._note(
                    AuditEntry(
                        actor="tartarus", tenant=line.tenant, action="network.refused", target=line.sandbox,
                        sandbox=line.sandbox, decision="deny", reason=words,
                    )
                )  # fmt: skip
        return found

    def end(self, line: Line) -> None:
        """Close a line beside what goes on."""

        async def close() -> None:
            try:
                await line.close()
            except (TartarusError, OSError) as error:
                _log.error("network_not_closed", sandbox=line.sandbox, error=str(error))

        task = asyncio.get_running_loop().create_task(close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def file(self, name: str, content: bytes, target: str) -> Mount:
        """A file for guests to see at `target`; several may be shown the same one. Raises OSError."""
        path = self.place / name
        self.place.mkdir(mode=0o711, parents=True, exist_ok=True)
        try:
            same = path.read_bytes() == content
        except FileNotFoundError:
            same = False
        if not same:
            fresh = path.with_suffix(f".{os.getpid()}")
            fresh.write_bytes(content)
            fresh.chmod(0o644)
            fresh.rename(path)
        return Mount(source=os.path.realpath(path), target=target, read_only=True)

    # What enforcement and quarantine need, by a sandbox's id; nothing happens for one that has no network.

    async def cut(self, sandbox: str) -> None:
        """Let nothing of it pass any more."""
        line = self._lines.get(sandbox)
        if line is not None:
            await line.cut()

    async def restore(self, sandbox: str) -> None:
        """Hold it to its contract again. Raises InvalidState where the network is closed."""
        line = self._lines.get(sandbox)
        if line is not None:
            await line.restore()

    async def counters(self) -> dict[str, dict[str, int]]:
        """What every sandbox's network did, by its id, from one look: refusals by reason, and connections opened."""
        before = dict(self._lines)
        if not before:
            return {}
        found = await asyncio.to_thread(self.slots.all_counters)
        # A slot that was given back meanwhile may be another's by now, who has done nothing of it.
        return {
            sandbox: found.get(line.number, {}) for sandbox, line in before.items() if self._lines.get(sandbox) is line
        }

    async def evidence(self, sandbox: str) -> dict[str, Any]:
        """Its contract, address and counters, as JSON can carry them; empty for one without a network."""
        line = self._lines.get(sandbox)
        if line is None:
            return {}
        counters = await asyncio.to_thread(line.counters)
        return {"contract": msgspec.to_builtins(line.contract), "address": line.address, "counters": counters}


def _audited(note: Callable[[AuditEntry], None], record: SandboxRecord, carried: Carried) -> None:
    """One entry for each connection, with what it carried or why it did not."""
    note(
        AuditEntry(
            actor=record.tenant, tenant=record.tenant, action="proxy.refuse" if carried.refused else "proxy.connect",
            target=f"{carried.name or carried.address}:{carried.port}", sandbox=record.id,
            decision="deny" if carried.refused else "allow", reason=carried.refused, duration_us=carried.duration_us,
            summary=f"{carried.kind or 'unread'} {carried.address} sent {carried.sent} received {carried.received}"
            + (", with a secret" if carried.credential else ""),
        )
    )  # fmt: skip


def refuse_closed(contract: Contract | None) -> None:
    """Raise InvalidRequest for a contract that names a network which it keeps closed itself: nothing is ignored."""
    from tartarus.network.destinations import closed_whole

    for network, _ in () if contract is None else contract.networks():
        reason = closed_whole(network)
        if not reason or (reason in _OPENED_BY and not getattr(contract, _OPENED_BY[reason])):
            continue
        what = f"{reason.replace('_', '-')} addresses"
        if reason in _OPENED_BY:
            why = f"{_OPENED_BY[reason]} is true unless the contract says otherwise, and closes {what}"
            fix = f"write {_OPENED_BY[reason]}: false into a contract's file, where a policy lets it, or leave it out"
        else:
            why, fix = f"no contract opens {what}", "leave it out"
        raise InvalidRequest(f"the contract allows {network}, which stays closed", why=why, fix=fix)


def refuse_without_loopback(isolation: Isolation) -> None:
    """Raise Unsupported at a level whose sandboxes have no loopback of their own to connect to."""
    if isolation in _NO_LOOPBACK:
        raise Unsupported(
            f"a sandbox at the {isolation.value} level has no ports to show", why=_NO_LOOPBACK[isolation],
            fix="use --isolation container",
        )  # fmt: skip


_NO_LOOPBACK = {
    Isolation.PROCESS: "its loopback would be the host's",
    Isolation.WASM: "its modules have no sockets",
}
_WHY_NOT = {
    Isolation.PROCESS: "it shares the host's network namespace, so no link could be its own",
    Isolation.WASM: "its modules have no sockets",
}
