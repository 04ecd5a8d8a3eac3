"""`Audit`: who did what to whom, and what was decided."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from tartarus.model.audit import MOST_PAGE, AuditProof, AuditQuery, AuditVerification, Written
from tartarus.sdk import audit_calls as calls
from tartarus.sdk.client import Client


class Audit:
    """The audit log of one daemon. Its owner sees all of it, others what is of their tenant."""

    def __init__(self, client: Client | None = None) -> None:
        self._client = client or Client()

    def entries(self, query: AuditQuery | None = None) -> Iterator[Written]:
        """Every entry that matches, the newest first; `limit` is the size of a page."""
        query = query or AuditQuery(limit=MOST_PAGE)
        while True:
            page = self._client.transport.call(calls.find(query))
            yield from page.entries
            if page.next_before is None:
                return
            query = msgspec.structs.replace(query, before=page.next_before)

    def verify(self) -> AuditVerification:
        """Look at all of the log: every hash, the chain, the tree, every checkpoint. The owner's."""
        return self._client.transport.call(calls.verify())

    def prove(self, sequence: int) -> AuditProof:
        """All that a stranger needs to check that an entry is in the log. The owner's.

        Raises InvalidRequest where no checkpoint covers the entry yet, or it was let go.
        """
        return self._client.transport.call(calls.prove(sequence))
