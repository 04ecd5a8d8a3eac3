"""The templates that users made; built-in ones are code, not records."""

from __future__ import annotations

from typing import Any

from tartarus.model.errors import TemplateExists, TemplateNotFound
from tartarus.model.library import TemplateRecord
from tartarus.store.owned import TEMPLATES
from tartarus.store.owned_store import OwnedStore


class TemplateStore(OwnedStore[TemplateRecord]):
    """`SandboxStore.templates`, by name. Raises TemplateExists and TemplateNotFound."""

    _table = TEMPLATES

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

    def _taken(self, name: str) -> TemplateExists:
        return TemplateExists(
            f"you already have a template {name!r}",
            fix=f"choose another name, give --replace, or remove it: tartarus template rm {name}",
        )

    def _not_found(self, name: str) -> TemplateNotFound:
        return TemplateNotFound(f"no template {name!r}", fix="see yours with: tartarus template list")
