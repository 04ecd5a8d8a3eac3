"""Policies with all their versions: nothing is ever changed, only added."""

from __future__ import annotations

import builtins
from typing import Any

from sqlalchemy import bindparam, func, insert, select

from tartarus.model.errors import InvalidState, PolicyNotFound
from tartarus.model.policies import PolicyVersion
from tartarus.store.schema import policy_versions
from tartarus.store.writer import Worker

_FIELDS = PolicyVersion.__struct_fields__
_COLUMNS = [policy_versions.c[name] for name in _FIELDS]
_OF = policy_versions.c.id == bindparam("id")
_NEWEST = select(*_COLUMNS).where(_OF).order_by(policy_versions.c.version.desc()).limit(1)
_ONE = select(*_COLUMNS).where(_OF, policy_versions.c.version == bindparam("version"))
_HISTORY = select(*_COLUMNS).where(_OF).order_by(policy_versions.c.version.desc())
_last = select(policy_versions.c.id, func.max(policy_versions.c.version).label("version")).group_by(
    policy_versions.c.id
)
_LAST = _last.subquery()
_IN_FORCE = (
    select(*_COLUMNS)
    .join(_LAST, (policy_versions.c.id == _LAST.c.id) & (policy_versions.c.version == _LAST.c.version))
    .where(policy_versions.c.deleted.is_(False))
    .order_by(policy_versions.c.id)
)


class PolicyStore:
    """`SandboxStore.policies`."""

    def __init__(self, writer: Worker, reader: Worker) -> None:
        self._writer = writer
        self._reader = reader

    async def add(self, made: PolicyVersion, expected: int | None) -> PolicyVersion:
        """Add a version behind the newest one, whatever number `made` has; returns it as it is kept.

        Raises InvalidState when `expected` is given and the newest version is another.
        """

        def job(connection: Any) -> PolicyVersion:
            newest = _version(connection.execute(_NEWEST, {"id": made.id}).first())
            number = 0 if newest is None else newest.version
            if expected is not None and expected != number:
                raise InvalidState(
                    f"policy {made.id!r} is at version {number}, not {expected}",
                    why="somebody changed it meanwhile", fix="look at what they did, and try again",
                )  # fmt: skip
            kept = PolicyVersion(
                **{name: getattr(made, name) for name in _FIELDS if name != "version"}, version=number + 1
            )
            connection.execute(insert(policy_versions), {name: getattr(kept, name) for name in _FIELDS})
            return kept

        return await self._writer.run(job)

    async def get(self, policy: str, version: int | None = None) -> PolicyVersion:
        """One version, the newest if none is named. Raises PolicyNotFound."""
        statement = _NEWEST if version is None else _ONE
        values: dict[str, Any] = {"id": policy} if version is None else {"id": policy, "version": version}
        found = await self._reader.run(lambda connection: _version(connection.execute(statement, values).first()))
        if found is None:
            which = f"no policy {policy!r}" if version is None else f"policy {policy!r} has no version {version}"
            raise PolicyNotFound(which, fix="see them with: tartarus policy list, and policy history")
        return found

    async def history(self, policy: str) -> builtins.list[PolicyVersion]:
        """Every version, the newest first. Raises PolicyNotFound."""
        found = await self._reader.run(
            lambda connection: [_some(row) for row in connection.execute(_HISTORY, {"id": policy})]
        )
        if not found:
            raise PolicyNotFound(f"no policy {policy!r}", fix="see them with: tartarus policy list")
        return found

    async def in_force(self) -> builtins.list[PolicyVersion]:
        """The newest version of every policy that was not deleted."""
        return await self._reader.run(lambda connection: [_some(row) for row in connection.execute(_IN_FORCE)])


def _version(row: Any) -> PolicyVersion | None:
    return None if row is None else _some(row)


def _some(row: Any) -> PolicyVersion:
    return PolicyVersion(**dict(zip(_FIELDS, row, strict=True)))
