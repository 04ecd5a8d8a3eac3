"""Contracts with real packets: what one opens, when it is put in another's place, and when it ends."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import threading
import time
from collections.abc import Iterator
from ipaddress import IPv4Address
from types import SimpleNamespace

import dns.message
import dns.query
import dns.rrset
import pytest
from tests.network.servers import NAME_SERVER, Sniffer, family_of, wait_until
from tests.network.topology import (
    HOST,
    METADATA,
    NEIGHBOUR,
    PORT,
    PRIVATE,
    PRIVATE_6,
    PUBLIC,
    PUBLIC_6,
    Guest,
    World,
    off,
    written,
)

from tartarus.model.contract import Contract, RateLimit, parse_allow
from tartarus.model.errors import InvalidState
from tartarus.model.sandbox import Isolation, SandboxRecord, SandboxSpec
from tartarus.model.states import State
from tartarus.network import namespace, resolver
from tartarus.network.compiled import Compiled, compiled
from tartarus.network.pool import SlotPool
from tartarus.node.networking import Line

pytestmark = pytest.mark.needs("root", "nft", "ip")
REFUSED = "No route to host"
both_families = pytest.mark.parametrize("target", [PUBLIC, PUBLIC_6], ids=["IPv4", "IPv6"])


def allowing(*texts: str, **rest: object) -> Compiled:
    return compiled(Contract(grants=tuple(parse_allow(text) for text in texts), **rest))  # type: ignore[arg-type]


@contextlib.asynccontextmanager
async def held(pool: SlotPool, guest: Guest, contract: Compiled):
    guest.slot = await pool.take(contract)
    try:
        await pool.attach(guest.slot, guest.namespace)
        yield guest.slot
    finally:
        await pool.give_back(guest.slot)
        await pool.close()


def lookup(guest: Guest, name: str) -> list[str]:
    """Ask the slot's own name server."""
    assert guest.slot is not None
    gateway = str(guest.slot.gateway)
    answer = guest.run(lambda: dns.query.udp(dns.message.make_query(name, "A"), gateway, timeout=5))
    return [rdata.address for rrset in answer.answer for rdata in rrset]


async def says(guest: Guest, address: str, port: int = PORT) -> str:
    return await off(lambda: guest.ask(address, port))


def test_only_what_is_named_is_open(world: World) -> None:
    guest = world.guest()
    world.serve(world.internet, 81)

    async def scenario() -> None:
        contract = allowing(f"{PUBLIC}:80", "203.0.113.0/24:8000", denied_cidrs=("203.0.113.9/32",))
        async with held(world.pool(), guest, contract) as slot:
            assert await off(lambda: guest.ask(PUBLIC)) == HOST
            for address, port in ((PUBLIC, 81), (NAME_SERVER, 80), ("203.0.113.9", 8000), ("203.0.114.1", 8000)):
                assert await says(guest, address, port) == REFUSED
            for address in (*PRIVATE, *METADATA, NEIGHBOUR, HOST):
                assert await says(guest, address) == REFUSED
            assert slot.counters()["refused_contract"] == 4
            assert slot.counters()["refused_private"] == len(PRIVATE)

    world.run(scenario)
    assert world.traces() == []


