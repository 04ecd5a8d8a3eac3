"""The egress proxy with real packets, servers and certificates: what is carried, refused, counted, and told."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import ssl
import subprocess
import sys
from pathlib import Path

import dns.message
import dns.query
import pytest
from tests.network.servers import wait_until
from tests.network.stage import GET, SHOP, Stage, asked
from tests.network.test_contracts import allowing, lookup
from tests.network.topology import PRIVATE, PUBLIC, off
from tests.network.webs import ANSWER, Authority, WebServer, client_hello, secured

from tartarus.network.pool import SlotPool
from tartarus.node.egress import PROXY_UID

pytestmark = pytest.mark.needs("root", "nft", "ip")


def test_a_domain_is_reached_by_its_name_and_no_other(stage: Stage) -> None:
    async def scenario() -> None:
        contract = allowing(f"{SHOP}:443,8080", "other.example:443")
        async with stage.held(contract) as slot:
            assert await stage.tls(SHOP) == ANSWER
            assert stage.secure.names == [SHOP]
            for name in ("evil.example", None, "other.example"):  # the last was not looked up
                assert await stage.tls(name) != ANSWER
            assert await off(lambda: lookup(stage.guest, "other.example")) == [PUBLIC]
            assert await stage.tls("other.example") == ANSWER
            assert (await stage.says(GET, port=8080)).endswith(b"ok")
            for host in (b"evil.example:8080", b"shop.example:80", b"203.0.113.80:8080", b"other.example:8080"):
                reply = await stage.says(b"GET / HTTP/1.1\r\nHost: " + host + b"\r\n\r\n", port=8080)
                assert b"refused by the egress proxy" in reply
            assert stage.plain.heard == [b"GET / HTTP/1.1\r\nhost: shop.example:8080\r\n\r\n"]
            assert await stage.says(b"SSH-2.0-x\r\n", port=8080) == b""
            await off(lambda: wait_until(lambda: len(stage.carried) == 11, "all reports"))
            found = {name: count for name, count in slot.counters().items() if "prox" in name}
            assert found == {
                "proxied": 3, "refused_proxy_name": 4, "refused_proxy_no_name": 1, "refused_proxy_mismatch": 2,
                "refused_proxy_protocol": 1,
            }  # fmt: skip
            final = await stage.pool.give_back(slot)  # which the metrics count by
            assert {name: final[name] for name in found} == found
            good = [each for each in stage.carried if not each.refused]
            assert [(each.kind, each.name, each.port, each.address) for each in good] == [
                ("tls", SHOP, 443, PUBLIC), ("tls", "other.example", 443, PUBLIC), ("http", SHOP, 8080, PUBLIC),
            ]  # fmt: skip
            assert all(each.sent > 40 and each.received > 30 for each in good)

    stage.world.run(scenario)
    assert stage.world.traces() == []


def proxies(pool: SlotPool) -> set[int]:
    """The egress proxies' processes of one router: other tests have their own."""
    assert pool._router is not None
    ours = os.fstat(pool._router.namespace).st_ino
    found = set()
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and b"tartarus.node.egress_inside" in (entry / "cmdline").read_bytes():
                found |= {int(entry.name)} if (entry / "ns" / "net").stat().st_ino == ours else set()
    return found


def test_without_the_proxy_nothing_gets_out_and_another_takes_its_place(stage: Stage) -> None:
    async def scenario() -> None:
        async with stage.held(allowing(f"{SHOP}:443")):
            assert await stage.tls(SHOP) == ANSWER
            (first,) = proxies(stage.pool)
            kept = await stage.begun()
            os.kill(first, signal.SIGKILL)
            with kept:
                assert await off(lambda: asked(kept)) == b""
            before = stage.secure.accepted
            assert await stage.tls("evil.example") != ANSWER
            assert stage.secure.accepted == before
            assert await stage.tls(SHOP) == ANSWER  # what waited meanwhile is served by the next
            (second,) = proxies(stage.pool)
            assert second != first
        assert not Path(f"/proc/{second}").exists()

    stage.world.run(scenario)


