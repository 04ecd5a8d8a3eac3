"""One entry of the audit log, its canonical form and its place in the chain of hashes."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec

from tartarus.model.audit import FIRST_HASH, AuditEntry, Written

MAX_LINE = 64 * 1024
"""Bytes. The caps below keep every line under it, whatever its texts hold: JSON takes six bytes for a character."""
MAX_TEXT = 1024
MAX_NAME = 256
MAX_RULES = 32
MAX_RULE = 128
_LONG = frozenset({"reason", "summary"})
_MOST = 2**53 - 1  # the largest whole number that RFC 8785 has
_encoder = msgspec.json.Encoder(order="sorted")


class _Body(AuditEntry, frozen=True):
    """What an entry's hash is of: all but itself."""

    sequence: int = 0
    time_ms: int = 0
    previous: str = FIRST_HASH


_FIELDS = AuditEntry.__struct_fields__
_BODY_FIELDS = _Body.__struct_fields__


def digest_of(value: object) -> str:
    """SHA-256, in hexadecimal, of what an entry names and does not hold: of its JSON with sorted keys."""
    return hashlib.sha256(_encoder.encode(value)).hexdigest()


def place(entry: AuditEntry, sequence: int, time_ms: int, previous: str) -> Written:
    """The entry in its place, with its hash: SHA-256 of the canonical form (RFC 8785) of all but the hash itself."""
    values: dict[str, Any] = {name: _cut(name, getattr(entry, name)) for name in _FIELDS}
    body = _Body(**values, sequence=sequence, time_ms=time_ms, previous=previous)
    return Written(**values, sequence=sequence, time_ms=time_ms, previous=previous, hash=_digest(body))


def hash_of(written: Written) -> str:
    """What the entry's hash must be."""
    return _digest(_Body(**{name: getattr(written, name) for name in _BODY_FIELDS}))


def line_of(written: Written) -> bytes:
    """The entry as the log keeps it: one line of canonical JSON."""
    return _encoder.encode(written) + b"\n"


def read_line(line: bytes) -> Written:
    """The entry of a line. Raises msgspec.MsgspecError, and ValueError for a line that is not in canonical form."""
    written = msgspec.json.decode(line, type=Written)
    if line_of(written).rstrip(b"\n") != line.rstrip(b"\n"):
        raise ValueError("not in canonical form")
    return written


def _digest(body: _Body) -> str:
    # Sorted keys without spaces are RFC 8785 as long as names are ASCII and numbers whole; a test holds us to it.
    return hashlib.sha256(_encoder.encode(body)).hexdigest()


def _cut(name: str, value: Any) -> Any:
    if isinstance(value, str):
        return _text(value, MAX_TEXT if name in _LONG else MAX_NAME)
    if isinstance(value, int):
        return max(0, min(value, _MOST))
    return tuple(_text(rule, MAX_RULE) for rule in value[:MAX_RULES])


def _text(value: str, most: int) -> str:
    if len(value) <= most and value.isascii():
        return value
    # A lone surrogate has no form in UTF-8, and an entry must not fail to be written for it.
    return value[:most].encode("utf-8", "replace").decode()
