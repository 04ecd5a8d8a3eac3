"""The egress proxy with real packets, servers and certificates: what is carried, refused, counted, and told."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.network.servers import wait_until
from tests.network.test_contracts import allowing, lookup
from tests.network.topology import PUBLIC, World, off
from tests.network.webs import ANSWER, Authority, WebServer, said, secured

from tartarus.network.compiled import Compiled
from tartarus.network.egress.messages import Carried
from tartarus.network.rules import PROXY_PORT
from tartarus.network.slot import Slot
from tartarus.node.egress import PROXY_UID

pytestmark = pytest.mark.needs("root", "nft", "ip")
SHOP = "shop.example"
GET = b"GET / HTTP/1.1\r\nHost: shop.example:8080\r\n\r\n"


class Stage:
    """A world with a shop at 443 and 80 of one address, which has other names, too; and a guest that is held to it."""

    def __init__(self, world: World, authority: Authority) -> None:
        self.world = world
        self.trust = authority.trusting()
        serving = authority.serving(SHOP, "evil.example", "other.example")
        self.secure = world.keep(WebServer(world.internet, 443, serving))
        self.plain = world.keep(WebServer(world.internet, 8080))
        self.guest = world.guest()
        world.names.answers |= {SHOP: [PUBLIC], "other.example": [PUBLIC], "evil.example": [PUBLIC]}
        self.carried: list[Carried] = []
        self.pool = world.pool()
        self.slot: Slot | None = None

    @contextlib.asynccontextmanager
    async def held(self, contract: Compiled) -> AsyncIterator[Slot]:
        slot = self.slot = self.guest.slot = await self.pool.take(contract)
        slot.told = self.carried.append
        try:
            await self.pool.attach(slot, self.guest.namespace)
            await off(lambda: lookup(self.guest, SHOP))
            yield slot
        finally:
            await self.pool.give_back(slot)
            await self.pool.close()

    async def tls(self, name: str | None, port: int = 443) -> bytes:
        return await off(lambda: self.guest.run(lambda: secured(PUBLIC, port, name, self.trust)))

    async def begun(self) -> socket.socket:
        """A connection to the shop that stands."""

        def begin() -> socket.socket:
            plain = socket.create_connection((PUBLIC, 443), timeout=5)
            return self.trust.wrap_socket(plain, server_hostname=SHOP)

        return await off(lambda: self.guest.run(begin))

    async def says(self, *pieces: bytes, port: int = 80, wait_s: float = 0.0, patience_s: float = 5.0) -> bytes:
        return await off(
            lambda: self.guest.run(lambda: said(PUBLIC, port, *pieces, wait_s=wait_s, patience_s=patience_s))
        )

    async def asks(self, *pieces: bytes) -> bytes:
        assert self.slot is not None
        gateway = str(self.slot.gateway)
        return await off(lambda: self.guest.run(lambda: said(gateway, PROXY_PORT, *pieces)))


def asked(connection: socket.socket) -> bytes:
    """What comes back on a connection; nothing if it is dead."""
    with contextlib.suppress(OSError):
        connection.sendall(b"x")
        return connection.recv(1000)
    return b""


@pytest.fixture(name="stage")
def _stage(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    authority = Authority(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.bundle))
    return Stage(world, authority)


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
            good = [each for each in stage.carried if not each.refused]
            assert [(each.kind, each.name, each.port, each.address) for each in good] == [
                ("tls", SHOP, 443, PUBLIC), ("tls", "other.example", 443, PUBLIC), ("http", SHOP, 8080, PUBLIC),
            ]  # fmt: skip
            assert all(each.sent > 40 and each.received > 30 for each in good)

    stage.world.run(scenario)
    assert stage.world.traces() == []


def proxies() -> list[int]:
    """The egress proxies' processes, of this test's daemon or another's."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and b"tartarus.node.egress_inside" in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


def test_without_the_proxy_nothing_gets_out_and_another_takes_its_place(stage: Stage) -> None:
    async def scenario() -> None:
        others = set(proxies())
        async with stage.held(allowing(f"{SHOP}:443")):
            assert await stage.tls(SHOP) == ANSWER
            (first,) = set(proxies()) - others
            kept = await stage.begun()
            os.kill(first, signal.SIGKILL)
            with kept:
                assert await off(lambda: asked(kept)) == b""
            before = stage.secure.accepted
            assert await stage.tls("evil.example") != ANSWER
            assert stage.secure.accepted == before
            assert await stage.tls(SHOP) == ANSWER  # what waited meanwhile is served by the next
            (second,) = set(proxies()) - others
            assert second != first
        assert set(proxies()) == others

    stage.world.run(scenario)


def test_it_holds_nothing_but_what_it_needs(stage: Stage) -> None:
    async def scenario() -> None:
        others = set(proxies())
        async with stage.held(allowing(f"{SHOP}:443")):
            assert await stage.tls(SHOP) == ANSWER
            (process,) = set(proxies()) - others
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