def test_a_domain_opens_what_it_was_answered_for_its_time(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolver, "_LEAST_TTL_S", 1)
    monkeypatch.setattr(resolver, "_MOST_TTL_S", 1)
    guest, other = world.guest(), world.guest()

    async def scenario() -> None:
        pool = world.pool()
        other.slot = await pool.take(allowing("public.example:81/direct"))
        await pool.attach(other.slot, other.namespace)
        async with held(pool, guest, allowing("public.example:80/direct", "*.wild.example:80/direct")) as slot:
            assert await off(lambda: guest.ask(PUBLIC)) == REFUSED
            assert await off(lambda: lookup(guest, "other.example")) == []
            assert await off(lambda: lookup(guest, "wild.example")) == []
            assert world.names.asked == []  # a question is a message, too
            assert await off(lambda: lookup(guest, "PUBLIC.example")) == [PUBLIC]
            assert await off(lambda: guest.ask(PUBLIC)) == HOST
            assert await off(lambda: other.ask(PUBLIC)) == REFUSED  # it was another's question
            kept = await off(lambda: guest.run(lambda: socket.create_connection((PUBLIC, PORT), timeout=5)))
            await asyncio.sleep(2.2)
            assert await off(lambda: guest.ask(PUBLIC)) == REFUSED
            with kept:  # what was begun in that time goes on
                assert await off(lambda: kept.recv(100)) == HOST.encode()
            world.names.answers["a.b.wild.example"] = [PRIVATE[0]]
            assert await off(lambda: lookup(guest, "a.b.wild.example")) == []
            assert await off(lambda: guest.ask(PRIVATE[0])) == REFUSED
            found = slot.counters()
            assert (found["dns_refused"], found["dns_rebinding"]) == (2, 1)

    world.run(scenario)


def test_without_names(world: World) -> None:
    guest = world.guest()

    async def scenario() -> None:
        async with held(world.pool(), guest, allowing(f"{PUBLIC}:80", deny_dns=True)) as slot:
            assert guest.slot is not None
            gateway = str(guest.slot.gateway)
            assert await off(lambda: guest.ask(PUBLIC)) == HOST
            assert await off(lambda: guest.ask(gateway, 53)) == REFUSED
            assert await off(lambda: guest.exchange(gateway, 53, bytes(30), 0.5)) == b""
            assert slot.counters()["refused_dns"] >= 2

    world.run(scenario)
    assert world.names.asked == []


def test_private_addresses_take_a_contract_that_says_so(world: World) -> None:
    guest, beside = world.guest(), world.guest()

    async def scenario() -> None:
        pool = world.pool()
        beside.slot = await pool.take(allowing("0.0.0.0/0"))
        await pool.attach(beside.slot, beside.namespace)
        async with held(pool, guest, allowing("10.0.0.0/8", deny_private=False)) as slot:
            assert await off(lambda: guest.ask(PRIVATE[0])) == HOST
            for address in (PRIVATE[1], METADATA[0], NEIGHBOUR, HOST, PUBLIC):
                assert await says(guest, address) == REFUSED
            assert await off(lambda: beside.ask(PRIVATE[0])) == REFUSED
            await pool.swear(slot, allowing("169.254.0.0/16", "192.0.2.0/24", deny_metadata=False))
            assert await off(lambda: guest.ask(METADATA[0])) == HOST
            for address in (PRIVATE[0], METADATA[1], "169.254.7.7", NEIGHBOUR):
                expected = HOST if address == METADATA[1] else REFUSED
                assert await says(guest, address) == expected
            await pool.swear(slot, allowing("0.0.0.0/0"))
            for address in (PRIVATE[0], METADATA[0]):
                assert await says(guest, address) == REFUSED
            assert "elements" not in "".join(
                world.shell("nft", "list", "set", "inet", table.split()[-1], name)
                for table in world.shell("nft", "list", "tables").splitlines() if "tartarus" in table
                for name in ("opens_private", "opens_metadata")
            )  # fmt: skip

    world.run(scenario)


class Flood:
    """Numbered datagrams to four ports, one after the other, as fast as they go."""

    PORTS = (1001, 1002, 1003, 1004)

    def __init__(self, guest: Guest, target: str) -> None:
        self.target = target
        self.sent = 0
        self.refused: set[int] = set()
        self._over = False
        self._guest = guest
        self._thread = threading.Thread(target=lambda: guest.run(self._run))

    def _run(self) -> None:
        with contextlib.ExitStack() as stack:
            sockets = {port: stack.enter_context(socket.socket(family_of(self.target), socket.SOCK_DGRAM))
                       for port in self.PORTS}  # fmt: skip
            while not self._over:
                self.sent += 1
                for port, sock in sockets.items():
                    try:
                        sock.connect((self.target, port))
                        sock.send(b"flood %d %d " % (port, self.sent))
                    except OSError as error:  # nobody listens, and that may be said
                        if error.errno != errno.ECONNREFUSED:
                            self.refused.add(port)
                time.sleep(0.0002)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        self._thread.start()
        try:
            yield
        finally:
            self._over = True
            self._thread.join()


