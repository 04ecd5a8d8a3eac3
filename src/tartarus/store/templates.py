"""The templates that users made; built-in ones are code, not records."""

from __future__ import annotations

import builtins
from typing import Any

from tartarus.model.errors import TemplateExists, TemplateNotFound
from tartarus.model.library import TemplateRecord
from tartarus.store.owned import TEMPLATES
from tartarus.store.writer import Worker


class TemplateStore:
    """`SandboxStore.templates`. Every change is a compare-and-set on the record that it was decided on."""

    def __init__(self, writer: Worker, reader: Worker) -> None:
        self._writer = writer
        self._reader = reader

    async def insert(self, record: TemplateRecord) -> TemplateRecord:
        """Add a template. Raises TemplateExists when its tenant has one of that name."""

        def job(connection: Any) -> TemplateRecord:
            if not TEMPLATES.insert(connection, record):
                raise TemplateExists(
                    f"you already have a template {record.name!r}",
                    fix=f"choose another name, give --replace, or remove it: tartarus template rm {record.name}",
                )
            return record

        return await self._writer.run(job)

    async def update(self, record: TemplateRecord, **changes: Any) -> TemplateRecord:
        """Set fields of a template that is still as `record` says; returns it as it is then.

        Raises InvalidState when it was changed or removed meanwhile, and TemplateExists for another's name.
        """

        def job(connection: Any) -> TemplateRecord:
            name = changes.get("name", record.name)
            if name != record.name and TEMPLATES.find(connection, record.tenant, name) is not None:
                raise TemplateExists(f"you already have a template {name!r}", fix="choose another name")
            return TEMPLATES.update(connection, record, changes)

        return await self._writer.run(job)

    async def remove(self, record: TemplateRecord) -> None:
        """Forget a template that is still as `record` says. Raises InvalidState otherwise."""
        await self._writer.run(lambda connection: TEMPLATES.remove(connection, record))

    async def get(self, tenant: str, id_or_name: str) -> TemplateRecord:
        """The tenant's template of that id, name or unique id prefix. Raises TemplateNotFound and InvalidRequest."""
        record = await self._reader.run(lambda connection: TEMPLATES.find(connection, tenant, id_or_name))
        if record is None:
            raise TemplateNotFound(f"no template {id_or_name!r}", fix="see yours with: tartarus template list")
        return record

    async def list(self, tenant: str) -> builtins.list[TemplateRecord]:
        """The tenant's templates, by name."""
        return await self._reader.run(lambda connection: TEMPLATES.own(connection, tenant))

    async def all(self) -> builtins.list[TemplateRecord]:
        """Every template of every tenant, oldest first."""
        return await self._reader.run(TEMPLATES.everything)
