"""Names and HTTP heads as sandboxes write them: what they mean, said in one way only. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable
from ipaddress import AddressValueError, IPv4Address
from typing import NamedTuple

# Sans-I/O, and strict: it refuses two Hosts and Content-Lengths that differ, and never writes what splits a message.
import h11

from tartarus.model.contract import MAX_PORT
from tartarus.network.egress.refusal import Refusal

_NAME = re.compile(rb"(?=.{1,254}$)(?:(?!-)[A-Za-z0-9_-]{1,63}(?<!-)\.)+(?!-)[A-Za-z0-9_-]{1,63}(?<!-)\.?")
# What resolvers take for an address, though it is not written like one: 127.1, 2130706433, 0x7f.1.
_NUMBER = re.compile(rb"(?:0[xX][0-9a-fA-F]*|[0-9]+)\.?")
_PORT = re.compile(rb"[0-9]{1,5}")
_SCHEMES = {b"http": 80, b"https": 443}
_VERSIONS = frozenset({b"1.0", b"1.1"})
_SHOWS_HEADERS = frozenset({b"TRACE", b"TRACK", b"DEBUG"})
# Of one hop (RFC 9110, 7.6.1), and what is meant for proxies. Upgrades among them: they end HTTP.
_OF_ONE_HOP = frozenset({
    b"connection", b"keep-alive", b"proxy-connection", b"proxy-authenticate", b"proxy-authorization",
    b"proxy-authentication-info", b"te", b"trailer", b"transfer-encoding", b"upgrade", b"http2-settings", b"alt-svc",
})  # fmt: skip
Headers = list[tuple[bytes, bytes]]


class Target(NamedTuple):
    """Whom a request is for. `path`: in origin form; empty for CONNECT."""

    name: str
    port: int
    path: bytes


def read_name(text: bytes) -> str:
    """A domain as it is compared. Raises Refusal for an address, and for letters that DNS does not have."""
    if not _NAME.fullmatch(text) or _NUMBER.fullmatch(text.removesuffix(b".").rpartition(b".")[2]):
        raise Refusal("malformed")
    return text.decode("ascii").lower().removesuffix(".")


def read_host(text: bytes) -> str:
    """A domain, or an IPv4 address in its usual writing."""
    try:
        return str(IPv4Address(text.decode("ascii", "replace")))
    except AddressValueError:
        return read_name(text)


def read_authority(text: bytes, port: int | None) -> tuple[str, int]:
    """A host and its port; `port` where it names none, which is malformed if that is None."""
    host, colon, number = text.partition(b":")
    if not colon:
        if port is None:
            raise Refusal("malformed")
        return read_host(host), port
    if not _PORT.fullmatch(number) or not 0 < int(number) <= MAX_PORT:
        raise Refusal("malformed")
    return read_host(host), int(number)


def target_of(request: h11.Request, port: int | None) -> Target:
    """Whom a request is for. `port`: where it was led here from; None when the proxy itself was asked."""
    if request.http_version not in _VERSIONS:
        raise Refusal("protocol")
    if request.method.upper() in _SHOWS_HEADERS:
        raise Refusal("credential")
    hosts = [value for name, value in request.headers if name == b"host"]
    fields = [name for name, _ in request.headers]
    if fields.count(b"transfer-encoding") + fields.count(b"content-length") > 1:
        raise Refusal("malformed")
    if request.method == b"CONNECT":
        if port is not None or b"transfer-encoding" in fields or b"content-length" in fields:
            raise Refusal("protocol" if port is not None else "malformed")
        name, number = read_authority(request.target, None)
        if hosts and read_authority(hosts[0], number) != (name, number):
            raise Refusal("mismatch")
        return Target(name, number, b"")
    if not hosts:
        raise Refusal("no_name")
    if request.target.startswith(b"/") or request.target == b"*":
        if port is None:
            raise Refusal("malformed")
        name, said = read_authority(hosts[0], port)
        if said != port:
            raise Refusal("mismatch")
        return Target(name, port, request.target)
    scheme, separator, rest = request.target.partition(b"://")
    usual = _SCHEMES.get(scheme.lower())
    if not separator or usual is None:
        raise Refusal("malformed")
    end = min((at for mark in (b"/", b"?") if (at := rest.find(mark)) >= 0), default=len(rest))
    name, number = read_authority(rest[:end], usual)
    if read_authority(hosts[0], usual) != (name, number) or port not in {None, number}:
        raise Refusal("mismatch")
    if b"#" in rest:
        raise Refusal("malformed")
    path = rest[end:]
    return Target(name, number, path if path.startswith(b"/") else b"/" + path)


def is_secure(request: h11.Request) -> bool:
    """Whether a proxy is asked for ``https://…``, which it would have to open itself."""
    return request.target[:8].lower() == b"https://"


def forwarded(headers: Iterable[tuple[bytes, bytes]], *, body: bool) -> Headers:
    """Headers that go on. `body`: how long the body is is said in its headers, and goes on too."""
    found = list(headers)
    named = {
        token.strip().lower() for name, value in found if name == b"connection" for token in value.split(b",")
    } - {b"host", b"content-length"}  # fmt: skip
    kept = [(name, value) for name, value in found if name not in _OF_ONE_HOP and name not in named]
    chunked = any(name == b"transfer-encoding" for name, _ in found)
    if chunked:
        kept = [(name, value) for name, value in kept if name != b"content-length"]
    return [*kept, (b"transfer-encoding", b"chunked")] if chunked and body else kept


def without(headers: Headers, *names: bytes) -> Headers:
    """All but those of these names, in small letters."""
    return [(name, value) for name, value in headers if name not in names]
