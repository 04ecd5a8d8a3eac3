"""The API's operations on the audit log, as data; see `calls`."""

from __future__ import annotations

import msgspec

from tartarus.model.audit import AuditPage, AuditProof, AuditQuery, AuditVerification
from tartarus.sdk.http import Call, target

_PATIENCE_S = 3600.0
"""A verification reads all of a log, which may be a gigabyte."""


def find(query: AuditQuery) -> Call[AuditPage]:
    """Entries, the newest first."""
    asked = {name: value for name, value in msgspec.structs.asdict(query).items() if value or name == "before"}
    return Call("GET", target("audit", **asked), msgspec.json.Decoder(AuditPage).decode)


def verify() -> Call[AuditVerification]:
    """Look at all of the log."""
    read = msgspec.json.Decoder(AuditVerification).decode
    return Call("GET", target("audit", "verification"), read, patience_s=_PATIENCE_S)


def prove(sequence: int) -> Call[AuditProof]:
    """A proof of one entry."""
    read = msgspec.json.Decoder(AuditProof).decode
    return Call("GET", target("audit", str(sequence), "proof"), read, patience_s=_PATIENCE_S)
