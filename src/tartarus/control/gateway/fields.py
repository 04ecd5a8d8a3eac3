"""Which header fields pass between a caller and a sandbox's port, and as what.

Callers' credentials are for the API, so the guest gets none of them; a guest's answers come from the API's origin, so
they must not set its cookies, ask for its passwords, lift its restrictions, or lead a client on to another of its
paths. What is for the guest itself has a name of its own: ``tartarus-guest-authorization`` and
``tartarus-guest-cookie`` reach it without their prefix, and its ``set-cookie`` comes back with it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from urllib.parse import unquote, urljoin, urlsplit

Fields = list[tuple[bytes, bytes]]
GUEST = b"tartarus-guest-"
_OURS = b"tartarus-"
_HOP_BY_HOP = frozenset(
    {
        b"connection", b"keep-alive", b"proxy-connection", b"proxy-authenticate", b"proxy-authorization", b"te",
        b"trailer", b"transfer-encoding", b"upgrade", b"http2-settings",
    }
)  # fmt: skip
_OF_THE_CALLER = frozenset({b"authorization", b"cookie", b"host", b"expect", b"forwarded", b"referer"})
_TO_THE_GUEST = frozenset({b"authorization", b"cookie"})
_FRAMING = frozenset({b"content-length"})
_OF_A_SOCKET = b"sec-websocket-"
_NOT_FOR_THE_ORIGIN = frozenset(
    {
        b"alt-svc", b"clear-site-data", b"content-location", b"expect-ct", b"link", b"nel", b"origin-agent-cluster",
        b"public-key-pins", b"public-key-pins-report-only", b"referrer-policy", b"report-to", b"reporting-endpoints",
        b"service-worker-allowed", b"set-cookie2", b"sourcemap", b"strict-transport-security",
        b"x-content-type-options",
    }
)  # fmt: skip
_NAMED_ANEW = frozenset({b"location", b"refresh", b"set-cookie", b"www-authenticate"})
_ADDED: Fields = [
    # A page of a guest has an origin of its own, which no cookie, storage or open page of the API's is in reach of.
    (b"content-security-policy", b"sandbox allow-downloads allow-forms allow-modals allow-popups allow-scripts"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]
_PLAIN = re.compile(r"[!-\[\]-~]+")
_DOTS = frozenset({".", ".."})


def to_guest(fields: Iterable[tuple[bytes, bytes]], *, host: str, prefix: str, scheme: str) -> Fields:
    """A request's fields as the guest gets them; what frames a body is the sender's to add.

    `host` and `prefix`: what the guest is at its own loopback, and where the caller sees it.
    """
    given = [(name.lower(), value) for name, value in fields]
    named = _named_by_connection(given)
    passed: Fields = [(b"host", host.encode()), (b"x-forwarded-prefix", prefix.encode())]
    passed.append((b"x-forwarded-proto", scheme.encode()))
    for name, value in given:
        if name == b"host":
            passed.append((b"x-forwarded-host", value))
        elif name.startswith(GUEST) and name.removeprefix(GUEST) in _TO_THE_GUEST:
            passed.append((name.removeprefix(GUEST), value))
        elif not (
            name in _HOP_BY_HOP or name in named or name in _OF_THE_CALLER or name in _FRAMING
            or name.startswith((_OURS, b"x-forwarded-", _OF_A_SOCKET))
        ):  # fmt: skip
            passed.append((name, value))
    return passed


def from_guest(fields: Iterable[tuple[bytes, bytes]], *, port: int, asked: str, prefix: str, has_body: bool) -> Fields:
    """An answer's fields as the caller gets them; `asked` is the path that the guest was asked for.

    Its length is passed on for an answer that has a body, unless the body came in chunks: then that says where it ends.
    """
    given = [(name.lower(), value) for name, value in fields]
    named = _named_by_connection(given)
    has_length = has_body and all(name != b"transfer-encoding" for name, _ in given)
    passed: Fields = [(b"tartarus-port", str(port).encode()), *_ADDED]
    for name, value in given:
        moved = _moved(value, asked, prefix, port) if name == b"location" else None
        if moved is not None:
            passed.append((name, moved))
        elif name in _NAMED_ANEW:
            passed.append((GUEST + name, value))
        elif name in _FRAMING:
            if has_length:
                passed.append((name, value))
        elif not (
            name in _HOP_BY_HOP or name in named or name in _NOT_FOR_THE_ORIGIN
            or name.startswith((_OURS, b"access-control-", _OF_A_SOCKET))
        ):  # fmt: skip
            passed.append((name, value))
    return passed


def located(location: str, asked: str, prefix: str, port: int) -> str | None:
    """Where a guest's redirection leads to below `prefix`; None if it leads anywhere else, or is not plain.

    A client that follows it does so with its own rights at the API: a way out of the prefix would be the guest's to
    use them. What some clients read as a step upwards, as ``%2e%2e`` or a backslash, is not plain.
    """
    if not _PLAIN.fullmatch(location):
        return None
    own = f"localhost:{port}"
    try:
        there = urlsplit(urljoin(f"http://{own}{asked}", location))
    except ValueError:
        return None
    if there.scheme != "http" or there.netloc not in {own, f"127.0.0.1:{port}", *(["localhost"] if port == 80 else [])}:
        return None
    if any(unquote(part) in _DOTS for part in there.path.split("/")):
        return None
    query, fragment = there.query and f"?{there.query}", there.fragment and f"#{there.fragment}"
    return f"{prefix}{there.path or '/'}{query}{fragment}"


def _moved(value: bytes, asked: str, prefix: str, port: int) -> bytes | None:
    moved = located(value.decode("latin-1"), asked, prefix, port)
    return None if moved is None else moved.encode("ascii")


def _named_by_connection(fields: Fields) -> frozenset[bytes]:
    return frozenset(_tokens(value for name, value in fields if name == b"connection"))


def _tokens(values: Iterable[bytes]) -> Iterator[bytes]:
    for value in values:
        yield from (token.strip().lower() for token in value.split(b","))
