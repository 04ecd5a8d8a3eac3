"""What the host is changed in, that others' changes are followed, and that all of it is put back."""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path

import pytest
from tests.network.servers import wait_until
from tests.network.topology import HOST, NEIGHBOUR, PUBLIC, World, joined, off

from tartarus.model.errors import TartarusError, Unsupported
from tartarus.network import namespace, nft
from tartarus.network.ledger import Changes, Ledger

pytestmark = pytest.mark.needs("root", "nft", "ip")


def test_forwarding_is_turned_on_for_the_way_out_only_and_put_back(world: World) -> None:
    async def scenario() -> None:
        async with joined(world.pool()) as pool:
            await pool.open()
            assert (world.forwarding("eth0"), world.forwarding("eth1"), world.forwarding("all")) == ("1", "0", "0")

    assert world.forwarding("eth0") == "0"
    world.run(scenario)
    assert world.traces() == []


def send_through_the_host(world: World, mark: bytes) -> None:
    """A packet from the Internet to the host's other network, as if the host were a router."""

    def send() -> None:
        subprocess.run(["ip", "route", "replace", "192.0.2.0/24", "via", HOST], check=True, timeout=20)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(mark, (NEIGHBOUR, 9))

    namespace.run_in(world.internet, send)


def test_the_host_does_not_become_anybody_else_s_router(world: World) -> None:
    """Between its networks nothing passes as before, although a link of it forwards now."""
    mark = world.mark()
    sniffer = world.sniff(world.lan)

    async def scenario() -> None:
        async with joined(world.pool()) as pool:
            await pool.open()
            assert world.forwarding("eth0") == "1"
            await off(lambda: send_through_the_host(world, mark))

            def refused() -> bool:
                listed = world.shell("nft", "list", "chain", "inet", pool._host.table, "forward")
                return "counter packets 0 " not in listed.split("@opened")[1]

            await off(lambda: wait_until(refused, "the packet is refused and counted"))
            assert not sniffer.saw(mark)

    world.run(scenario)


def test_what_already_forwarded_still_does(world: World) -> None:
    mark = world.mark()
    sniffer = world.sniff(world.lan)
    for link in ("eth0", "eth1"):
        world.shell("sysctl", "-qw", f"net.ipv4.conf.{link}.forwarding=1")

    async def scenario() -> None:
        async with joined(world.pool()) as pool:
            await pool.open()
            await off(lambda: send_through_the_host(world, mark))
            await off(lambda: wait_until(lambda: sniffer.saw(mark), "the packet passes"))

    world.run(scenario)
    assert (world.forwarding("eth0"), world.forwarding("eth1")) == ("1", "1")


def test_whoever_turns_on_forwarding_later_is_not_in_our_way_nor_we_in_theirs(world: World) -> None:
    guest = world.guest()

    async def scenario() -> None:
        async with joined(world.pool(), guest) as pool:
            assert '"eth0"' in world.shell("nft", "list", "set", "inet", pool._host.table, "opened")
            world.shell("sysctl", "-qw", "net.ipv4.ip_forward=1")
            await off(
                lambda: wait_until(
                    lambda: '"eth0"' not in world.shell("nft", "list", "set", "inet", pool._host.table, "opened"),
                    "the stand-in for closed forwarding is lifted",
                )
            )
            assert await off(lambda: guest.ask(PUBLIC)) == HOST

    world.run(scenario)
    assert (world.forwarding("all"), world.forwarding("eth0")) == ("1", "1")


def test_a_new_network_of_the_host_is_closed_as_it_comes(world: World) -> None:
    guest = world.guest()
    network = "203.0.113.0/24"

    async def scenario() -> None:
        async with joined(world.pool(), guest) as pool:
            assert await off(lambda: guest.ask(PUBLIC)) == HOST
            await off(lambda: world.shell("ip", "route", "add", network, "dev", "eth0", "scope", "link"))
            await off(lambda: wait_until(lambda: guest.ask(PUBLIC) == "No route to host", "it is followed"))
            assert guest.slot is not None
            assert guest.slot.counters()["refused_neighbour"] >= 1
            table = pool._host.table
            await off(
                lambda: wait_until(lambda: network in world.shell("nft", "list", "table", "inet", table), "twice")
            )
            await off(lambda: world.shell("ip", "route", "del", network, "dev", "eth0", "scope", "link"))
            await off(lambda: wait_until(lambda: guest.ask(PUBLIC) == HOST, "and back"))

    world.run(scenario)


def test_a_new_address_of_the_host_is_closed_as_it_comes(world: World) -> None:
    guest = world.guest()

    async def scenario() -> None:
        async with joined(world.pool(), guest):
            await off(lambda: world.shell("ip", "address", "add", "203.0.113.99/32", "dev", "eth0"))
            # Before and after it is followed: the second wall lets nothing reach the host itself.
            assert await off(lambda: guest.ask("203.0.113.99", 8080, 0.3)) in {"TimeoutError", "No route to host"}
            await off(
                lambda: wait_until(lambda: guest.ask("203.0.113.99", 8080, 0.5) == "No route to host", "it is followed")
            )

    world.run(scenario)


