"""What the resolver makes of questions and answers, without a network."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address
from typing import Any

import dns.edns
import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdatatype
import dns.rrset
import dns.tsigkeyring
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tartarus.network import names
from tartarus.network.destinations import HostNetworks

NETWORKS = HostNetworks(host=(IPv4Network("203.0.113.9/32"),), neighbours=(IPv4Network("192.0.2.0/24"),))
refuses = NETWORKS.refuses


def question(name: str, kind: str = "A", **options: Any) -> names.Question:
    found = names.read_question(dns.message.make_query(name, kind, **options).to_wire())
    assert found is not None
    return found


def answer(asked: names.Question, *records: str) -> dns.message.Message:
    response: dns.message.Message = dns.message.make_response(asked.message, recursion_available=True)
    for record in records:
        name, kind, data = record.split(" ", 2)
        response.answer.append(dns.rrset.from_text(f"{name}.", 60, "IN", kind, data))
    return response


def hostile_queries() -> dict[str, bytes]:
    plain = dns.message.make_query("public.example", "A")
    wire = plain.to_wire()
    response = dns.message.make_response(plain)
    two = dns.message.make_query("public.example", "A")
    two.question.append(dns.rrset.from_text("other.example.", 0, "IN", "A"))
    stuffed = dns.message.make_query("public.example", "A")
    stuffed.answer.append(dns.rrset.from_text("public.example.", 60, "IN", "A", "203.0.113.80"))
    signed = dns.message.make_query("public.example", "A")
    signed.use_tsig(dns.tsigkeyring.from_text({"key.": "c2VjcmV0"}), "key.")
    update = dns.message.make_query("public.example", "A")
    update.set_opcode(5)  # type: ignore[arg-type]
    loop = wire[:12] + b"\xc0\x0c" + wire[-4:]
    return {
        "nothing": b"", "a byte": b"x", "a header": wire[:12], "cut short": wire[:-3], "trailing": wire + b"tail",
        "a response": response.to_wire(), "two questions": two.to_wire(), "an answer in it": stuffed.to_wire(),
        "signed": signed.to_wire(), "an update": update.to_wire(), "a name that points at itself": loop,
        "a name that points ahead": wire[:12] + b"\xc0\xff" + wire[-4:], "long": wire + bytes(600),
        "any": dns.message.make_query("public.example", "ANY").to_wire(),
        "a zone": dns.message.make_query("public.example", "AXFR").to_wire(),
        "another class": dns.message.make_query("version.bind", "TXT", "CH").to_wire(),
        "counts that lie": wire[:4] + b"\xff\xff\xff\xff\xff\xff\xff\xff" + wire[12:],
        "a label too long": wire[:12] + b"\x50" + b"a" * 80 + b"\0" + wire[-4:],
        "only zeros": bytes(64), "only ones": b"\xff" * 64,
    }  # fmt: skip


@pytest.mark.parametrize("what", list(hostile_queries()))
def test_what_is_not_one_plain_question_gets_no_answer(what: str) -> None:
    assert names.read_question(hostile_queries()[what]) is None


@settings(deadline=None)
@given(st.binary(max_size=600))
def test_no_packet_breaks_it(packet: bytes) -> None:
    found = names.read_question(packet)
    assert found is None or found.to_upstream().to_wire()


@settings(deadline=None)
@given(st.data())
def test_nor_does_a_damaged_one(data: st.DataObject) -> None:
    name = ".".join(data.draw(st.lists(st.from_regex(r"\A[a-z0-9]{1,20}\Z"), min_size=1, max_size=6)))
    wire = bytearray(dns.message.make_query(name, "A", use_edns=0, payload=4096).to_wire())
    for _ in range(data.draw(st.integers(1, 4))):
        wire[data.draw(st.integers(0, len(wire) - 1))] = data.draw(st.integers(0, 255))
    found = names.read_question(bytes(wire))
    if found is None:
        return
    names.is_private_name(found, refuses)
    assert len(names.to_datagram(found, names.failure(found, dns.rcode.SERVFAIL))) <= names.UDP_BYTES
    assert found.to_upstream().id is not None


def test_what_goes_on_is_the_question_and_nothing_else() -> None:
    client = dns.message.make_query("Public.Example", "A", use_edns=0, payload=4096)
    client.use_edns(
        0, options=[dns.edns.ECSOption("10.1.2.0", 24), dns.edns.GenericOption(dns.edns.OptionType(65001), b"covert")]
    )
    asked = names.read_question(client.to_wire())
    assert asked is not None
    upstream = asked.to_upstream()
    assert b"covert" not in upstream.to_wire()
    assert upstream.options == ()
    assert upstream.question == client.question
    assert upstream.payload == names.UDP_BYTES
    assert len({asked.to_upstream().id for _ in range(8)}) > 1


@pytest.mark.parametrize(
    "name",
    [
        "printer", "localhost", "x.localhost", "printer.local", "a.b.internal", "metadata.google.internal",
        "nas.home.arpa", "router.lan", "hidden.onion", "x.invalid", "wiki.corp", "COM",
        "1.0.0.10.in-addr.arpa", "10.in-addr.arpa", "254.169.254.169.in-addr.arpa", "168.192.in-addr.arpa",
        "50.2.0.192.in-addr.arpa", "9.113.0.203.in-addr.arpa", "x.y.in-addr.arpa", "in-addr.arpa",
        "300.1.1.1.in-addr.arpa", "1.0.0.0.ip6.arpa", ".",
    ],
)  # fmt: skip
def test_names_of_private_places_are_not_asked_for(name: str) -> None:
    assert names.is_private_name(question(name, "PTR" if "arpa" in name else "A"), refuses)


@pytest.mark.parametrize("name", ["public.example", "a.b.c.d.e", "local.example", "80.113.0.203.in-addr.arpa"])
def test_other_names_are(name: str) -> None:
    assert not names.is_private_name(question(name), refuses)


@pytest.mark.parametrize(
    "record",
    [
        "a.example A 10.0.0.1", "a.example A 127.0.0.1", "a.example A 169.254.169.254", "a.example A 0.0.0.0",
        "a.example A 100.64.0.1", "a.example A 224.0.0.1", "a.example A 192.0.2.7", "a.example A 203.0.113.9",
        "other.example A 192.168.1.1", "a.example AAAA ::1", "a.example AAAA fd00:ec2::254",
        "a.example AAAA fe80::1", "a.example AAAA ::ffff:10.0.0.1", "a.example AAAA 64:ff9b::a00:1",
        "a.example AAAA 2002:a00:1::", "a.example HTTPS 1 . ipv4hint=10.0.0.1",
        "a.example SVCB 1 b.example. ipv6hint=fc00::1",
    ],
)  # fmt: skip
def test_answers_that_point_inside_are_found(record: str) -> None:
    asked = question("a.example")
    harmless = "b.example A 203.0.113.80"
    assert len(names.closed_addresses(answer(asked, harmless, record, harmless), refuses)) == 1


def test_answers_that_point_outside_are_told() -> None:
    asked = question("a.example")
    given_answer = answer(asked, "a.example CNAME b.example.", "b.example A 203.0.113.80", "b.example AAAA 2600::1")
    assert names.closed_addresses(given_answer, refuses) == []
    told = dns.message.from_wire(names.to_datagram(asked, names.reply(asked, given_answer)))
    assert told.id == asked.message.id
    assert told.answer == given_answer.answer
    assert told.edns == -1


def test_only_the_answer_and_what_dates_a_negative_one_are_told() -> None:
    asked = question("a.example")
    given_answer = answer(asked)
    given_answer.authority = [
        dns.rrset.from_text("example.", 60, "IN", "SOA", "ns.example. h.example. 1 2 3 4 5"),
        dns.rrset.from_text("example.", 60, "IN", "NS", "ns.internal.example."),
    ]
    given_answer.additional = [dns.rrset.from_text("ns.internal.example.", 60, "IN", "A", "10.0.0.1")]
    told = names.reply(asked, given_answer)
    assert [rrset.rdtype for rrset in told.authority] == [dns.rdatatype.SOA]
    assert told.additional == []


@pytest.mark.parametrize(("payload", "cut"), [(None, True), (512, True), (1232, False), (4096, False)])
def test_a_long_answer_is_cut_to_what_was_said_to_fit(payload: int | None, cut: bool) -> None:
    options: dict[str, Any] = {} if payload is None else {"use_edns": 0, "payload": payload}
    asked = question("a.example", **options)
    given_answer = answer(asked, *(f"a.example TXT {'x' * 200}{number}" for number in range(4)))
    datagram = names.to_datagram(asked, names.reply(asked, given_answer))
    assert len(datagram) <= max(payload or 0, 512)
    told = dns.message.from_wire(datagram)
    assert bool(told.flags & dns.flags.TC) is cut
    assert bool(told.answer) is not cut


def test_nothing_longer_than_a_packet_is_sent_over_udp() -> None:
    """Whatever a sandbox claims to take: an answer may not be many times its question."""
    asked = question("a.example", use_edns=0, payload=65535)
    given_answer = answer(asked, *(f"a.example TXT {'x' * 200}{number}" for number in range(40)))
    assert len(names.to_datagram(asked, names.reply(asked, given_answer))) < 100


@settings(deadline=None)
@given(st.ip_addresses(v=4))
def test_an_address_is_refused_exactly_where_the_rules_refuse_it(address: IPv4Address) -> None:
    inside = any(
        address in IPv4Network(text)
        for text in (
            "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12",
            "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "203.0.113.9/32",
            "168.63.129.16/32", "224.0.0.0/3",
        )
    )  # fmt: skip
    assert bool(refuses(address)) is inside


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_no_closed_address_passes_inside_another_family(number: int) -> None:
    inner = IPv4Address(number)
    mapped = IPv6Address(b"\0" * 10 + b"\xff\xff" + inner.packed)
    assert refuses(mapped)
    assert refuses(IPv6Address(b"\x20\x02" + inner.packed + bytes(10)))