def arrived(packets: list[bytes], port: int) -> list[int]:
    word = b"flood %d " % port
    return [int(packet.split(word)[1].split()[0]) for packet in packets if word in packet]


@both_families
def test_at_no_moment_passes_what_neither_contract_allows(world: World, target: str) -> None:
    """A flood across many changes: one port is the first contract's, one the second's, one neither's, one both's."""
    world.join_family_of(target)
    guest = world.guest()
    first = allowing(f"{written(target)}:1001,1004")
    second = allowing(f"{written(target)}:1002,1004")
    spy = world.sniff(world.internet)
    changes: list[tuple[int, int, int]] = []
    ends: list[int] = []

    async def scenario() -> None:
        pool = world.pool(new_connections=100_000, burst=100_000)
        async with held(pool, guest, first) as slot:
            flood = Flood(guest, target)
            with flood.running():
                for turn in range(20):
                    await asyncio.sleep(0.02)
                    before = flood.sent
                    await pool.swear(slot, (second, first)[turn % 2])
                    after = flood.sent + 1
                    await asyncio.sleep(0.02)
                    changes.append((before, after, (1001, 1002)[turn % 2]))
            ends.append(flood.sent)
            assert 1004 not in flood.refused

    world.run(scenario)
    assert arrived(spy.seen, 1003) == []
    starts = [before for before, _, _ in changes[1:]] + ends
    for (_, after, shut), until in zip(changes, starts, strict=True):
        assert not [number for number in arrived(spy.seen, shut) if after < number < until]
    for port in (1001, 1002, 1004):
        assert arrived(spy.seen, port)


@both_families
def test_connections_that_the_new_contract_forbids_die_and_others_go_on(world: World, target: str) -> None:
    world.join_family_of(target)
    listener = namespace.run_in(world.internet, lambda: _listening(target, 2000, 2001))
    guest, place = world.guest(), written(target)

    def connected(port: int) -> tuple[socket.socket, socket.socket]:
        ours = guest.run(lambda: socket.create_connection((target, port), timeout=5))
        theirs, _ = listener[port].accept()
        ours.settimeout(0.7)
        theirs.settimeout(0.7)
        return ours, theirs

    async def scenario() -> None:
        pool = world.pool()
        async with held(pool, guest, allowing(f"{place}:2000,2001")) as slot:
            kept, kept_far = await off(lambda: connected(2000))
            lost, lost_far = await off(lambda: connected(2001))
            with kept, kept_far, lost, lost_far:
                await pool.swear(slot, allowing(f"{place}:2000"))
                # The far side speaks first, on both.
                kept_far.send(b"still here")
                lost_far.send(b"secret")
                assert await off(lambda: kept.recv(100)) == b"still here"
                with pytest.raises(OSError, match=r"timed out|No route|reset"):
                    await off(lambda: lost.recv(100))
                kept.send(b"me too")
                assert await off(lambda: kept_far.recv(100)) == b"me too"
                for _ in range(17):  # more than there are numbers for a slot's contracts
                    await pool.swear(slot, allowing(f"{place}:2000"))
                    kept.send(b"x")
                    assert await off(lambda: kept_far.recv(100)) == b"x"
                with contextlib.suppress(OSError):
                    lost.send(b"get out")
                with pytest.raises(OSError, match="timed out"):
                    await off(lambda: lost_far.recv(100))

    try:
        world.run(scenario)
    finally:
        for sock in listener.values():
            sock.close()


def _listening(address: str, *ports: int) -> dict[int, socket.socket]:
    found = {}
    for port in ports:
        found[port] = socket.create_server((address, port), family=family_of(address))
        found[port].settimeout(5)
    return found


