"""Records that a tenant owns and names: templates and snapshots. Statements and rows for both.

Synchronous: it runs in the store's threads. Whatever is no plain value of the record is a JSON column.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any, Generic, TypeVar, get_type_hints

import msgspec
from sqlalchemy import bindparam, delete, select
from sqlalchemy import insert as insert_into
from sqlalchemy import update as update_of

from tartarus.model.errors import InvalidRequest, InvalidState
from tartarus.model.library import SnapshotRecord, TemplateRecord
from tartarus.store.schema import snapshots, templates

if TYPE_CHECKING:
    from sqlalchemy import Table
    from sqlalchemy.engine import Connection, Row

R = TypeVar("R", TemplateRecord, SnapshotRecord)
_FIXED = frozenset({"id", "tenant", "created_at", "revision"})
_PLAIN = (str, int, float, float | None)
_encode = msgspec.json.Encoder().encode


class OwnedTable(Generic[R]):
    """One kind of record. `prefix` begins its ids; a shorter one than that and four characters fits none."""

    def __init__(self, kind: type[R], table: Table, prefix: str, order: Sequence[Any]) -> None:
        self._kind: type[R] = kind
        self._prefix = prefix
        self._fields = kind.__struct_fields__
        hints = get_type_hints(kind)
        self._enums = {name: hints[name] for name in self._fields if _is_enum(hints[name])}
        plain = {name for name in self._fields if hints[name] in _PLAIN} | self._enums.keys()
        self._json = {name: msgspec.json.Decoder(hints[name]) for name in self._fields if name not in plain}
        columns = [table.c[name] for name in self._fields]
        own = table.c.tenant == bindparam("tenant")
        self._insert = insert_into(table)
        self._all = select(*columns).order_by(table.c.created_at, table.c.id)
        self._own = select(*columns).where(own).order_by(*order)
        self._by_id = select(*columns).where(table.c.id == bindparam("id"))
        self._by_name = select(*columns).where(own, table.c.name == bindparam("name")).limit(1)
        self._by_prefix = (
            select(*columns).where(own, table.c.id >= bindparam("low"), table.c.id < bindparam("high")).limit(2)
        )
        same = (table.c.id == bindparam("id_"), table.c.revision == bindparam("revision_"))
        changed: dict[str, Any] = {name: bindparam(name) for name in self._fields if name not in _FIXED - {"revision"}}
        self._update = update_of(table).where(*same).values(changed)
        self._delete = delete(table).where(*same)

    def insert(self, connection: Connection, record: R) -> bool:
        """Add a record; False when its tenant has another of that name."""
        if record.name and self._named(connection, record.tenant, record.name) is not None:
            return False
        connection.execute(self._insert, self._row(record))
        return True

    def update(self, connection: Connection, record: R, changes: dict[str, Any]) -> R:
        """Change `record` if it is still as it was given. Raises InvalidState otherwise."""
        unknown = changes.keys() - set(self._fields) | changes.keys() & _FIXED
        if unknown:
            raise TypeError(f"not changeable fields of a record: {', '.join(sorted(unknown))}")
        changed = self._kind(**{**msgspec.structs.asdict(record), **changes, "revision": record.revision + 1})
        row = {name: value for name, value in self._row(changed).items() if name not in _FIXED - {"revision"}}
        done = connection.execute(self._update, {**row, "id_": record.id, "revision_": record.revision})
        if done.rowcount != 1:
            raise _changed(record)
        return changed

    def remove(self, connection: Connection, record: R) -> None:
        """Forget `record` if it is still as it was given. Raises InvalidState otherwise."""
        done = connection.execute(self._delete, {"id_": record.id, "revision_": record.revision})
        if done.rowcount != 1:
            raise _changed(record)

    def find(self, connection: Connection, tenant: str, id_or_name: str) -> R | None:
        """The tenant's record of that id, name or unique id prefix."""
        if not id_or_name:
            return None
        if not id_or_name.startswith(self._prefix):
            return self._named(connection, tenant, id_or_name)
        record = self._record(connection.execute(self._by_id, {"id": id_or_name}).first())
        if record is not None:
            return record if record.tenant == tenant else None
        if len(id_or_name) < len(self._prefix) + 4:
            return None
        bounds = {"tenant": tenant, "low": id_or_name, "high": id_or_name + "\x7f"}
        fitting = connection.execute(self._by_prefix, bounds).all()
        if len(fitting) > 1:
            raise InvalidRequest(f"{id_or_name!r} fits several", fix="give more characters of the id")
        return self._record(fitting[0]) if fitting else None

    def own(self, connection: Connection, tenant: str) -> list[R]:
        """Every record of the tenant."""
        return [self._some(row) for row in connection.execute(self._own, {"tenant": tenant})]

    def everything(self, connection: Connection) -> list[R]:
        """Every record of every tenant, oldest first."""
        return [self._some(row) for row in connection.execute(self._all)]

    def _named(self, connection: Connection, tenant: str, name: str) -> R | None:
        return self._record(connection.execute(self._by_name, {"tenant": tenant, "name": name}).first())

    def _row(self, record: R) -> dict[str, Any]:
        row = {name: getattr(record, name) for name in self._fields}
        for name in self._json:
            row[name] = _encode(row[name])
        for name in self._enums:
            row[name] = row[name].value
        return row

    def _record(self, row: Row[Any] | None) -> R | None:
        return None if row is None else self._some(row)

    def _some(self, row: Row[Any]) -> R:
        fields: dict[str, Any] = dict(zip(self._fields, row, strict=True))
        for name, decoder in self._json.items():
            fields[name] = decoder.decode(fields[name])
        for name, kind in self._enums.items():
            fields[name] = kind(fields[name])
        return self._kind(**fields)


def _is_enum(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Enum)


def _changed(record: TemplateRecord | SnapshotRecord) -> InvalidState:
    return InvalidState(
        f"{record.name or record.id} was changed or removed by someone else at the same moment", fix="look again"
    )


TEMPLATES = OwnedTable(TemplateRecord, templates, "tpl-", (templates.c.name,))
SNAPSHOTS = OwnedTable(SnapshotRecord, snapshots, "snap-", (snapshots.c.created_at.desc(), snapshots.c.id.desc()))
