"""The sandbox records: every change is a compare-and-set against the one table of moves."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import time
from typing import TYPE_CHECKING, Any

import msgspec
from sqlalchemy.exc import SQLAlchemyError

from tartarus.model.errors import InvalidState, NameTaken, SandboxNotFound, TartarusError
from tartarus.model.sandbox import SandboxRecord
from tartarus.model.states import TERMINAL, State, check_transition
from tartarus.store import queries
from tartarus.store.database import migrate, open_engine, storage_error
from tartarus.store.lamentations import LamentationStore
from tartarus.store.policies import PolicyStore
from tartarus.store.snapshots import SnapshotStore
from tartarus.store.templates import TemplateStore
from tartarus.store.writer import Worker

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

Records = list[SandboxRecord]

# What a caller may set along with a state; identity and history are not among them.
CHANGEABLE = frozenset(SandboxRecord.__struct_fields__) - {"id", "tenant", "spec", "created_at", "state", "version"}


class SandboxStore:
    """All sandboxes of one daemon, and its users' templates and snapshots.

    Safe to use from any task; make it with `open`.
    """

    def __init__(self, path: Path) -> None:
        explain = functools.partial(storage_error, path=path)
        self._engine = open_engine(path)
        self._reading = open_engine(path, read_only=True)
        self._writer = Worker(self._engine, "store-writer", explain)
        self._reader = Worker(self._reading, "store-reader", explain)
        # One file, one writer: what belongs together can share a commit.
        self.templates = TemplateStore(self._writer, self._reader)
        self.snapshots = SnapshotStore(self._writer, self._reader)
        self.policies = PolicyStore(self._writer, self._reader)
        self.lamentations = LamentationStore(self._writer, self._reader)

    @classmethod
    async def open(cls, path: Path) -> SandboxStore:
        """Open the database at `path`, making or migrating it first.

        Raises VersionMismatch when a newer Tartarus wrote it, and NoSpace or TartarusError when it can't be used.
        """
        await asyncio.to_thread(_prepare, path)
        return cls(path)

    async def close(self) -> None:
        """Commit what is queued and close the file. Later calls raise DaemonUnavailable."""
        await self._writer.close()
        await self._reader.close()
        self._engine.dispose()
        self._reading.dispose()

    async def insert(self, record: SandboxRecord, *path: State, **changes: Any) -> SandboxRecord:
        """Add a record and return it as stored.

        With `path`, the record then makes those moves in the same transaction (each checked against the
        table), which saves the launch path a commit per move. `changes` are as in `transition`. Raises NameTaken when
        a live sandbox of the tenant has the name.
        """
        _check_changeable(changes)
        record = _moved(record, path, changes)

        def job(connection: Any) -> SandboxRecord:
            if record.name and queries.live_name_taken(connection, record.tenant, record.name):
                raise NameTaken(
                    f"a live sandbox is already named {record.name!r}",
                    fix=f"choose another name, or end that one: tartarus kill {record.name}",
                )
            queries.insert(connection, record)
            return record

        return await self._writer.run(job)

    async def transition(
        self,
        sandbox_id: str,
        expected: Collection[State],
        target: State,
        *then: State,
        known: SandboxRecord | None = None,
        **changes: Any,
    ) -> SandboxRecord:
        """Move to `target` (and on through `then`) if the state is one of `expected`; compare-and-set.

        `changes` are record fields to set with it. `ended_at` is set to now when the last state is terminal
        and it was not given. `known`: the record as the caller has it, which is not read anew if it is still that.
        Returns the new record. Raises InvalidState, naming both states, when the current state is another one or the
        table does not have a move, and SandboxNotFound.
        """
        _check_changeable(changes)

        def job(connection: Any) -> SandboxRecord:
            if known is not None and known.state in expected:
                with contextlib.suppress(InvalidState):  # what is stored may have that move
                    moved = _moved(known, (target, *then), changes)
                    if queries.update(connection, known, moved):
                        return moved
            current = queries.by_id(connection, sandbox_id)
            if current is None:
                raise _not_found(sandbox_id)
            if current.state not in expected:
                wanted = " or ".join(sorted(state.value for state in expected)) or "no state"
                raise InvalidState(
                    f"sandbox {sandbox_id} is {current.state.value}; becoming {target.value} needs it {wanted}"
                )
            moved = _moved(current, (target, *then), changes)
            if not queries.update(connection, current, moved):
                raise InvalidState(f"sandbox {sandbox_id} was changed by someone else at the same moment")
            return moved

        return await self._writer.run(job)

    async def get(self, tenant: str, id_or_name: str) -> SandboxRecord:
        """The tenant's sandbox of that id, name or unique id prefix (``sbx-`` and at least 4 characters).

        A name means the live sandbox that has it, else the newest that had. Raises SandboxNotFound, and
        InvalidRequest when a prefix fits several.
        """
        record = await self._reader.run(lambda connection: queries.find(connection, tenant, id_or_name))
        if record is None:
            raise _not_found(id_or_name)
        return record

    async def list(
        self,
        tenant: str,
        *,
        states: Collection[State] | None = None,
        labels: Mapping[str, str] | None = None,
        name: str | None = None,
        limit: int = 100,
        cursor: str | None = None,
    ) -> tuple[Records, str | None]:
        """The tenant's sandboxes that fit every filter, newest first, and the cursor of the next page (or None).

        Pages stay exact while sandboxes come and go. Raises InvalidRequest for a cursor that no page gave.
        """
        wanted = queries.Filter(tenant=tenant, states=states, labels=labels or {}, name=name)
        return await self._reader.run(lambda connection: queries.page(connection, wanted, limit, cursor))

    async def alive(self) -> Records:
        """Every sandbox of every tenant that has not ended, oldest first."""
        return await self._reader.run(queries.alive)

    async def recent(self, since: float, limit: int) -> Records:
        """Sandboxes of every tenant that were made after that time (Unix seconds), the newest first."""
        return await self._reader.run(lambda connection: queries.recent(connection, since, limit))

    async def prune(self, ended_before: float) -> int:
        """Forget the sandboxes that ended before that time (Unix seconds); returns how many."""
        return await self._writer.run(lambda connection: queries.prune(connection, ended_before))


def _prepare(path: Path) -> None:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # For the owner only: specs hold tenants' environments. The journal files take their mode from this one.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        engine = open_engine(path)
        try:
            migrate(engine, path)
        finally:
            engine.dispose()
    except (SQLAlchemyError, OSError) as error:
        raise storage_error(error, path) from error


def _check_changeable(changes: Mapping[str, Any]) -> None:
    unknown = changes.keys() - CHANGEABLE
    if unknown:
        raise TypeError(f"not changeable fields of a record: {', '.join(sorted(unknown))}")


def _moved(record: SandboxRecord, path: tuple[State, ...], changes: Mapping[str, Any]) -> SandboxRecord:
    state = record.state
    for target in path:
        check_transition(state, target)
        state = target
    fields = dict(changes)
    if state in TERMINAL and fields.get("ended_at", record.ended_at) is None:
        fields["ended_at"] = time.time()
    return msgspec.structs.replace(record, state=state, version=record.version + len(path), **fields)


def _not_found(id_or_name: str) -> TartarusError:
    return SandboxNotFound(f"no sandbox {id_or_name!r}", fix="see yours with: tartarus ps --all")