def test_a_cut_network_carries_nothing_until_it_is_restored(world: World) -> None:
    guest = world.guest()

    async def scenario() -> None:
        pool = world.pool()
        async with held(pool, guest, allowing("0.0.0.0/0")) as slot:
            with await off(lambda: guest.run(lambda: socket.create_connection((PUBLIC, PORT), timeout=5))) as kept:
                kept.settimeout(3)
                await pool.cut(slot)
                await pool.cut(slot)
                with pytest.raises(InvalidState, match="was cut"):
                    await pool.swear(slot, allowing("0.0.0.0/0"))
                assert await off(lambda: guest.ask(PUBLIC, patience_s=0.5)) == "TimeoutError"
                assert await off(lambda: guest.exchange(str(slot.gateway), 53, bytes(30), 0.3)) == b""
                assert slot.counters()["refused_unsworn"] >= 2
                await pool.restore(slot)
                assert await off(lambda: guest.ask(PUBLIC)) == HOST
                assert await off(lambda: kept.recv(100)) == HOST.encode()

    world.run(scenario)


@both_families
def test_the_first_packets_and_the_last_are_held_to_the_contract(world: World, target: str) -> None:
    """A guest that sends before it has a link, and does not stop when it loses it."""
    world.join_family_of(target)
    beside, inside = ("2001:db8:80::99", PRIVATE_6[0]) if ":" in target else ("203.0.113.99", PRIVATE[0])
    guest = world.guest()
    spy = world.sniff(world.internet)
    sent = threading.Event()
    over = threading.Event()

    def shout() -> None:
        def send() -> None:
            with socket.socket(family_of(target), socket.SOCK_DGRAM) as sock:
                while not over.is_set():
                    for address, word in ((target, b"allowed"), (beside, b"forbidden"), (inside, b"inner")):
                        with contextlib.suppress(OSError):
                            sock.sendto(word, (address, 7777))
                    sent.set()

        guest.run(send)

    async def scenario() -> None:
        pool = world.pool()
        thread = threading.Thread(target=shout)
        thread.start()
        try:
            assert await off(lambda: sent.wait(5))
            for _ in range(3):
                slot = await pool.take(allowing(f"{written(target)}:7777"))
                await pool.attach(slot, guest.namespace)
                await asyncio.sleep(0.05)
                await pool.cut(slot)
                counts = [0, 0, 0]
                while len(counts) < 30 and (counts[-1] == 0 or counts[-1] != counts[-2]):  # until the spy has read all
                    await asyncio.sleep(0.05)
                    counts.append(sum(b"allowed" in packet for packet in spy.seen))
                assert counts[-1] == counts[-2] > 0
                await pool.give_back(slot)
        finally:
            over.set()
            thread.join()
            await pool.close()

    world.run(scenario)
    assert not spy.saw(b"forbidden")
    assert not spy.saw(b"inner")


@both_families
def test_limits_of_a_contract(world: World, target: str) -> None:
    world.join_family_of(target)
    everywhere, protocol_at = ("[::/0]", 20) if ":" in target else ("0.0.0.0/0", 23)
    guest, free = world.guest(), world.guest()

    def open_many(who: Guest) -> int:
        def work() -> int:
            found = []
            with contextlib.ExitStack() as stack:
                for _ in range(8):
                    with contextlib.suppress(OSError):
                        found.append(stack.enter_context(socket.create_connection((target, PORT), timeout=2)))
                return len(found)

        return who.run(work)

    def blast(who: Guest) -> int:
        def work() -> int:
            sent = 0
            with socket.socket(family_of(target), socket.SOCK_DGRAM) as sock:
                sock.connect((target, 9999))
                for _ in range(400):
                    with contextlib.suppress(OSError):  # nobody listens, and that is said
                        sock.send(b"blast " + bytes(1000))
                        sent += 1
            return sent

        return who.run(work)

    def through(spy: Sniffer) -> int:
        datagrams = (packet for packet in list(spy.seen) if packet[protocol_at] == socket.IPPROTO_UDP)
        return sum(b"blast" in packet for packet in datagrams)

    async def scenario() -> None:
        pool = world.pool()
        free.slot = await pool.take(allowing(everywhere))
        await pool.attach(free.slot, free.namespace)
        async with held(pool, guest, allowing(everywhere, max_connections=3)) as slot:
            assert await off(lambda: open_many(guest)) == 3
            assert await off(lambda: open_many(free)) == 8
            assert slot.counters()["refused_connections"] >= 5
            # Its connections count until the far side has closed them, too.
            await pool.swear(slot, allowing(everywhere, rate_limit=RateLimit(bytes_per_s=2000)))
            spy = world.sniff(world.internet)
            sent = await off(lambda: blast(guest))
            # 64 KiB at once, and what came after that in time; all the others are counted.
            refused = slot.counters()["refused_rate"]
            passed = sent - refused
            assert 10 < passed < sent
            await off(lambda: wait_until(lambda: through(spy) == passed, "the rest"))
            await pool.swear(slot, allowing(everywhere, new_connections_per_s=1))
            opened = slot.counters()["opened"]
            await off(lambda: open_many(guest))
            found = slot.counters()
            assert found["opened"] - opened < 8
            assert found["refused_rate"] > refused

    world.run(scenario)