def test_it_holds_nothing_but_what_it_needs(stage: Stage) -> None:
    async def scenario() -> None:
        async with stage.held(allowing(f"{SHOP}:443")):
            assert await stage.tls(SHOP) == ANSWER
            (process,) = proxies(stage.pool)
            status = dict(
                line.split(":\t", 1)
                for line in Path(f"/proc/{process}/status").read_text().splitlines()
                if ":\t" in line
            )
            assert {status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
            assert (status["NoNewPrivs"], status["Seccomp"], status["Groups"].strip()) == ("1", "2", "")
            assert set(status["Uid"].split()) == {str(PROXY_UID)}
            assert os.listdir(f"/proc/{process}/root") == []
            fds = [os.readlink(f"/proc/{process}/fd/{name}") for name in os.listdir(f"/proc/{process}/fd")]
            assert not [target for target in fds if target.startswith("net:")]

    stage.world.run(scenario)


def test_what_another_contract_does_not_allow_ends_with_the_one_that_did(stage: Stage) -> None:
    async def scenario() -> None:
        async with stage.held(allowing(f"{SHOP}:443")) as slot:
            kept, other = await stage.begun(), await stage.begun()
            with kept, other:
                await stage.pool.swear(slot, allowing(f"{SHOP}:443,80"))
                assert await off(lambda: asked(kept)) == ANSWER
                await stage.pool.swear(slot, allowing("other.example:443"))
                assert await off(lambda: asked(kept)) == b""
                assert await stage.tls(SHOP) != ANSWER
            await stage.pool.swear(slot, allowing(f"{SHOP}:443"))
            await off(lambda: lookup(stage.guest, SHOP))
            kept = await stage.begun()
            with kept:
                assert await off(lambda: asked(kept)) == ANSWER
                await stage.pool.cut(slot)
                kept.settimeout(0.3)
                assert await off(lambda: asked(kept)) == b""
            await stage.pool.restore(slot)

    stage.world.run(scenario)


def test_private_addresses_where_a_contract_opens_them(stage: Stage) -> None:
    world = stage.world
    world.names.answers["inner.example"] = [PRIVATE[0]]
    inner = world.keep(WebServer(world.internet, 8080, address=PRIVATE[0]))

    async def scenario() -> None:
        asking = b"GET http://inner.example:8080/ HTTP/1.1\r\nHost: inner.example:8080\r\n\r\n"
        async with stage.held(allowing("inner.example:8080")) as slot:
            assert b" 502 " in await stage.asks(asking)
            await stage.pool.swear(slot, allowing("inner.example:8080", deny_private=False))
            assert (await stage.asks(asking)).endswith(b"ok")
            assert len(inner.heard) == 1

    world.run(scenario)


def test_a_second_hello_is_read_as_well(stage: Stage, tmp_path: Path) -> None:
    context = Authority(tmp_path).serving(SHOP)
    context.set_ecdh_curve("secp384r1")  # of which no client sends a key before it is asked to
    server = stage.world.keep(WebServer(stage.world.internet, 444, context))
    unverified = ssl._create_unverified_context()

    def twice(name: str) -> bytes:
        with socket.create_connection((PUBLIC, 444), timeout=5) as connection:
            connection.sendall(client_hello(SHOP))
            answer = connection.recv(65536)
            assert answer[0] == 0x16
            connection.sendall(b"\x14\3\3\0\1\1" + client_hello(name))
            with contextlib.suppress(OSError):
                return connection.recv(65536)
            return b""

    async def scenario() -> None:
        async with stage.held(allowing(f"{SHOP}:444")) as slot:
            assert await off(lambda: stage.guest.run(lambda: secured(PUBLIC, 444, SHOP, unverified))) == ANSWER
            assert await off(lambda: stage.guest.run(lambda: twice("evil.example"))) == b""
            await off(lambda: wait_until(lambda: slot.counters().get("refused_proxy_mismatch"), "a refusal"))
            assert await off(lambda: stage.guest.run(lambda: twice(SHOP))) != b""  # an alert, of the server's own
            assert "evil.example" not in server.names

    stage.world.run(scenario)


def test_how_to_connect_is_not_told(stage: Stage) -> None:
    def ask(kind: str) -> dns.message.Message:
        assert stage.slot is not None
        gateway = str(stage.slot.gateway)
        return stage.guest.run(lambda: dns.query.udp(dns.message.make_query(SHOP, kind), gateway, timeout=5))

    async def scenario() -> None:
        async with stage.held(allowing(f"{SHOP}:443")):
            asked_before = len(stage.world.names.asked)
            answer = await off(lambda: ask("HTTPS"))
            assert (answer.rcode(), answer.answer) == (0, [])
            assert len(stage.world.names.asked) == asked_before

    stage.world.run(scenario)


TRYING = """
import ctypes, mmap, os, socket, sys
from tartarus.node.egress_inside import confine
def attempt(name, work):
    try:
        work()
    except OSError as error:
        os.write(1, f"{name}: {error.strerror}\\n".encode())
    else:
        os.write(1, f"{name}: done\\n".encode())
listening = socket.create_server(("127.0.0.1", 0))
libc = ctypes.CDLL(None, use_errno=True)
confine(int(sys.argv[1]))
attempt("connect", lambda: socket.create_connection(listening.getsockname()))
attempt("read", lambda: os.open("/", os.O_RDONLY))
attempt("write", lambda: os.open("/x", os.O_CREAT | os.O_WRONLY))
attempt("list", lambda: os.listdir("/"))
attempt("run", lambda: os.execv("/bin/true", ["true"]))
attempt("fork", os.fork)
attempt("kill", lambda: os.kill(1, 0))
attempt("root", lambda: os.setuid(0))
attempt("unix", lambda: socket.socket(socket.AF_UNIX))
attempt("datagrams", lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
attempt("raw", lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW))
attempt("netlink", lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW))
attempt("v6", lambda: socket.socket(socket.AF_INET6))
attempt("bind", lambda: socket.socket().bind(("127.0.0.1", 0)))
attempt("listen", lambda: socket.socket().listen())
attempt("code", lambda: mmap.mmap(-1, 4096, prot=7))
def look():
    if libc.ptrace(16, 1, 0, 0):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
attempt("look", look)
"""


def test_a_proxy_that_was_taken_over_can_connect_and_nothing_else() -> None:
    argv = ["unshare", "--mount", sys.executable, "-P", "-c", TRYING, str(PROXY_UID)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    found = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert found.pop("connect") == "done", done.stderr
    assert len(found) == 16, done.stderr
    assert set(found.values()) == {"Operation not permitted"}
