"""The audit log's witness that a configuration names; one in S3 needs what the secrets' providers need of AWS."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta
from typing import Any

from tartarus.model.buckets import SCHEME, Bucket
from tartarus.secrets.providers.aws import client
from tartarus.store.audit.witnesses import Witness, witness_of

_SIZE_LINE = 1


def witness(text: str) -> Witness:
    """A file's absolute path, an ``https://`` address, ``syslog``, or a place in S3. Raises InvalidRequest."""
    return _s3_witness(Bucket.parse(text)) if text.startswith(SCHEME) else witness_of(text)


def _s3_witness(bucket: Bucket) -> Witness:
    """Puts each checkpoint as an object of its own: nothing is written over, and with `retain` nobody can remove it.

    Compliance mode: not even the account's owner can shorten it. The bucket must have been made with object lock.
    """
    s3 = client("s3", bucket.region, bucket.endpoint)

    def put(note: bytes) -> None:
        size = int(note.split(b"\n", _SIZE_LINE + 1)[_SIZE_LINE])
        name = f"{size:020}-{hashlib.sha256(note).hexdigest()[:16]}.txt"
        lock: dict[str, Any] = {}
        if bucket.retain_s:
            until = datetime.now(UTC) + timedelta(seconds=bucket.retain_s)
            lock = {"ObjectLockMode": "COMPLIANCE", "ObjectLockRetainUntilDate": until}
        s3.put_object(
            Bucket=bucket.name, Key=f"{bucket.prefix}/{name}".lstrip("/"), Body=note, ContentType="text/plain",
            ChecksumAlgorithm="SHA256", **lock,
        )  # fmt: skip

    return put
