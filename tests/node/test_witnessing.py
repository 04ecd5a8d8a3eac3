"""The audit log's checkpoints in a bucket with object lock, at a mock server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError
from tests.aws import aws

from tartarus.model.audit import AuditEntry
from tartarus.model.buckets import Bucket
from tartarus.model.configuration import configured
from tartarus.model.errors import InvalidRequest
from tartarus.model.settings import Settings
from tartarus.node.witnessing import witness
from tartarus.store.audit import reading
from tartarus.store.audit.log import AuditLog

__all__ = ["aws"]
pytestmark = pytest.mark.anyio


def bucket(aws: str, name: str) -> Any:
    s3 = boto3.client("s3", region_name="eu-central-1", endpoint_url=aws)
    where = {"LocationConstraint": "eu-central-1"}
    s3.create_bucket(Bucket=name, CreateBucketConfiguration=where, ObjectLockEnabledForBucket=True)
    return s3


async def test_checkpoints_are_objects_that_nobody_may_remove(aws: str, tmp_path: Path) -> None:
    s3 = bucket(aws, "witness")
    place = f"s3://witness/host-1/audit?region=eu-central-1&retain=30d&endpoint={aws}"
    log = await AuditLog.open(tmp_path / "audit", "tartarus.test/log", witness=witness(place))
    for number in range(3):
        await log.append(AuditEntry(actor="a", tenant="t", action="sandbox.create", target=str(number)), durable=True)
    await log.close()
    (found,) = s3.list_objects_v2(Bucket="witness")["Contents"]
    assert found["Key"].startswith("host-1/audit/00000000000000000003-")
    answer = s3.get_object(Bucket="witness", Key=found["Key"])
    note = answer["Body"].read()
    assert answer["ObjectLockMode"] == "COMPLIANCE"
    assert 29 < (answer["ObjectLockRetainUntilDate"] - answer["LastModified"]).total_seconds() / 86400 < 31
    with pytest.raises(ClientError, match="AccessDenied"):
        s3.delete_object(Bucket="witness", Key=found["Key"], VersionId=answer["VersionId"])
    assert reading.verify(tmp_path / "audit", [note]).findings == ()
    rolled_back = await AuditLog.open(tmp_path / "other", "tartarus.test/log")
    await rolled_back.close()
    assert reading.verify(tmp_path / "other", [note]).findings != ()


async def test_a_bucket_that_is_not_there_holds_nothing_up(aws: str, tmp_path: Path) -> None:
    place = f"s3://nowhere/audit?region=eu-central-1&endpoint={aws}"
    log = await AuditLog.open(tmp_path, "tartarus.test/log", witness=witness(place))
    await log.append(AuditEntry(actor="a", tenant="t", action="sandbox.create"), durable=True)
    await log.close()
    assert reading.verify(tmp_path).findings == ()


@pytest.mark.parametrize(
    "text",
    [
        "s3://b", "s3://bucket", "s3://bucket?region=", "s3://bucket/?region=a&retain=long", "s3://bucket?region=a&x=1",
        "s3://Bucket?region=a", "s3://bucket/a b?region=a", "s3://user@bucket?region=a", "s3://bucket?region=a#f",
        "s3://bucket?region=a&region=b",
    ],
)  # fmt: skip
def test_what_is_no_place_is_refused_with_the_configuration(tmp_path: Path, text: str) -> None:
    with pytest.raises(InvalidRequest):
        Bucket.parse(text)
    with pytest.raises(InvalidRequest):
        configured(Settings.at(tmp_path), f"audit: {{witness: '{text}'}}")
