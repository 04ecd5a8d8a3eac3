"""The resolver at work: real packets from guests, a real upstream server."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dns.flags
import dns.message
import dns.query
import dns.rcode
import dns.rrset
import pytest
from tests.network.servers import NAME_SERVER, wait_until
from tests.network.topology import PRIVATE, PUBLIC, Guest, World, joined, off

from tartarus.network import namespace
from tartarus.network import resolver as resolver_module
from tartarus.network.pool import SlotPool
from tartarus.network.resolver import host_name_servers
from tartarus.network.settings import NetworkSettings

pytestmark = pytest.mark.needs("root", "nft", "ip")


def ask(guest: Guest, name: str, kind: str = "A", *, stream: bool = False, **options: Any) -> dns.message.Message:
    query = dns.message.make_query(name, kind, **options)
    assert guest.slot is not None
    where = str(guest.slot.gateway)
    over = dns.query.tcp if stream else dns.query.udp
    found: dns.message.Message = guest.run(lambda: over(query, where, timeout=8))
    return found


def addresses(message: dns.message.Message) -> list[str]:
    return [rdata.address for rrset in message.answer for rdata in rrset if hasattr(rdata, "address")]


def served(world: World, *guests: Guest, **settings: Any) -> Callable[[Callable[[], None]], None]:
    """Run blocking questions beside the loop that serves them."""

    def run(questions: Callable[[], None]) -> None:
        async def scenario() -> None:
            async with joined(world.pool(**settings), *guests):
                await off(questions)

        world.run(scenario)

    return run


@pytest.mark.parametrize("stream", [False, True])
def test_names_are_resolved_by_the_node(world: World, stream: bool) -> None:
    guest = world.guest()

    def questions() -> None:
        assert guest.slot is not None
        assert guest.slot.resolv_conf == f"nameserver {guest.slot.gateway}\n".encode()
        assert addresses(ask(guest, "public.example", stream=stream)) == [PUBLIC]
        assert ask(guest, "nobody.example", stream=stream).rcode() == dns.rcode.NXDOMAIN
        empty = ask(guest, "public.example", "AAAA", stream=stream)
        assert (empty.rcode(), empty.answer) == (dns.rcode.NOERROR, [])
        counts = guest.slot.counters()
        assert counts["dns_queries"] == 3

    served(world, guest)(questions)
    assert world.names.asked == ["public.example A", "nobody.example A", "public.example AAAA"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("inside", [*PRIVATE, "169.254.169.254", "198.51.100.10", "192.0.2.50", "10.201.0.1"])
def test_a_name_that_points_inside_is_refused(world: World, inside: str, stream: bool) -> None:
    """DNS rebinding: a name of the attacker's own, with an address of the host's."""
    guest = world.guest()
    world.names.answers["rebind.example"] = [PUBLIC, inside]

    def questions() -> None:
        told = ask(guest, "rebind.example", stream=stream)
        assert (told.rcode(), told.answer) == (dns.rcode.REFUSED, [])
        assert guest.slot is not None
        assert guest.slot.counters()["dns_rebinding"] == 1

    served(world, guest)(questions)


def test_the_host_s_private_names_are_never_asked_for(world: World) -> None:
    guest = world.guest()
    world.names.answers |= {"wiki.internal": ["203.0.113.80"], "1.0.0.10.in-addr.arpa": ["203.0.113.80"]}

    def questions() -> None:
        for name, kind in (("wiki.internal", "A"), ("1.0.0.10.in-addr.arpa", "PTR"), ("printer", "A")):
            assert ask(guest, name, kind).rcode() == dns.rcode.NXDOMAIN
        assert guest.slot is not None
        assert guest.slot.counters()["dns_private"] == 3

    served(world, guest)(questions)
    assert world.names.asked == []


def test_a_long_answer_comes_over_tcp(world: World) -> None:
    guest = world.guest()

    def long(query: dns.message.Message, response: dns.message.Message) -> dns.message.Message:
        texts = [f'"{"x" * 200}{number}"' for number in range(40)]
        response.answer = [dns.rrset.from_text_list(query.question[0].name, 60, "IN", "TXT", texts)]
        return response

    world.names.answers["long.example"] = long

    def questions() -> None:
        cut = ask(guest, "long.example", "TXT", use_edns=0, payload=4096)
        assert cut.flags & dns.flags.TC
        assert cut.answer == []
        assert len(ask(guest, "long.example", "TXT", stream=True).answer[0]) == 40

    served(world, guest)(questions)


def test_answers_that_don_t_fit_the_question_are_not_taken(world: World) -> None:
    """Who guesses our port may send answers of his own; the true one still arrives, or none."""
    guest = world.guest()

    def forged(query: dns.message.Message, response: dns.message.Message) -> None:
        other = dns.message.make_response(dns.message.make_query("other.example", "A"))
        other.id = query.id
        return other  # type: ignore[return-value]

    def wrong_id(query: dns.message.Message, response: dns.message.Message) -> dns.message.Message:
        response.id = query.id ^ 1
        response.answer = [dns.rrset.from_text(query.question[0].name, 60, "IN", "A", "203.0.113.66")]
        return response

    world.names.answers |= {"forged.example": forged, "id.example": wrong_id}

    def questions() -> None:
        for name in ("forged.example", "id.example"):
            told = ask(guest, name)
            assert (told.rcode(), told.answer) == (dns.rcode.SERVFAIL, [])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resolver_module, "_ATTEMPT_S", 0.2)
        served(world, guest)(questions)


def test_a_name_server_that_is_silent_is_passed_over(world: World) -> None:
    guest = world.guest()

    def questions() -> None:
        assert addresses(ask(guest, "public.example")) == [PUBLIC]
        assert addresses(ask(guest, "public.example", stream=True)) == [PUBLIC]

    async def scenario() -> None:
        pool = SlotPool(world.state_dir, NetworkSettings(name_servers=("203.0.113.54", NAME_SERVER)))
        async with joined(pool, guest):
            await off(questions)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resolver_module, "_ATTEMPT_S", 0.2)
        world.run(scenario)


def test_one_sandbox_s_unanswered_questions_are_bounded_and_don_t_stop_another_s(world: World) -> None:
    greedy, modest = world.guest(), world.guest()
    world.names.answers["silent.example"] = lambda query, response: None

    def questions() -> None:
        query = dns.message.make_query("silent.example", "A").to_wire()
        assert greedy.slot is not None
        where = (str(greedy.slot.gateway), 53)

        def flood() -> None:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                for _ in range(60):
                    sock.sendto(query, where)

        greedy.run(flood)
        wait_until(lambda: greedy.slot is not None and greedy.slot.counters().get("dns_busy", 0) >= 50, "it is bounded")
        assert addresses(ask(modest, "public.example")) == [PUBLIC]

    served(world, greedy, modest, dns_in_flight=4)(questions)


def test_more_questions_than_its_rate_never_reach_the_node(world: World) -> None:
    guest = world.guest()

    def questions() -> None:
        assert guest.slot is not None
        for _ in range(100):
            guest.send(str(guest.slot.gateway), 53, b"x")
        counts = guest.slot.counters()
        assert counts["refused_rate"] >= 50
        assert counts["refused_rate"] + counts.get("dns_malformed", 0) <= 100

    served(world, guest, dns_queries=5)(questions)


def test_hostile_streams_are_ended(world: World) -> None:
    guest = world.guest()

    def questions() -> None:
        assert guest.slot is not None
        where = (str(guest.slot.gateway), 53)

        def connect() -> socket.socket:
            return socket.create_connection(where, timeout=8)

        for hostile in (b"\xff\xff" + bytes(2000), b"\0\0", b"\0\5hello", b"\2\1" + bytes(513)):
            with guest.run(connect) as connection:
                connection.sendall(hostile)
                with contextlib.suppress(ConnectionResetError):
                    assert connection.recv(100) == b""
        # Idle ones hold only so many places, and only their own sandbox's.
        idle = [guest.run(connect) for _ in range(12)]
        closed = 0
        for connection in idle:
            connection.settimeout(0.1)
            try:
                closed += connection.recv(1) == b""
            except ConnectionResetError:
                closed += 1
            except TimeoutError:
                pass
            connection.close()
        assert closed == 4
        wire = dns.message.make_query("public.example", "A").to_wire()
        wait_until(lambda: _answered(guest, wire, where), "and are free again")

    served(world, guest)(questions)


def _answered(guest: Guest, wire: bytes, where: tuple[str, int]) -> bool:
    def exchange() -> bool:
        try:
            with socket.create_connection(where, timeout=8) as connection:
                connection.sendall(struct.pack(">H", len(wire)) + wire)
                return len(connection.recv(2)) == 2
        except OSError:
            return False

    return guest.run(exchange)


def test_a_slot_that_is_given_back_is_answered_no_more(world: World) -> None:
    guest = world.guest()
    waiting = asyncio.Event()
    world.names.answers["slow.example"] = lambda query, response: waiting.set()

    async def scenario() -> None:
        pool = world.pool()
        slot = guest.slot = await pool.take()
        await pool.attach(slot, guest.namespace)
        query = dns.message.make_query("slow.example", "A").to_wire()
        await off(lambda: guest.send(str(slot.gateway), 53, query))
        await off(lambda: wait_until(lambda: "slow.example A" in world.names.asked, "it is asked"))
        assert (await pool.give_back(slot))["dns_queries"] == 1
        guest.slot = None
        await pool.close()

    world.run(scenario)


def test_only_slots_are_served(world: World) -> None:
    """Neither the host's other programs nor its networks can use the resolver, least of all to flood somebody."""
    guest = world.guest()
    query = dns.message.make_query("public.example", "A").to_wire()

    def try_from(where: int, gateway: str) -> bytes:
        def exchange() -> bytes:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.settimeout(0.3)
                try:
                    sock.connect((gateway, 53))
                    sock.send(query)
                    return sock.recv(1000)
                except OSError:
                    return b""

        return namespace.run_in(where, exchange)

    async def scenario() -> None:
        async with joined(world.pool(), guest):
            assert guest.slot is not None
            gateway = str(guest.slot.gateway)
            assert await off(lambda: guest.exchange(gateway, 53, query))
            for where in (world.host, world.internet, world.lan):
                assert await off(lambda where=where: try_from(where, gateway)) == b""  # type: ignore[misc]

    world.run(scenario)


def test_the_host_s_resolv_conf_is_read_as_it_is_meant(tmp_path: Path) -> None:
    path = tmp_path / "resolv.conf"
    assert host_name_servers(path) == ()
    path.write_text(
        "# nameserver 1.1.1.1\nsearch corp.example\nnameserver 127.0.0.53\nnameserver\nnameserver x\n"
        "nameserver fd00::1\n  nameserver 10.1.1.1 # ours\nnameserver 9.9.9.9\n"
    )
    assert host_name_servers(path) == ("127.0.0.53", "fd00::1", "10.1.1.1")
    path.write_bytes(b"\xff" * 100_000)
    assert host_name_servers(path) == ()
