"""The statements, built once, and the way from rows to records. Synchronous: they run in the store's threads."""

from __future__ import annotations

import base64
import binascii
import math
import struct
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import msgspec
from sqlalchemy import and_, bindparam, delete, exists, literal, or_, select
from sqlalchemy import insert as insert_into
from sqlalchemy import update as update_of

from tartarus.model.errors import InvalidRequest
from tartarus.model.sandbox import Isolation, Reason, SandboxRecord, SandboxSpec
from tartarus.model.states import State
from tartarus.store.schema import sandbox_labels, sandboxes

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection, Row

# A prefix shorter than this would fit many sandboxes by chance.
MIN_PREFIX = len("sbx-") + 4
_FIELDS = SandboxRecord.__struct_fields__
_CHANGING = [name for name in _FIELDS if name not in {"id", "tenant", "spec", "created_at"}]
_columns = [sandboxes.c[name] for name in _FIELDS]
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(SandboxSpec).decode

_by_id = select(*_columns).where(sandboxes.c.id == bindparam("id"))
_insert = insert_into(sandboxes)
_insert_label = insert_into(sandbox_labels)
_live_name = (
    select(literal(1))
    .where(sandboxes.c.tenant == bindparam("tenant"), sandboxes.c.name == bindparam("name"))
    .where(sandboxes.c.name != "", sandboxes.c.ended_at.is_(None))
)
_alive = select(*_columns).where(sandboxes.c.ended_at.is_(None)).order_by(sandboxes.c.created_at)
_recent = (
    select(*_columns)
    .where(sandboxes.c.created_at >= bindparam("since"))
    .order_by(sandboxes.c.created_at.desc())
    .limit(bindparam("most"))
)
_prune = delete(sandboxes).where(sandboxes.c.ended_at < bindparam("before"))
_by_name = (
    select(*_columns)
    .where(sandboxes.c.tenant == bindparam("tenant"), sandboxes.c.name == bindparam("name"))
    .order_by(sandboxes.c.ended_at.is_(None).desc(), sandboxes.c.created_at.desc(), sandboxes.c.id.desc())
    .limit(1)
)
_by_prefix = (
    select(*_columns)
    .where(sandboxes.c.id >= bindparam("low"), sandboxes.c.id < bindparam("high"))
    .where(sandboxes.c.tenant == bindparam("tenant"))
    .limit(2)
)
_update = (
    update_of(sandboxes)
    .where(sandboxes.c.id == bindparam("id_"), sandboxes.c.version == bindparam("version_"))
    .values({name: bindparam(name) for name in _CHANGING})
)


class Filter(msgspec.Struct, frozen=True):
    """What a listing is narrowed to; None and empty mean any."""

    tenant: str
    states: Collection[State] | None
    labels: Mapping[str, str]
    name: str | None


def insert(connection: Connection, record: SandboxRecord) -> None:
    """Add a record and its labels."""
    connection.execute(_insert, _row(record))
    if record.spec.labels:
        rows = [{"sandbox_id": record.id, "key": key, "value": value} for key, value in record.spec.labels.items()]
        connection.execute(_insert_label, rows)


def update(connection: Connection, current: SandboxRecord, moved: SandboxRecord) -> bool:
    """Replace `current` by `moved`, if it is still the current one: each change raises the version."""
    row = {name: getattr(moved, name) for name in _CHANGING} | _words(moved)
    return connection.execute(_update, {**row, "id_": current.id, "version_": current.version}).rowcount == 1


def by_id(connection: Connection, sandbox_id: str) -> SandboxRecord | None:
    """The record of that full id, whoever's it is."""
    return _record(connection.execute(_by_id, {"id": sandbox_id}).first())


def live_name_taken(connection: Connection, tenant: str, name: str) -> bool:
    """Whether a sandbox of the tenant that has not ended bears the name."""
    return connection.execute(_live_name, {"tenant": tenant, "name": name}).first() is not None


