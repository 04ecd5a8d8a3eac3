"""Any bytes as any package record: an inventory or a refusal, bounded and printable, never another error."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tartarus.images.sbom import cyclonedx, take_inventory
from tartarus.images.stackview import StackView

RECORDS = (
    "etc/os-release", "var/lib/dpkg/status", "var/lib/dpkg/status.d/a", "var/lib/dpkg/info/a.list", "lib/apk/db/installed",
    "a-1.dist-info/METADATA", "b.egg-info", "node_modules/a/package.json", "node_modules/@s/a/package.json", "r/DESCRIPTION",
)  # fmt: skip
WORDS = [
    b"Package: a", b"Version: 1:2-3", b"Name: a", b"P:a", b"V:1", b"o:a", b"F:a-1.dist-info", b"R:METADATA", b"Status: x ok installed",
    b"Source: b (1)", b"Priority: base", b'{"name":', b'"a",', b'"version":', b'"1"}', b"ID=debian", b'VERSION_ID="12"', b"ID='",
    b"\n", b"\n\n", b"\r\n\r\n", b":", b" ", b"\0", b"\xff", b"/a-1.dist-info/METADATA\n", "é\u202e\u2028".encode(), b"\x1b[2J",
]  # fmt: skip
CONTENT = st.lists(st.one_of(st.sampled_from(WORDS), st.binary(max_size=8)), max_size=30).map(b"\n".join) | st.lists(
    st.one_of(st.sampled_from(WORDS), st.binary(max_size=8)), max_size=30
).map(b"".join)

_number = itertools.count()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(records=st.dictionaries(st.sampled_from(RECORDS), CONTENT, min_size=1))
def test_any_records(tmp_path_factory: pytest.TempPathFactory, records: dict[str, bytes]) -> None:
    layer = tmp_path_factory.getbasetemp() / f"layer{next(_number)}"
    (layer / "r/Meta").mkdir(parents=True)
    for path, content in records.items():
        Path(layer, path).parent.mkdir(parents=True, exist_ok=True)
        Path(layer, path).write_bytes(content)
    with StackView([layer]) as view:
        found = take_inventory(view)
    assert all(gap.isprintable() for gap in found.gaps)
    for package in found.packages:
        assert (package.name + package.version + package.license + package.owner + "".join(package.paths)).isprintable()
        assert package.name
        assert package.version
    document = json.dumps(cyclonedx(found, name="x"))
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(document) is None
