"""Failed runs, for their tenants to look at, and what was asked for where it never ran."""

from __future__ import annotations

import builtins
from typing import Any

import msgspec
from sqlalchemy import bindparam, delete, func, insert, select, update

from tartarus.model.errors import InvalidState, LamentationNotFound
from tartarus.model.lamentations import Category, Fault, Lamentation, LamentationFilter
from tartarus.model.sandbox import SandboxSpec
from tartarus.store.schema import lamentations
from tartarus.store.writer import Worker

MOST_OF_A_TENANT = 10_000
"""Rows that one tenant may have; the oldest go when more come, so that nobody's failures fill the disk."""
_TRIM_EVERY = 64
_FIELDS = Lamentation.__struct_fields__
_COLUMNS = [lamentations.c[name] for name in _FIELDS]
_encode = msgspec.json.encode
_OF = (lamentations.c.tenant == bindparam("of_tenant")) & (lamentations.c.id == bindparam("of_id"))
_ONE = select(*_COLUMNS).where(_OF)
_SPEC = select(lamentations.c.spec, lamentations.c.retried_as).where(_OF)
_NEWEST_FIRST = (lamentations.c.timestamp.desc(), lamentations.c.id.desc())


class LamentationStore:
    """`SandboxStore.lamentations`."""

    def __init__(self, writer: Worker, reader: Worker) -> None:
        self._writer = writer
        self._reader = reader
        self._added = 0

    async def add(self, lament: Lamentation, spec: SandboxSpec | None = None) -> None:
        """Keep one; with `spec`, what is to be tried again."""
        row = {name: getattr(lament, name) for name in _FIELDS}
        row |= {"category": lament.category.value, "fault": lament.fault.value, "metadata": _encode(lament.metadata)}
        row["spec"] = None if spec is None else _encode(spec)
        self._added += 1
        trim = self._added % _TRIM_EVERY == 0

        def job(connection: Any) -> None:
            connection.execute(insert(lamentations), row)
            if trim:
                _trim(connection, lament.tenant)

        await self._writer.run(job)

    async def get(self, tenant: str, lament_id: str) -> Lamentation:
        """One of the tenant's. Raises LamentationNotFound."""
        values = {"of_tenant": tenant, "of_id": lament_id}
        row = await self._reader.run(lambda connection: connection.execute(_ONE, values).first())
        if row is None:
            raise _not_found(lament_id)
        return _some(row)

    async def list(self, tenant: str, wanted: LamentationFilter) -> builtins.list[Lamentation]:
        """The tenant's that fit every filter, newest first."""
        table = lamentations.c
        query = select(*_COLUMNS).where(table.tenant == tenant)
        if wanted.sandbox_id is not None:
            query = query.where(table.sandbox_id == wanted.sandbox_id)
        if wanted.category is not None:
            query = query.where(table.category == wanted.category.value)
        if wanted.since is not None:
            query = query.where(table.timestamp >= wanted.since)
        if wanted.until is not None:
            query = query.where(table.timestamp < wanted.until)
        if wanted.dead_letters:
            query = query.where(table.dead_letter, table.retried_as == "")
        query = query.order_by(*_NEWEST_FIRST).limit(wanted.limit)
        return await self._reader.run(lambda connection: [_some(row) for row in connection.execute(query)])

    async def claim(self, tenant: str, lament_id: str, attempt: str) -> SandboxSpec:
        """What was asked for, for one attempt: of two at once, one gets it.

        Raises LamentationNotFound, and InvalidState for what ran, or was tried again already.
        """

        def job(connection: Any) -> SandboxSpec:
            found = connection.execute(_SPEC, {"of_tenant": tenant, "of_id": lament_id}).first()
            if found is None:
                raise _not_found(lament_id)
            if found.spec is None:
                raise InvalidState(
                    f"{lament_id} is no dead letter", why="it ran, or would fail again as it was asked for"
                )
            if found.retried_as:
                raise InvalidState(f"{lament_id} was tried again already", why=f"as {found.retried_as}")
            _mark(connection, tenant, lament_id, attempt)
            return msgspec.json.decode(found.spec, type=SandboxSpec)

        return await self._writer.run(job)

    async def retried(self, tenant: str, lament_id: str, sandbox_id: str) -> None:
        """It was tried again as that sandbox; as nothing (``""``): it is a dead letter still."""
        await self._writer.run(lambda connection: _mark(connection, tenant, lament_id, sandbox_id))

    async def unclaim(self, attempt: str) -> None:
        """What was being tried again when a daemon ended: these are dead letters still."""
        statement = update(lamentations).where(lamentations.c.retried_as == attempt).values(retried_as="")
        await self._writer.run(lambda connection: connection.execute(statement).rowcount)

    async def purge(self, before: float, tenant: str | None = None) -> int:
        """Forget those from before that time (Unix seconds), of everybody without `tenant`; returns how many."""
        statement = delete(lamentations).where(lamentations.c.timestamp < before)
        if tenant is not None:
            statement = statement.where(lamentations.c.tenant == tenant)
        return await self._writer.run(lambda connection: connection.execute(statement).rowcount)


def _mark(connection: Any, tenant: str, lament_id: str, sandbox_id: str) -> None:
    values = {"of_tenant": tenant, "of_id": lament_id, "as_": sandbox_id}
    connection.execute(update(lamentations).where(_OF).values(retried_as=bindparam("as_")), values)


def _trim(connection: Any, tenant: str) -> None:
    of_tenant = lamentations.c.tenant == tenant
    count = connection.execute(select(func.count()).select_from(lamentations).where(of_tenant)).scalar()
    if count > MOST_OF_A_TENANT:
        kept = select(lamentations.c.id).where(of_tenant).order_by(*_NEWEST_FIRST).limit(MOST_OF_A_TENANT).subquery()
        connection.execute(delete(lamentations).where(of_tenant, lamentations.c.id.not_in(select(kept.c.id))))


def _some(row: Any) -> Lamentation:
    fields = dict(zip(_FIELDS, row, strict=True))
    fields |= {"category": Category(fields["category"]), "fault": Fault(fields["fault"])}
    fields["metadata"] = msgspec.json.decode(fields["metadata"], type=dict[str, str])
    return Lamentation(**fields)


def _not_found(lament_id: str) -> LamentationNotFound:
    return LamentationNotFound(f"no failure {lament_id!r}", fix="see yours with: tartarus lamentations list")
