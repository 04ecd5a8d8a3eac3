"""What policies let contracts open."""

from __future__ import annotations

import pytest

from tartarus.model.contract import Contract, Grant
from tartarus.model.sandbox import Network, SandboxSpec
from tartarus.policy.contracts import contract_of, refusals
from tartarus.policy.documents import NetworkPolicy

MOST = NetworkPolicy(
    allowed_cidrs=("203.0.113.0/24",), allowed_domains=("example.org", "*.example.net"),
    allowed_egress_ports=(80, 443), denied_cidrs=("203.0.113.9/32",), max_connections=5,
)  # fmt: skip


def spec(**contract: object) -> SandboxSpec:
    return SandboxSpec(network=Network.CONTRACT, contract=Contract(**contract))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("contract", "refused"),
    [
        ({"grants": (Grant("203.0.113.0/25", (80,)),)}, []),
        ({"grants": (Grant("example.org", (443,)), Grant("*.a.example.net", (443,)))}, []),
        ({"grants": (Grant("203.0.112.0/23", (80,)),)}, ["network 203.0.112.0/23"]),
        ({"grants": (Grant("203.0.113.0/24"),)}, ["ports: all of them"]),
        ({"grants": (Grant("203.0.113.0/24", (80, 22)),)}, ["ports: 22"]),
        ({"grants": (Grant("*.example.org", (80,)),)}, ["domain *.example.org"]),
        ({"grants": (Grant("example.net", (80,)),)}, ["domain example.net"]),
        ({"grants": (Grant("badexample.net", (80,)),)}, ["domain badexample.net"]),
        ({"grants": (Grant("2001:db8::/32", (80,)),)}, ["network 2001:db8::/32"]),
        ({"grants": (Grant("example.org", (80,), direct=True),)}, ["domains past the egress proxy"]),
        ({"deny_private": False}, ["private addresses"]), ({"deny_metadata": False}, ["the metadata services"]),
    ],
)  # fmt: skip
def test_what_is_refused(contract: dict[str, object], refused: list[str]) -> None:
    assert [what for what, _ in refusals(spec(**contract), MOST)] == refused


def test_private_addresses_are_opened_by_name_only() -> None:
    asked = spec(allowed_cidrs=("10.0.0.0/8",), deny_private=False)
    assert list(refusals(asked, NetworkPolicy()))
    assert not list(refusals(asked, NetworkPolicy(deny_private=False)))


def test_a_policy_says_whether_domains_may_be_direct() -> None:
    asked = spec(grants=(Grant("git.example.org", (22,), direct=True),))
    assert not list(refusals(asked, NetworkPolicy()))
    assert list(refusals(asked, NetworkPolicy(allow_direct=False)))
    only = NetworkPolicy(allowed_domains=("*.example.org",))
    assert [what for what, _ in refusals(asked, only)] == ["domains past the egress proxy"]
    assert not list(refusals(asked, NetworkPolicy(allowed_domains=("*.example.org",), allow_direct=True)))


def test_a_policy_may_close_all() -> None:
    for network in (SandboxSpec(network=Network.OPEN), spec()):
        assert list(refusals(network, NetworkPolicy(allow=False))) == [("a network", "network none")]
    assert not list(refusals(SandboxSpec(), NetworkPolicy(allow=False)))
    assert list(refusals(spec(), NetworkPolicy(deny_dns=True)))


def test_an_open_network_is_as_open_as_the_policy_lets() -> None:
    held = contract_of(SandboxSpec(network=Network.OPEN), MOST)
    assert held is not None
    assert (held.allowed_cidrs, held.allowed_ports) == (MOST.allowed_cidrs, MOST.allowed_egress_ports)
    assert (held.denied_cidrs, held.max_connections) == (MOST.denied_cidrs, 5)
    only_names = contract_of(SandboxSpec(network=Network.OPEN), NetworkPolicy(allowed_domains=("example.org",)))
    assert only_names is not None
    assert only_names.allowed_cidrs == ()


def test_what_a_policy_denies_is_in_every_contract() -> None:
    held = contract_of(spec(denied_cidrs=("203.0.113.7/32",), max_connections=9), MOST)
    assert held is not None
    assert (held.denied_cidrs, held.max_connections) == (("203.0.113.7/32", "203.0.113.9/32"), 5)
    assert contract_of(SandboxSpec(), MOST) is None