def test_who_goes_away_while_another_contract_is_sworn_leaves_it_sworn(world: World) -> None:
    guest = world.guest()
    record = SandboxRecord(
        id="sbx-1", tenant="acme", name="", template="host", isolation=Isolation.CONTAINER, isolation_reason="",
        state=State.RUNNING, spec=SandboxSpec(), created_at=0.0,
    )  # fmt: skip
    first, second = Contract(allowed_cidrs=("192.0.2.0/24",)), Contract(allowed_cidrs=(f"{PUBLIC}/32",))

    async def scenario() -> None:
        pool = world.pool()
        async with held(pool, guest, compiled(first)) as slot:
            line = Line(record, SimpleNamespace(slots=pool), slot, first)  # type: ignore[arg-type]
            swearing = asyncio.create_task(line.swear(second))
            await asyncio.sleep(0)
            swearing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await swearing
            assert (line.contract, line.sworn_anew) == (second, True)
            assert await off(lambda: guest.ask(PUBLIC)) == HOST

    world.run(scenario)


def test_many_contracts_don_t_mix(world: World) -> None:
    """Each of two hundred slots opens a port of its own; the last of them opens no other's."""
    guest = world.guest()

    async def scenario() -> None:
        pool = world.pool()
        slots = [await pool.take(allowing(f"{PUBLIC}:{3000 + number}", "192.0.2.0/25")) for number in range(200)]
        async with held(pool, guest, allowing(f"{PUBLIC}:80")):
            assert await off(lambda: guest.ask(PUBLIC)) == HOST
            assert await off(lambda: guest.ask(PUBLIC, 3007)) == REFUSED
            assert len({slot.address for slot in slots}) == 200
            assert all(isinstance(slot.address, IPv4Address) for slot in slots)

    world.run(scenario)


def test_a_number_that_comes_back_opens_nothing_of_its_last_contract(world: World) -> None:
    """One slot, many guests: what a domain opened to the first, for an hour, is closed to the sixteenth."""
    world.names.answers["public.example"] = _for_an_hour
    first = world.guest()

    async def scenario() -> None:
        pool = world.pool(slots=1)
        try:
            first.slot = await pool.take(
                allowing("public.example:80/direct", "public.example:81/direct", f"{PUBLIC}:80")
            )
            await pool.attach(first.slot, first.namespace)
            assert await off(lambda: lookup(first, "public.example")) == [PUBLIC]
            assert await off(lambda: first.ask(PUBLIC)) == HOST
            await pool.give_back(first.slot)
            for _ in range(14):
                await pool.give_back(await pool.take(allowing("0.0.0.0/0")))
            last = world.guest()
            last.slot = await pool.take(allowing("192.0.2.0/24"))
            await pool.attach(last.slot, last.namespace)
            for port in (80, 81):
                assert await says(last, PUBLIC, port) == REFUSED
        finally:
            await pool.close()

    world.run(scenario)


def _for_an_hour(query: dns.message.Message, response: dns.message.Message) -> dns.message.Message:
    response.answer = [dns.rrset.from_text(query.question[0].name, 3600, "IN", "A", PUBLIC)]
    return response
