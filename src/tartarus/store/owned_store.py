"""What the stores of owned records have in common.

Every change is a compare-and-set on the record that it was decided on.
"""

from __future__ import annotations

import builtins
from abc import ABC, abstractmethod
from typing import Any, Generic

from tartarus.model.errors import TartarusError
from tartarus.store.owned import OwnedTable, R
from tartarus.store.writer import Worker


class OwnedStore(ABC, Generic[R]):
    """One kind of record that tenants own and name. A kind says what is wrong in its own words."""

    _table: OwnedTable[R]

    def __init__(self, writer: Worker, reader: Worker) -> None:
        self._writer = writer
        self._reader = reader

    @abstractmethod
    def _taken(self, name: str) -> TartarusError:
        """What to raise where the tenant has one of that name."""

    @abstractmethod
    def _not_found(self, name: str) -> TartarusError:
        """What to raise where the tenant has none of that name."""

    async def insert(self, record: R) -> R:
        """Add a record. Raises the kind's error when its tenant has another of that name."""

        def job(connection: Any) -> R:
            if not self._table.insert(connection, record):
                raise self._taken(record.name)
            return record

        return await self._writer.run(job)

    async def remove(self, record: R) -> None:
        """Forget a record that is still as `record` says. Raises InvalidState otherwise."""
        await self._writer.run(lambda connection: self._table.remove(connection, record))

    async def get(self, tenant: str, id_or_name: str) -> R:
        """The tenant's record of that id, name or unique id prefix. Raises the kind's error and InvalidRequest."""
        record = await self._reader.run(lambda connection: self._table.find(connection, tenant, id_or_name))
        if record is None:
            raise self._not_found(id_or_name)
        return record

    async def list(self, tenant: str) -> builtins.list[R]:
        """The tenant's records, in the kind's order."""
        return await self._reader.run(lambda connection: self._table.own(connection, tenant))

    async def all(self) -> builtins.list[R]:
        """Every record of every tenant, oldest first."""
        return await self._reader.run(self._table.everything)
