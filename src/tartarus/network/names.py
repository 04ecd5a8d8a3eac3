"""What the node's resolver thinks of a question and of an answer: decisions about DNS messages, no input or output."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv4Network, IPv6Address, ip_address
from typing import NamedTuple

# Well kept, and hardened by years of hostile packets: name compression, EDNS and every type's wire form are its work.
import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.opcode
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.rdtypes.svcbbase

MAX_QUERY_BYTES = 512
UDP_BYTES = 1232
"""What fits one packet on every path (the DNS flag day 2020's figure): what we ask for and the most that we send."""
_PLAIN_UDP_BYTES = 512  # RFC 1035, for who does not say more
_LABELS_OF_A_NAME = 3  # two, and the root

# Names of private places (RFC 6761, 6762, 7686, 8375, ICANN's .internal), which the host's own resolver may know.
_PRIVATE_ZONES = tuple(
    dns.name.from_text(zone)
    for zone in ("local", "localhost", "internal", "home.arpa", "onion", "invalid", "lan", "home", "corp", "intranet")
)
_REVERSE = dns.name.from_text("in-addr.arpa")
_REVERSE_6 = dns.name.from_text("ip6.arpa")

Refuses = Callable[[IPv4Address | IPv6Address], str]
"""The reason why sandboxes may not reach an address, or nothing."""


class Question(NamedTuple):
    """A sandbox's question as it came, and how long a reply over UDP may be, in bytes."""

    message: dns.message.QueryMessage
    reply_bytes: int

    @property
    def name(self) -> dns.name.Name:
        """The name it is about."""
        return self.message.question[0].name

    @property
    def leads_past_the_proxy(self) -> bool:
        """Whether it asks for what the egress proxy does not carry: HTTP/3 and hidden names (RFC 9460), and IPv6."""
        return self.message.question[0].rdtype in {dns.rdatatype.HTTPS, dns.rdatatype.SVCB, dns.rdatatype.AAAA}

    def to_upstream(self) -> dns.message.QueryMessage:
        """The same question in our own words and with a fresh id: nothing else of a sandbox's packet goes on."""
        query = dns.message.make_query(
            self.name, self.message.question[0].rdtype, use_edns=0, payload=UDP_BYTES,
            want_dnssec=bool(self.message.ednsflags & dns.flags.DO),
        )  # fmt: skip
        query.flags |= self.message.flags & dns.flags.CD
        return query


def read_question(packet: bytes) -> Question | None:
    """The question in a sandbox's packet; None for anything but one plain question, which gets no answer."""
    if len(packet) > MAX_QUERY_BYTES:
        return None
    try:
        message = dns.message.from_wire(packet, ignore_trailing=False)
    except (dns.exception.DNSException, ValueError):
        return None
    if not isinstance(message, dns.message.QueryMessage) or message.flags & dns.flags.QR:
        return None
    if message.opcode() != dns.opcode.QUERY or len(message.question) != 1 or message.answer or message.authority:
        return None
    question = message.question[0]
    if question.rdclass != dns.rdataclass.IN or dns.rdatatype.is_metatype(question.rdtype):
        return None  # ANY and zone transfers among them
    size = message.payload if message.edns >= 0 else 0
    return Question(message, min(max(size, _PLAIN_UDP_BYTES), UDP_BYTES))


def is_private_name(question: Question, refuses: Refuses) -> bool:
    """Whether only a private network could answer: its names, its addresses' names, and names without a dot."""
    name = question.name
    if name.is_subdomain(_REVERSE):
        network = _reversed_network(name)
        return network is None or bool(refuses(network.network_address) or refuses(network.broadcast_address))
    if len(name) < _LABELS_OF_A_NAME or name.is_subdomain(_REVERSE_6):
        return True
    return any(name.is_subdomain(zone) for zone in _PRIVATE_ZONES)


def _reversed_network(name: dns.name.Name) -> IPv4Network | None:
    labels = [label.decode("ascii", "replace") for label in name.relativize(_REVERSE).labels]
    if not 1 <= len(labels) <= 4:
        return None
    octets = labels[::-1]
    try:
        return IPv4Network((".".join(octets + ["0"] * (4 - len(octets))), 8 * len(octets)))
    except ValueError:
        return None


def closed_addresses(answer: dns.message.Message, refuses: Refuses) -> list[str]:
    """The addresses in an answer that sandboxes may not reach: whoever owns the name points it there."""
    return [str(address) for address in _addresses(answer) if refuses(address)]


def _addresses(answer: dns.message.Message) -> Iterator[IPv4Address | IPv6Address]:
    for rrset in answer.answer:
        for rdata in rrset:
            if rrset.rdtype in {dns.rdatatype.A, dns.rdatatype.AAAA}:
                yield ip_address(rdata.address)
            elif isinstance(rdata, dns.rdtypes.svcbbase.SVCBBase):
                for hint in rdata.params.values():
                    for text in getattr(hint, "addresses", ()):
                        yield ip_address(text)


def addresses_to_open(answer: dns.message.Message) -> list[IPv4Address | IPv6Address]:
    """The addresses that an answer gives a name; those that only hint at where else it is are not among them."""
    found = [
        ip_address(rdata.address)
        for rrset in answer.answer if rrset.rdtype in {dns.rdatatype.A, dns.rdatatype.AAAA}
        for rdata in rrset
    ]  # fmt: skip
    return list(dict.fromkeys(found))


def bound_ttl(answer: dns.message.Message, least_s: int, most_s: int) -> int:
    """Bring the times of an answer's records between these, all to the shortest of them; in seconds."""
    ttl = min((rrset.ttl for rrset in answer.answer), default=least_s)
    ttl = min(max(ttl, least_s), most_s)
    for rrset in answer.answer:
        rrset.ttl = ttl
    return ttl


def reply(question: Question, answer: dns.message.Message) -> dns.message.Message:
    """What the sandbox is told of a server's answer: the answer, and of the rest only what dates a negative one."""
    response = _response(question)
    response.flags |= answer.flags & (dns.flags.RA | dns.flags.AD | dns.flags.TC)
    response.set_rcode(answer.rcode())
    response.answer = answer.answer
    response.authority = [rrset for rrset in answer.authority if rrset.rdtype == dns.rdatatype.SOA]
    return response


def failure(question: Question, rcode: dns.rcode.Rcode) -> dns.message.Message:
    """An answer without an answer."""
    response = _response(question)
    response.set_rcode(rcode)
    return response


def to_datagram(question: Question, response: dns.message.Message) -> bytes:
    """A reply's bytes for UDP: cut to nothing but "ask over TCP" where it is too long."""
    wire = response.to_wire(max_size=65535)
    if len(wire) <= question.reply_bytes:
        return wire
    short = _response(question)
    short.flags |= dns.flags.TC | dns.flags.RA
    return short.to_wire()


def _response(question: Question) -> dns.message.Message:
    response = dns.message.make_response(question.message, recursion_available=True, our_payload=UDP_BYTES)
    response.question = question.message.question
    return response