@pytest.mark.parametrize("what", ["ruleset", "table", "chain"])
def test_rules_that_somebody_takes_away_come_back(world: World, what: str) -> None:
    guest = world.guest()

    async def scenario() -> None:
        async with joined(world.pool(), guest) as pool:
            table = pool._host.table
            before = world.shell("nft", "-s", "list", "table", "inet", table)
            command = {
                "ruleset": ["flush", "ruleset"],
                "table": ["delete", "table", "inet", table],
                "chain": ["flush", "chain", "inet", table, "leaving"],
            }[what]
            await off(lambda: world.shell("nft", *command))
            await off(
                lambda: wait_until(
                    lambda: before in world.shell("nft", "-s", "list", "ruleset"), "the table stands again"
                )
            )
            assert await off(lambda: guest.ask(PUBLIC)) == HOST
            # And meanwhile the first wall stood, where nobody's tools reach.
            assert await off(lambda: guest.ask("10.9.9.9")) == "No route to host"

    world.run(scenario)


def test_a_host_whose_rules_can_t_stand_has_no_network(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    guest = world.guest()

    def refused(*_: object) -> None:
        raise Unsupported("the packet filter's rules can't be installed")

    async def scenario() -> None:
        async with joined(world.pool(), guest) as pool:
            with monkeypatch.context() as patch:
                patch.setattr(nft, "apply", refused)
                await off(lambda: world.shell("nft", "flush", "ruleset"))
                await off(lambda: wait_until(lambda: pool._failure, "the daemon notices"))
                await off(lambda: wait_until(lambda: guest.ask(PUBLIC, 80, 0.3) != HOST, "it is cut"))
                with pytest.raises(TartarusError, match="the sandboxes' network is cut"):
                    await pool.take()
            assert await off(lambda: guest.ask(PUBLIC, 80, 0.3)) in {"TimeoutError", "Network is unreachable"}

    world.run(scenario)
    assert world.traces() == []


def test_firewalls_that_stand_in_the_way_are_named_with_what_to_do(world: World) -> None:
    ruleset = """
table ip filter {
  chain DOCKER-USER { }
  chain FORWARD { type filter hook forward priority filter; policy drop;
    jump DOCKER-USER
  }
}
table inet firewalld {
  chain filter_FORWARD { type filter hook forward priority 10; policy accept; }
}
"""

    async def scenario() -> None:
        async with joined(world.pool()) as pool:
            await pool.open()
            assert await off(pool._host.obstacles) == []
            await off(lambda: world.in_host(lambda: nft.apply(ruleset)))
            docker, firewalld = sorted(await off(pool._host.obstacles), key=lambda text: "firewalld" in text)
            assert f"iptables -I DOCKER-USER -i {pool._host.uplink} -j ACCEPT" in docker
            assert f"--add-interface={pool._host.uplink}" in firewalld
            told = f'insert rule ip filter DOCKER-USER iifname "{pool._host.uplink}" accept'
            await off(lambda: world.in_host(lambda: nft.apply(told)))
            assert await off(pool._host.obstacles) == [firewalld]

    world.run(scenario)


def test_a_ledger_of_another_boot_or_namespace_is_not_acted_upon(world: World) -> None:
    """After a reboot the names in it may be somebody else's."""
    world.state_dir.mkdir()
    ledger = Ledger(world.state_dir)
    world.shell("sysctl", "-qw", "net.ipv4.conf.eth1.forwarding=1")
    for boot, where in (("another", None), (None, (0, 1))):
        here = world.in_host(lambda: Changes.here("tartarus_x", "eth1"))
        changes = Changes(boot or here.boot, where or here.namespace, here.table, "eth1", ("eth1",))
        ledger.write(changes)
        assert world.run(world.pool().clean) is True
        assert world.forwarding("eth1") == "1"
        assert "eth1" in world.shell("ip", "link")
        assert world.run(world.pool().clean) is False


@pytest.mark.parametrize("damage", [b"", b"{}", b"[1", b'{"boot": 1}', b"\xff" * 100])
def test_a_damaged_ledger_is_no_obstacle(world: World, damage: bytes) -> None:
    world.state_dir.mkdir()
    (world.state_dir / "network.json").write_bytes(damage)
    guest = world.guest()

    async def scenario() -> None:
        async with joined(world.pool(), guest):
            assert await off(lambda: guest.ask(PUBLIC)) == HOST

    world.run(scenario)
    assert world.traces() == []


def test_the_ledger_is_its_owner_s_alone(world: World) -> None:
    async def scenario() -> None:
        async with joined(world.pool()) as pool:
            await pool.open()
            for name in ("network.json", "network.lock"):
                assert Path(world.state_dir, name).stat().st_mode & 0o777 == 0o600

    world.run(scenario)
