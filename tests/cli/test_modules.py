"""`tartarus module` as people type it, with the real daemon; and the same in the SDK."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from tests.cli.kit import refused, tartarus, text
from tests.wasm.modules import CAT, HELLO

from tartarus.sdk import AsyncModule, Module
from tartarus.sdk.places import Places

pytestmark = [pytest.mark.usefixtures("clean"), pytest.mark.needs("root", "cgroups")]
DIGEST = hashlib.sha256(HELLO).hexdigest()


@pytest.mark.anyio
async def test_modules_are_added_listed_and_removed(home: Places, tmp_path: Path) -> None:
    hello, other = tmp_path / "hello.wasm", tmp_path / "other.wasm"
    hello.write_bytes(HELLO)
    other.write_bytes(b"\0asm, or so")
    assert text("module", "add", str(hello)) == f"Module {hello} compiled (sha256: {DIGEST})\n"
    done = tartarus("module", "add", str(other), str(hello), "--json")
    assert (done.returncode, json.loads(done.stdout)[0]["digest"]) == (125, DIGEST)
    assert b"error[module_refused]" in done.stderr
    assert tartarus("run", str(hello)).stdout == b"hello\n"
    assert text("module", "list", "-q") == f"{DIGEST}\n"
    head, row = text("module", "list").splitlines()
    assert head.split() == ["SHA256", "KIND", "SIZE", "ON", "DISK", "READY", "USED"]
    assert row.startswith(f"{DIGEST[:12]}   module   1.0KiB   ")
    (known,) = json.loads(text("module", "list", "--json"))
    assert (known["digest"], known["kind"], known["ready"]) == (DIGEST, "module", True)
    assert "too short" in refused("module", "remove", "ab")
    assert text("module", "remove", DIGEST[:12]) == f"Module {DIGEST[:12]} removed\n"
    assert "module_not_found" in refused("module", "remove", DIGEST)
    assert tartarus("run", str(hello)).stdout == b"hello\n"  # sent again

    (kept,) = Module.list()
    assert (kept.digest, repr(kept)) == (DIGEST, f"<Module {DIGEST[:12]}>")
    kept.remove()
    added = await AsyncModule.add(CAT)
    assert [module.info.digest for module in await AsyncModule.list()] == [added.digest]
    await AsyncModule.remove(added.digest)
    assert Module.list() == []
