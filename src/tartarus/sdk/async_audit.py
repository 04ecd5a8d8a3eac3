"""The async twin of `audit`."""

from __future__ import annotations

from collections.abc import AsyncIterator

import msgspec

from tartarus.model.audit import MOST_PAGE, AuditProof, AuditQuery, AuditVerification, Written
from tartarus.sdk import audit_calls as calls
from tartarus.sdk.async_client import AsyncClient


class AsyncAudit:
    """The audit log of one daemon; see `Audit`, whose names it has."""

    def __init__(self, client: AsyncClient | None = None) -> None:
        self._client = client or AsyncClient()

    async def entries(self, query: AuditQuery | None = None) -> AsyncIterator[Written]:
        """Every entry that matches, the newest first; `limit` is the size of a page."""
        query = query or AuditQuery(limit=MOST_PAGE)
        while True:
            page = await self._client.transport.call(calls.find(query))
            for entry in page.entries:
                yield entry
            if page.next_before is None:
                return
            query = msgspec.structs.replace(query, before=page.next_before)

    async def verify(self) -> AuditVerification:
        """Look at all of the log: every hash, the chain, the tree, every checkpoint. The owner's."""
        return await self._client.transport.call(calls.verify())

    async def prove(self, sequence: int) -> AuditProof:
        """All that a stranger needs to check that an entry is in the log. The owner's.

        Raises InvalidRequest where no checkpoint covers the entry yet, or it was let go.
        """
        return await self._client.transport.call(calls.prove(sequence))
