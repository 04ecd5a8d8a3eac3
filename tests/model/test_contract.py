"""Contracts as they are written: short forms, and what is refused at the edge."""

from __future__ import annotations

from ipaddress import ip_address

import msgspec
import pytest

from tartarus.model.contract import OPEN, Contract, Grant, Publish, RateLimit, parse_allow, parse_publish
from tartarus.model.errors import InvalidRequest
from tartarus.network.compiled import MAX_OPENINGS, compiled


@pytest.mark.parametrize(
    ("text", "to", "ports"),
    [
        ("example.org:443", "example.org", (443,)), ("*.example.org", "*.example.org", ()),
        ("203.0.113.0/24:80,443", "203.0.113.0/24", (80, 443)), ("203.0.113.7", "203.0.113.7", ()),
        ("[2001:db8::/32]:443", "2001:db8::/32", (443,)), ("2001:db8::1", "2001:db8::1", ()),
        ("[2001:db8::/32]", "2001:db8::/32", ()),
    ],
)  # fmt: skip
def test_short_forms(text: str, to: str, ports: tuple[int, ...]) -> None:
    assert parse_allow(text) == Grant(to, ports)


@pytest.mark.parametrize(
    "text",
    ["", ":80", "example.org:", "example.org:x", "example.org:0", "example.org:65536", "203.0.113.1/24:80", "*", "*.",
     "*.*.org", "a b.org", "localhost", "-a.org", "300.1.1.1", "10.0.0.0/33", "[::1", "[::1]x", "exämple.org",
     "a.*.org", "*.org\n", "example.org/24", "example.org:80,", "1.2.3", "::1/129"],
)  # fmt: skip
def test_what_allows_nothing_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        parse_allow(text)


def test_published_ports() -> None:
    assert parse_publish("8080:80") == Publish(80, 8080)
    assert parse_publish("0.0.0.0:0:80") == Publish(80, 0, "0.0.0.0")
    assert parse_publish("[::1]:8080:80") == Publish(80, 8080, "::1")
    for text in ("80", "8080:0", "a:80", "host:8080:80", "8080:80:", "70000:80", "-1:80", "8080:80/tcp", "٣:80"):
        with pytest.raises(InvalidRequest):
            parse_publish(text)


@pytest.mark.parametrize(
    "document",
    [
        {"allowed_cidrs": ["10.0.0.1/8"]}, {"allowed_domains": ["localhost"]}, {"allowed_ports": [0]},
        {"allowed_ports": list(range(1, 66))}, {"max_connections": 0}, {"rate_limit": {"bytes_per_s": 10}},
        {"rate_limit": {"packets_per_s": -1}}, {"deny_dns": True, "allowed_domains": ["example.org"]},
        {"unknown": 1}, {"allowed_cidrs": ["10.0.0.0/8"] * 257}, {"grants": [{"to": "x"}]}, {"deny_private": "no"},
    ],
)  # fmt: skip
def test_what_is_no_contract_is_refused(document: object) -> None:
    with pytest.raises((InvalidRequest, msgspec.ValidationError)):
        msgspec.convert(document, Contract)


def test_what_is_denied_goes_over_what_is_allowed() -> None:
    found = compiled(Contract(
        allowed_cidrs=("203.0.113.0/24", "203.0.113.0/25"), denied_cidrs=("203.0.113.64/26",), allowed_ports=(80, 81),
        grants=(Grant("203.0.113.200", (22,)), Grant("198.51.100.0/24")),
    ))  # fmt: skip
    for address, port, expected in (
        ("203.0.113.63", 80, True), ("203.0.113.64", 80, False), ("203.0.113.127", 81, False),
        ("203.0.113.128", 81, True), ("203.0.113.200", 22, True), ("203.0.113.201", 22, False),
        ("203.0.113.1", 82, False), ("198.51.100.9", 5000, True), ("198.51.101.0", 5000, False), ("::1", 80, False),
    ):  # fmt: skip
        assert found.allows(ip_address(address), port) is expected, address
    ranges = [(one.first, one.last, one.first_port, one.last_port) for one in found.openings]
    assert ranges == sorted(ranges)
    for index, one in enumerate(found.openings):
        for other in found.openings[index + 1 :]:
            apart = one.last < other.first or other.last < one.first
            assert apart or one.last_port < other.first_port or other.last_port < one.first_port


def test_names_resolve_only_for_who_may_ask() -> None:
    narrow = compiled(Contract(grants=(Grant("example.org", (443,)), Grant("*.wild.org"), Grant("192.0.2.0/24"))))
    assert narrow.ports_of("EXAMPLE.org.") == frozenset({443})
    assert narrow.ports_of("a.b.wild.org") is None
    assert (
        narrow.ports_of("wild.org")
        == narrow.ports_of("evilwild.org")
        == narrow.ports_of("x.example.org")
        == frozenset()
    )
    assert not narrow.every_name
    assert compiled(OPEN).every_name


def test_a_contract_of_too_many_ranges_is_refused() -> None:
    networks = tuple(f"10.{number}.0.0/24" for number in range(256))
    with pytest.raises(InvalidRequest, match=f"more than {MAX_OPENINGS}"):
        compiled(Contract(allowed_cidrs=networks, allowed_ports=tuple(range(1, 128, 2))))


def test_a_rate_is_a_packet_at_least() -> None:
    assert RateLimit(bytes_per_s=1500).bytes_per_s == 1500
