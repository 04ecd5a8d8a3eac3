"""One entry of the audit log, its canonical form and its place in the chain of hashes."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec

FIRST_HASH = "0" * 64
"""What the first entry of a log names as the hash before it."""
MAX_TEXT = 1024
_MOST = 2**53 - 1  # the largest whole number that RFC 8785 has
_encoder = msgspec.json.Encoder(order="sorted")


class AuditEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is written down. Texts are sanitised by whoever writes it, and cut here at 1,024 characters.

    `actor`: who, as authenticated. `action` is a dotted name (``sandbox.create``), `target` an id. `decision`:
    ``allow``, ``deny``, ``require_review``, ``error`` or nothing where nothing was decided; `rules`: the ids that led
    there. `input_digest`, `output_digest`: SHA-256 of what is not written down itself.
    """

    actor: str
    tenant: str
    action: str
    target: str = ""
    decision: str = ""
    rules: tuple[str, ...] = ()
    reason: str = ""
    input_digest: str = ""
    output_digest: str = ""
    summary: str = ""
    duration_us: int = 0
    sandbox: str = ""
    trace: str = ""


class Written(AuditEntry, frozen=True):
    """An entry in its place. `sequence` from 0, `time_ms` in milliseconds since 1970 (UTC), hashes in hexadecimal."""

    sequence: int = 0
    time_ms: int = 0
    previous: str = FIRST_HASH
    hash: str = ""


class _Body(AuditEntry, frozen=True):
    """What an entry's hash is of: all but itself."""

    sequence: int = 0
    time_ms: int = 0
    previous: str = FIRST_HASH


_FIELDS = AuditEntry.__struct_fields__
_BODY_FIELDS = _Body.__struct_fields__


def place(entry: AuditEntry, sequence: int, time_ms: int, previous: str) -> Written:
    """The entry in its place, with its hash: SHA-256 of the canonical form (RFC 8785) of all but the hash itself."""
    values: dict[str, Any] = {name: _cut(getattr(entry, name)) for name in _FIELDS}
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


def _cut(value: object) -> object:
    if isinstance(value, str):
        # A lone surrogate has no form in UTF-8, and an entry must not fail to be written for it.
        return value[:MAX_TEXT].encode("utf-8", "replace").decode()
    if isinstance(value, int):
        return max(0, min(value, _MOST))
    return tuple(map(_cut, value)) if isinstance(value, tuple) else value
