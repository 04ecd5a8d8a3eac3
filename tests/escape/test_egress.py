"""Attacks on the egress proxy: what a sandbox that may reach one name says to be let to others."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from functools import partial
from pathlib import Path

import pytest
from tests.network import topology
from tests.network.servers import wait_until
from tests.network.stage import GET, SHOP, Stage, asked
from tests.network.test_contracts import allowing, lookup
from tests.network.topology import METADATA, PRIVATE, PUBLIC, off
from tests.network.webs import ANSWER, Authority, WebServer, client_hello, secured

from tartarus.network.compiled import Compiled
from tartarus.network.egress.messages import Credential
from tartarus.network.rules import PROXY_PORT, REDIRECTED_PORT

pytestmark = pytest.mark.needs("root", "nft", "ip")
REFUSED = b"refused by the egress proxy"


@pytest.fixture(name="stage")
def _stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    authority = Authority(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.bundle))
    with topology.world(tmp_path / "state") as world:
        yield Stage(world, authority)


def head(first: str, *rest: str) -> bytes:
    return "\r\n".join((first, *rest, "", "")).encode()


HOST = "Host: shop.example:8080"
SMUGGLED = "GET /smuggled HTTP/1.1\r\nHost: evil.example\r\n\r\n"
FORGED = {
    "two hosts": head("GET / HTTP/1.1", HOST, "Host: evil.example:8080"),
    "two equal hosts": head("GET / HTTP/1.1", HOST, HOST),
    "no host": head("GET / HTTP/1.1"),
    "no host, long ago": head("GET / HTTP/1.0"),
    "other case of name": head("GET / HTTP/1.1", "hOsT: EVIL.example:8080"),
    "folded": head("GET / HTTP/1.1", "Host:", " evil.example:8080"),
    "space before colon": head("GET / HTTP/1.1", "Host : evil.example:8080", HOST),
    "absolute and host differ": head("GET http://evil.example:8080/ HTTP/1.1", HOST),
    "absolute, host other way": head("GET http://shop.example:8080/ HTTP/1.1", "Host: evil.example:8080"),
    "user in the target": head("GET http://shop.example:8080@evil.example/ HTTP/1.1", HOST),
    "another port": head("GET / HTTP/1.1", "Host: shop.example:81"),
    "port 0": head("GET / HTTP/1.1", "Host: shop.example:0"),
    "IDN": head("GET / HTTP/1.1", "Host: shöp.example:8080"),
    "address": head("GET / HTTP/1.1", f"Host: {PUBLIC}:8080"),
    "address as a number": head("GET / HTTP/1.1", "Host: 3405803856:8080"),
    "v6": head("GET / HTTP/1.1", "Host: [::1]:8080"),
    "null in the host": head("GET / HTTP/1.1", "Host: shop.example\0.evil.example:8080"),
    "length twice": head("POST / HTTP/1.1", HOST, "Content-Length: 3", "Content-Length: 4") + b"abcd",
    "length and chunks": head("POST / HTTP/1.1", HOST, "Content-Length: 6", "Transfer-Encoding: chunked")
    + b"0\r\n\r\nG",
    "chunks twice": head("POST / HTTP/1.1", HOST, "Transfer-Encoding: chunked, chunked") + b"0\r\n\r\n",
    "chunks by another name": head("POST / HTTP/1.1", HOST, "Transfer-Encoding: xchunked") + b"0\r\n\r\n",
    "negative length": head("POST / HTTP/1.1", HOST, "Content-Length: -1"),
    "no such version": head("GET / HTTP/3.0", HOST),
    "HTTP/2 without TLS": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(30),
    "HTTP/0.9": b"GET /\r\n\r\n",
    "CONNECT where there is no proxy": head("CONNECT evil.example:443 HTTP/1.1", "Host: evil.example:443"),
    "TRACE": head("TRACE / HTTP/1.1", HOST),
    "bare return": b"GET / HTTP/1.1\r\nHost: shop.example:8080\rX: y\r\n\r\n",
}


def test_requests_that_could_be_read_in_two_ways(stage: Stage) -> None:
    async def scenario() -> None:
        async with stage.held(allowing(f"{SHOP}:8080")):
            replies = await asyncio.gather(*(stage.says(forged, port=8080) for forged in FORGED.values()))
            for name, reply in zip(FORGED, replies, strict=True):
                assert reply == b"" or (reply.startswith(b"HTTP/1.1 ") and REFUSED in reply), name
            assert stage.plain.heard == []
            huge = head("GET / HTTP/1.1", HOST, f"X: {'y' * 70000}")
            assert b" 431 " in await stage.says(huge, port=8080)
            assert stage.plain.heard == []

    stage.world.run(scenario)


def test_what_follows_a_request_is_a_request_of_its_own(stage: Stage) -> None:
    async def scenario() -> None:
        async with stage.held(allowing(f"{SHOP}:8080")):
            # Pipelined: each is judged.
            reply = await stage.says(GET + SMUGGLED.encode(), port=8080, until=REFUSED)
            assert (reply.count(b"200 OK"), REFUSED in reply) == (1, True)
            # In a body: it stays one.
            body = SMUGGLED.encode()
            post = head("POST / HTTP/1.1", HOST, f"Content-Length: {len(body)}", "Connection: close, x-hop", "X-Hop: 1",
                        "Upgrade: h2c", "HTTP2-Settings: x", "Proxy-Authorization: Basic x")  # fmt: skip
            assert (await stage.says(post + body, port=8080)).endswith(b"ok")
            chunked = head("POST / HTTP/1.1", HOST, "Transfer-Encoding: chunked")
            chunked += b'%x;ext="\r\n' % len(body) + body + b"\r\n0\r\nHost: evil.example\r\n\r\n"
            await stage.says(chunked, port=8080)
            heard = b"".join(stage.plain.heard)
            assert heard.count(b"evil.example") == heard.count(b"GET /smuggled") <= 2
            for hop in (b"x-hop", b"upgrade", b"http2", b"proxy-"):
                assert hop not in heard.lower()
            assert stage.plain.heard[0].count(b"GET") == 1

    stage.world.run(scenario)


def test_answers_are_written_anew(stage: Stage) -> None:
    async def scenario() -> None:
        async with stage.held(allowing(f"{SHOP}:8080")):
            for answer in (
                b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokHTTP/1.1 200 forged\r\nContent-Length: 0\r\n\r\n",
                b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
            ):
                stage.plain.answer = answer
                reply = await stage.says(GET, port=8080, until=b"ok\r\n0\r\n\r\n" if b"chunked" in answer else b"ok")
                assert reply.count(b"HTTP/1.1 200") == 1
                assert b"forged" not in reply
            for answer in (b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\n\r\n", b"SSH-2.0-x\r\n\r\n",
                           b"HTTP/1.1 200 OK\r\nX: a\rSet-Cookie: b\r\nContent-Length: 2\r\n\r\nok",
                           b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nok"):  # fmt: skip
                stage.plain.answer = answer
                assert b"502" in (await stage.says(GET, port=8080)).splitlines()[0]

    stage.world.run(scenario)


def test_asking_the_proxy(stage: Stage) -> None:
    world = stage.world
    world.names.answers |= {"inner.example": [PRIVATE[0]], "rebound.example": [PUBLIC, METADATA[0]]}
    inner = world.keep(WebServer(world.internet, 8080, address=PRIVATE[0]))

    async def scenario() -> None:
        contract = allowing(f"{SHOP}:443,8080,7", "inner.example:8080", "rebound.example:8080", "203.0.113.0/24:8000")
        async with stage.held(contract) as slot:
            absolute = head(f"GET http://{SHOP}:8080/a?b HTTP/1.1", HOST)
            assert (await stage.asks(absolute)).endswith(b"ok")
            assert stage.plain.heard.pop().startswith(b"GET /a?b HTTP/1.1\r\n")
            for bad in (
                GET,  # which is not how a proxy is asked
                head("CONNECT evil.example:443 HTTP/1.1", "Host: evil.example:443"),
                head(f"CONNECT {SHOP}:444 HTTP/1.1", f"Host: {SHOP}:444"),
                head(f"CONNECT {SHOP} HTTP/1.1", f"Host: {SHOP}"),
                head(f"CONNECT {SHOP}:443 HTTP/1.1", "Host: evil.example:443"),
                head("CONNECT inner.example:8080 HTTP/1.1", "Host: inner.example:8080"),
                head("CONNECT rebound.example:8080 HTTP/1.1", "Host: rebound.example:8080"),
                *(head(f"CONNECT {address} HTTP/1.1", f"Host: {address}") for address in (
                    f"{PRIVATE[0]}:8080", f"{METADATA[0]}:80", f"{PUBLIC}:8080", "127.0.0.1:80", "2130706433:80",
                    "0x7f.1:80", "[::1]:80", f"{slot.gateway}:53", f"{slot.gateway}:{PROXY_PORT}", f"{slot.address}:80",
                )),
                head(f"GET https://{SHOP}/ HTTP/1.1", f"Host: {SHOP}"),
                head(f"GET ftp://{SHOP}/ HTTP/1.1", f"Host: {SHOP}"),
            ):  # fmt: skip
                reply = await stage.asks(bad)
                assert REFUSED in reply, bad
                assert b" 200 " not in reply, bad
            assert inner.heard == stage.plain.heard == []
            assert await off(lambda: stage.guest.ask(str(slot.gateway), REDIRECTED_PORT)) == "No route to host"
            found = slot.counters()
            assert found["refused_proxy_unresolved"] == 2
            assert found["refused_gateway"] == 1

    world.run(scenario)


def test_tunnels(stage: Stage) -> None:
    world = stage.world

    def through(*pieces: bytes) -> bytes:
        """What comes back in a tunnel to the shop, after what says that it stands."""
        assert stage.slot is not None
        found = b""
        with socket.create_connection((str(stage.slot.gateway), PROXY_PORT), timeout=5) as tunnel:
            tunnel.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for piece in pieces:
                tunnel.sendall(piece)
                time.sleep(0.02)
            try:
                while not found.partition(b"\r\n\r\n")[2] and (data := tunnel.recv(65536)):
                    found += data
            except OSError:
                pass
        return found.partition(b"\r\n\r\n")[2]

    def connect(port: int) -> bytes:
        return head(f"CONNECT {SHOP}:{port} HTTP/1.1", f"Host: {SHOP}:{port}")

    async def tunnel(*pieces: bytes) -> bytes:
        return await off(lambda: stage.guest.run(lambda: through(*pieces)))

    greeting = world.serve(world.internet, 7)  # it speaks first

    async def scenario() -> None:
        async with stage.held(allowing(f"{SHOP}:443,8080,7")) as slot:
            assert (await tunnel(connect(443) + client_hello(SHOP)))[:1] == b"\x16"  # said before it stood
            assert (await tunnel(connect(443), client_hello(SHOP)))[:1] == b"\x16"
            before = stage.secure.names.copy()
            hidden = client_hello("evil.example")
            for pieces in (
                [hidden],
                [hidden[:3], hidden[3:]],
                [hidden[:1], hidden[1:60], hidden[60:]],
                [client_hello(None)],
            ):
                assert await tunnel(connect(443), *pieces) == b""
            assert stage.secure.names == before
            # HTTP in a tunnel is HTTP: also a byte at a time, and after empty lines.
            evil = b"\r\nGET / HTTP/1.1\r\nHost: evil.example:8080\r\n\r\n"
            assert REFUSED in await tunnel(connect(8080), *(evil[at : at + 1] for at in range(20)), evil[20:])
            assert (await tunnel(connect(8080), GET)).endswith(b"ok")
            assert len(stage.plain.heard) == 1
            assert await tunnel(connect(7)) == b"198.51.100.10"
            assert await tunnel(connect(7), b"SSH-2.0-x\r\n") == b"198.51.100.10"
            assert slot.counters()["refused_proxy_mismatch"] == 3
            assert greeting.connections

    world.run(scenario)


def test_who_says_nothing_is_not_waited_for(stage: Stage) -> None:
    async def scenario() -> None:
        stage.pool = stage.world.pool(new_connections=2000, burst=2000)
        async with stage.held(allowing(f"{SHOP}:443,8080")) as slot:
            slow: list[socket.socket] = []

            def dribble() -> None:
                for _ in range(600):
                    sock = socket.create_connection((PUBLIC, 8080), timeout=5)
                    slow.append(sock)
                    sock.sendall(b"GET / HTTP/1.1\r\nX: ")

            await off(lambda: stage.guest.run(dribble))
            await off(lambda: wait_until(lambda: slot.counters().get("refused_proxy_limit", 0) >= 88, "refusals"))
            other = stage.world.guest()
            pool = stage.pool
            other.slot = await pool.take(allowing(f"{SHOP}:443"))  # of its own it has all
            await pool.attach(other.slot, other.namespace)
            await off(lambda: lookup(other, SHOP))
            assert await off(lambda: other.run(lambda: secured(PUBLIC, 443, SHOP, stage.trust))) == ANSWER
            for sock in slow:
                sock.close()
            await off(lambda: wait_until(lambda: len(stage.carried) >= 88, "their ends"))
            await pool.give_back(other.slot)

    stage.world.run(scenario)


def test_a_slot_that_is_another_s_has_nothing_of_the_last(stage: Stage) -> None:
    world = stage.world

    async def scenario() -> None:
        pool = world.pool(slots=1)
        stage.pool = pool
        async with stage.held(allowing(f"{SHOP}:443")):
            kept = await stage.begun()
            with kept:
                assert stage.slot is not None
                await pool.give_back(stage.slot)
                again = stage.slot = await pool.take(allowing(f"{SHOP}:443"))
                assert again.number == 0
                kept.settimeout(0.5)
                assert await off(lambda: asked(kept)) == b""
                assert "proxied" not in again.counters()
                await pool.give_back(again)

    world.run(scenario)


SECRET = "s3cr3t-V4lue-of-a-host"


def test_a_credential_goes_to_its_host_and_nowhere_else(stage: Stage) -> None:
    world = stage.world
    world.names.answers["impostor.example"] = [PUBLIC]
    bearer = {name: Credential(443, "Authorization", f"Bearer {SECRET}") for name in (SHOP, "impostor.example")}

    def plain(path: str, *rest: str, host: str = SHOP, method: str = "GET") -> bytes:
        return head(f"{method} http://{host}{path} HTTP/1.1", f"Host: {host}", *rest)

    async def scenario() -> None:
        contract = allowing(f"{SHOP}:443,8080", f"{SHOP}:80", "other.example:8080", "impostor.example:443,80")
        async with stage.held(contract) as slot:
            slot.credential = bearer.get
            own = plain("/v1", "AUTHORIZATION: Bearer mine", "Accept-Encoding: gzip", "Proxy-Authorization: Basic x")
            assert (await stage.asks(own)).endswith(b"ok")
            (heard,) = stage.secure.heard
            assert heard.startswith(b"GET /v1 HTTP/1.1\r\nhost: shop.example\r\n")
            assert heard.lower().count(b"authorization") == heard.count(SECRET.encode()) == 1
            assert b"gzip" not in heard
            assert b"mine" not in heard
            # Led there, too: port 80 is where it is asked for, and 443 where it goes.
            assert (await stage.says(head("GET /led HTTP/1.1", f"Host: {SHOP}"), port=80)).endswith(b"ok")
            assert SECRET.encode() in stage.secure.heard[1]
            secure = head(f"GET https://{SHOP}/s HTTP/1.1", f"Host: {SHOP}")
            assert (await stage.asks(secure)).endswith(b"ok")
            assert SECRET.encode() in stage.secure.heard[2]
            # What the sandbox secures itself is as it was, and so is another server of that host.
            assert await stage.tls(SHOP) == ANSWER
            assert stage.secure.heard[3] == b"hello"
            assert (await stage.says(GET, port=8080)).endswith(b"ok")
            # A redirect is the sandbox's to follow, by a request of its own, on the same connection even.
            stage.secure.answer = (
                b"HTTP/1.1 302 Found\r\nLocation: http://other.example:8080/\r\nContent-Length: 0\r\n\r\n"
            )
            elsewhere = head("GET http://other.example:8080/ HTTP/1.1", "Host: other.example:8080")
            assert (await stage.asks(plain("/away"), elsewhere)).endswith(b"ok")
            assert not [one for one in stage.plain.heard if SECRET.encode() in one]
            # A server that is somebody else, in whatever way, gets nothing.
            heard_before = len(stage.secure.heard)
            assert b" 502 " in await stage.asks(plain("/", host="impostor.example"))
            assert len(stage.secure.heard) == heard_before
            # What shows it is not shown: as a header, as a body, in pieces.
            for method in ("TRACE", "trace", "DEBUG"):
                assert REFUSED in await stage.asks(plain("/", method=method))
            for answer in (
                f"HTTP/1.1 200 OK\r\nX-Echo: {SECRET}\r\nContent-Length: 2\r\n\r\nok",
                f"HTTP/1.1 200 OK\r\nContent-Length: {len(SECRET) + 2}\r\n\r\n{SECRET}ok",
                "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
                + "".join(f"1\r\n{letter}\r\n" for letter in SECRET) + "2\r\nok\r\n0\r\n\r\n",
                f"HTTP/1.1 200 {SECRET}\r\nContent-Length: 2\r\n\r\nok",
            ):  # fmt: skip
                stage.secure.answer = answer.encode()
                reply = await stage.asks(plain("/echo"))
                assert SECRET.encode() not in reply
                assert not reply.endswith(b"ok")
            assert slot.counters()["refused_proxy_credential"] == 7
            assert all(SECRET not in str(each) for each in stage.carried)
            assert sum(each.credential for each in stage.carried) == 8

    world.run(scenario)


CLOSING = (
    allowing("inner.example:8080"),  # as private
    allowing("inner.example:8080", deny_private=False, denied_cidrs=(f"{PRIVATE[0]}/32",)),
)
INNER = b"GET / HTTP/1.1\r\nHost: inner.example:8080\r\n\r\n"


@pytest.mark.parametrize("closing", CLOSING)
def test_an_address_that_another_contract_closes_is_not_kept_by_its_name(stage: Stage, closing: Compiled) -> None:
    """Led there, asked for and tunnelled: connections that stand when the contract that let them there has gone."""
    world = stage.world
    world.names.answers["inner.example"] = [PRIVATE[0]]
    inner = world.keep(WebServer(world.internet, 8080, address=PRIVATE[0]))

    def begin(gateway: str) -> list[tuple[socket.socket, bytes]]:
        asking = INNER.replace(b"/ ", b"http://inner.example:8080/ ", 1)
        begun = []
        lookup(stage.guest, "inner.example")
        for where, first, request in (
            ((PRIVATE[0], 8080), b"", INNER),
            ((gateway, PROXY_PORT), b"", asking),
            ((gateway, PROXY_PORT), b"CONNECT inner.example:8080 HTTP/1.1\r\nHost: inner.example:8080\r\n\r\n", INNER),
        ):
            connection = socket.create_connection(where, timeout=5)
            if first:
                connection.sendall(first)
                assert b" 200 " in connection.recv(1000)
            begun.append((connection, request))
            assert told(connection, request).endswith(b"ok")
        return begun

    def told(connection: socket.socket, request: bytes) -> bytes:
        found = b""
        with contextlib.suppress(OSError):
            connection.sendall(request)
            while not found.endswith(b"ok") and (data := connection.recv(1000)):
                found += data
        return found

    async def scenario() -> None:
        async with stage.held(allowing("inner.example:8080", deny_private=False)) as slot:
            begun = await off(lambda: stage.guest.run(lambda: begin(str(slot.gateway))))
            heard = len(inner.heard)
            await stage.pool.swear(slot, closing)
            for connection, request in begun:
                with connection:
                    assert await off(partial(told, connection, request)) == b""
            assert len(inner.heard) == heard

    world.run(scenario)


def test_names_that_are_never_answered_keep_nobody_else_waiting(stage: Stage) -> None:
    """A few sandboxes with a domain of their attacker's could have had the daemon look up all that it looks up."""
    stage.world.names.answers |= {f"n{number}.evil.example": lambda _query, _response: None for number in range(64)}

    def ask() -> list[socket.socket]:
        assert stage.slot is not None
        asking = []
        for number in range(64):
            asking.append(socket.create_connection((str(stage.slot.gateway), PROXY_PORT), timeout=5))
            there = f"n{number}.evil.example:443"
            asking[-1].sendall(head(f"CONNECT {there} HTTP/1.1", f"Host: {there}"))
        return asking

    async def scenario() -> None:
        async with stage.held(allowing("*.evil.example:443")) as slot:
            asking = await off(lambda: stage.guest.run(ask))
            await off(lambda: wait_until(lambda: slot.counters().get("dns_busy"), "some of it is refused"))
            for connection in asking:
                connection.close()

    stage.world.run(scenario)