def find(connection: Connection, tenant: str, id_or_name: str) -> SandboxRecord | None:
    """By id, then name (live before ended, then newest), then unique id prefix."""
    if not id_or_name:  # what a sandbox without a name would match
        return None
    if not id_or_name.startswith("sbx-"):
        return _record(connection.execute(_by_name, {"tenant": tenant, "name": id_or_name}).first())
    record = by_id(connection, id_or_name)
    if record is not None:
        return record if record.tenant == tenant else None
    if len(id_or_name) < MIN_PREFIX:
        return None
    bounds = {"tenant": tenant, "low": id_or_name, "high": id_or_name + "\x7f"}
    fitting = connection.execute(_by_prefix, bounds).all()
    if len(fitting) > 1:
        raise InvalidRequest(f"{id_or_name!r} fits several sandboxes", fix="give more characters of the id")
    return _record(fitting[0]) if fitting else None


def page(
    connection: Connection, wanted: Filter, limit: int, cursor: str | None
) -> tuple[list[SandboxRecord], str | None]:
    """One page, newest first, and the cursor that continues it."""
    query = select(*_columns).where(sandboxes.c.tenant == wanted.tenant)
    if wanted.states is not None:
        query = query.where(sandboxes.c.state.in_([state.value for state in wanted.states]))
    if wanted.name is not None:
        query = query.where(sandboxes.c.name == wanted.name)
    for key, value in wanted.labels.items():
        pair = and_(sandbox_labels.c.sandbox_id == sandboxes.c.id, sandbox_labels.c.key == key)
        query = query.where(exists().where(pair, sandbox_labels.c.value == value))
    if cursor is not None:
        created_at, last_id = _read_cursor(cursor)
        older = sandboxes.c.created_at < created_at
        query = query.where(or_(older, and_(sandboxes.c.created_at == created_at, sandboxes.c.id < last_id)))
    query = query.order_by(sandboxes.c.created_at.desc(), sandboxes.c.id.desc()).limit(limit + 1)
    rows = connection.execute(query).all()
    records = [_some(row) for row in rows[:limit]]
    return records, _make_cursor(records[-1]) if len(rows) > limit and records else None


def alive(connection: Connection) -> list[SandboxRecord]:
    """Every record that has not ended, oldest first."""
    return [_some(row) for row in connection.execute(_alive)]


def recent(connection: Connection, since: float, limit: int) -> list[SandboxRecord]:
    """Every record made after that time, the newest first."""
    return [_some(row) for row in connection.execute(_recent, {"since": since, "most": limit})]


def prune(connection: Connection, ended_before: float) -> int:
    """Delete the records that ended before that time; labels go with them."""
    return connection.execute(_prune, {"before": ended_before}).rowcount


def _row(record: SandboxRecord) -> dict[str, Any]:
    return msgspec.structs.asdict(record) | _words(record) | {"spec": _encode(record.spec)}


def _words(record: SandboxRecord) -> dict[str, str | None]:
    return {
        "isolation": record.isolation.value,
        "state": record.state.value,
        "reason": None if record.reason is None else record.reason.value,
    }


def _record(row: Row[Any] | None) -> SandboxRecord | None:
    return None if row is None else _some(row)


def _some(row: Row[Any]) -> SandboxRecord:
    fields: dict[str, Any] = dict(zip(_FIELDS, row, strict=True))
    fields["isolation"] = Isolation(fields["isolation"])
    fields["state"] = State(fields["state"])
    fields["reason"] = None if fields["reason"] is None else Reason(fields["reason"])
    fields["spec"] = _decode(fields["spec"])
    return SandboxRecord(**fields)


def _make_cursor(last: SandboxRecord) -> str:
    return base64.urlsafe_b64encode(struct.pack("<d", last.created_at) + last.id.encode()).decode().rstrip("=")


def _read_cursor(cursor: str) -> tuple[float, str]:
    try:
        raw = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
        created_at, last_id = struct.unpack("<d", raw[:8])[0], raw[8:].decode("ascii")
    except (binascii.Error, struct.error, ValueError):
        created_at, last_id = math.nan, ""
    if not math.isfinite(created_at) or not last_id.startswith("sbx-"):
        raise InvalidRequest("the cursor is not one that a listing gave", fix="begin again without it")
    return created_at, last_id
