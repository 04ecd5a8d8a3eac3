"""The audit log: what is written can be proved, and every change that we know of is noticed."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import rfc8785
from hypothesis import given, settings
from hypothesis import strategies as st

from tartarus.model.audit import AuditEntry, AuditProof, AuditQuery
from tartarus.model.errors import DaemonUnavailable
from tartarus.store.audit import files, merkle, reading, writing
from tartarus.store.audit import log as log_module
from tartarus.store.audit.entries import MAX_LINE, hash_of, line_of, place, read_line
from tartarus.store.audit.log import AuditLog
from tartarus.store.audit.notes import Checkpoint, Verifier
from tartarus.store.audit.witnesses import file_witness
from tartarus.store.audit.writing import Retention

pytestmark = pytest.mark.anyio
# RFC 6962's reference tree, as Certificate Transparency's own tests have it: the leaves, and the root over the first n.
LEAVES = [bytes.fromhex(text) for text in (
    "", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f",
)]  # fmt: skip
ROOTS = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]


def entry(number: int = 0) -> AuditEntry:
    return AuditEntry(actor="ada", tenant="acme", action="sandbox.create", target=f"sbx-{number}", decision="allow")


async def write(root: Path, count: int, start: int = 0, **options: Any) -> None:
    log = await AuditLog.open(root, "tartarus.test/log", **options)
    for number in range(start, start + count):
        await log.append(entry(number), durable=number == start + count - 1)
    await log.close()


def test_the_tree_is_that_of_the_rfc() -> None:
    tree = merkle.Tree()
    assert tree.root() == hashlib.sha256(b"").digest()
    hashes = [merkle.leaf_hash(leaf) for leaf in LEAVES]
    for leaf, root in zip(hashes, ROOTS, strict=True):
        tree.add(leaf)
        assert tree.root().hex() == root
    proof = merkle.inclusion_proof(hashes.__getitem__, 5, 8)
    assert [part.hex()[:16] for part in proof] == ["bc1a0643b12e4d2d", "ca854ea128ed050b", "d37ee418976dd957"]


@settings(max_examples=100)
@given(st.integers(1, 70), st.data())
def test_proofs_hold_for_what_is_so_and_nothing_else(size: int, data: st.DataObject) -> None:
    hashes = [merkle.leaf_hash(bytes([number])) for number in range(size)]
    root = merkle.range_root(hashes.__getitem__, 0, size)
    index, old = data.draw(st.integers(0, size - 1)), data.draw(st.integers(1, size))
    proof = merkle.inclusion_proof(hashes.__getitem__, index, size)
    assert merkle.verify_inclusion(hashes[index], index, size, proof, root)
    assert not merkle.verify_inclusion(hashes[index][::-1], index, size, proof, root)
    if size > 1:
        assert not merkle.verify_inclusion(hashes[index], (index + 1) % size, size, proof, root)
        assert not merkle.verify_inclusion(hashes[index], index, size, proof[1:], root)
    old_root = merkle.range_root(hashes.__getitem__, 0, old)
    steps = merkle.consistency_proof(hashes.__getitem__, old, size)
    assert merkle.verify_consistency(old, old_root, size, root, steps)
    assert not merkle.verify_consistency(old, old_root[::-1], size, root, steps)


texts = st.text(max_size=40)


@given(
    st.builds(
        AuditEntry,
        actor=texts,
        tenant=texts,
        action=texts,
        reason=texts,
        summary=texts,
        duration_us=st.integers(0, 2**53),
    )
)
def test_the_canonical_form_is_that_of_rfc_8785(given_entry: AuditEntry) -> None:
    written = place(given_entry, 3, 1_700_000_000_000, "ab" * 32)
    values = json.loads(line_of(written))
    assert rfc8785.dumps(values) + b"\n" == line_of(written)
    claimed = values.pop("hash")
    assert hashlib.sha256(rfc8785.dumps(values)).hexdigest() == claimed == hash_of(written)
    assert read_line(line_of(written)) == written


def test_what_has_no_form_in_utf_8_is_written_all_the_same() -> None:
    written = place(AuditEntry(actor="a\ud800", tenant="t" * 5000, action="x"), 0, 0, "0" * 64)
    assert (written.actor, len(written.tenant)) == ("a?", 256)
    assert read_line(line_of(written)) == written


async def test_written_read_verified_and_proved_to_a_stranger(tmp_path: Path) -> None:
    await write(tmp_path, 50)
    await write(tmp_path, 30, start=50)
    assert [one.target for one in reading.entries(tmp_path)] == [f"sbx-{number}" for number in range(80)]
    assert reading.verify(tmp_path).findings == ()
    key = (tmp_path / "key.pub").read_text()
    for sequence in (0, 1, 49, 50, 79):
        proof = reading.prove(tmp_path, sequence)
        assert proof.entry.sequence == sequence
        carried = msgspec.json.decode(msgspec.json.encode(proof), type=AuditProof)
        assert reading.check_proof(carried, key)
        forged = msgspec.structs.replace(proof.entry, decision="deny")
        rehashed = msgspec.structs.replace(forged, hash=hash_of(forged))
        for lie in (forged, rehashed):
            assert not reading.check_proof(msgspec.structs.replace(proof, entry=lie), key)
    with pytest.raises(ValueError, match="no checkpoint covers"):
        reading.prove(tmp_path, 80)
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600


def segment(root: Path) -> Path:
    (found,) = files.segments(root / "log")
    return found


def edit(root: Path) -> None:
    path = segment(root)
    path.write_bytes(path.read_bytes().replace(b'sbx-7"', b'sbx-8"', 1))


def lines(root: Path, change: Callable[[list[bytes]], list[bytes]]) -> None:
    path = segment(root)
    path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))


def rehash(root: Path, keep: Callable[[int], bool] = lambda _: True) -> None:
    """Someone who can write everything but has no key: all hashes made anew, the file of hashes too."""
    made: list[bytes] = []
    previous = "0" * 64
    for written in list(reading.entries(root)):
        if keep(written.sequence):
            bare = AuditEntry(**{name: getattr(written, name) for name in AuditEntry.__struct_fields__})
            again = place(bare, len(made), written.time_ms, previous)
            made.append(line_of(again))
            previous = again.hash
    segment(root).write_bytes(b"".join(made))
    (root / "log" / "leaves").write_bytes(b"".join(merkle.leaf_hash(line[:-1]) for line in made))


def forge_index(root: Path) -> None:
    path = root / "log" / "leaves"
    content = bytearray(path.read_bytes())
    content[32 * 5] ^= 1
    path.write_bytes(content)


def cut_tail(root: Path) -> None:
    lines(root, lambda found: found[:-3])
    os.truncate(root / "log" / "leaves", 32 * 37)


ATTACKS: dict[str, Callable[[Path], None]] = {
    "edit": edit,
    "insert": lambda root: lines(root, lambda found: [*found[:5], found[5], *found[5:]]),
    "delete": lambda root: lines(root, lambda found: [*found[:5], *found[6:]]),
    "cut the tail": cut_tail,
    "swap two": lambda root: lines(root, lambda found: [*found[:5], found[6], found[5], *found[7:]]),
    "hash all anew": lambda root: rehash(root, lambda number: number != 5),
    "forge the hashes": forge_index,
    "not canonical": lambda root: lines(root, lambda found: [found[0].replace(b",", b", ", 1), *found[1:]]),
    "everything gone": lambda root: segment(root).unlink(),
    "an empty file": lambda root: os.truncate(segment(root), 0),
}


@pytest.mark.parametrize("attack", ATTACKS)
async def test_every_change_is_noticed(tmp_path: Path, attack: str) -> None:
    await write(tmp_path, 40)
    ATTACKS[attack](tmp_path)
    assert reading.verify(tmp_path).findings != ()


async def test_a_log_rolled_back_as_a_whole_is_noticed_by_its_witness(tmp_path: Path) -> None:
    root, witness = tmp_path / "audit", tmp_path / "elsewhere"
    log = await AuditLog.open(root, "tartarus.test/log", witness=file_witness(witness))
    await log.append(entry(), durable=True)
    await log.close()
    early = {path: path.read_bytes() for path in (root / "log").iterdir()}
    log = await AuditLog.open(root, "tartarus.test/log", witness=file_witness(witness))
    await log.append(entry(1), durable=True)
    await log.close()
    taken = reading.witnessed(witness)
    assert (len(taken), reading.verify(root, taken).findings) == (2, ())
    for path, content in early.items():
        path.write_bytes(content)
    assert reading.verify(root).findings == ()  # it holds together; only who looked from outside knows better
    assert [one.what for one in reading.verify(root, taken).findings] == ["entries 1 to 1 were signed and are gone"]


@pytest.mark.parametrize(
    "attack", ["edit", "delete", "cut the tail", "hash all anew", "everything gone", "an empty file"]
)
async def test_a_broken_log_is_set_aside_said_and_a_new_one_begun(tmp_path: Path, attack: str) -> None:
    await write(tmp_path, 40)
    ATTACKS[attack](tmp_path)
    log = await AuditLog.open(tmp_path, "tartarus.test/log")
    await log.append(entry(1), durable=True)
    await log.close()
    first, second = reading.entries(tmp_path)
    assert (first.action, first.decision, second.target) == ("audit.break", "error", "sbx-1")
    assert reading.verify(tmp_path).findings == ()
    assert len(list(tmp_path.glob("broken-*/leaves"))) == 1


async def test_a_torn_last_line_is_cut_off_and_lost_hashes_are_made_anew(tmp_path: Path) -> None:
    log = await AuditLog.open(tmp_path, "tartarus.test/log")
    for number in range(10):
        await log.append(entry(number), durable=True)
    # As a crash leaves it: no checkpoint yet, half a line, hashes behind the entries.
    content = segment(tmp_path).read_bytes()
    await log.close()
    (tmp_path / "log" / "checkpoints").unlink()
    segment(tmp_path).write_bytes(content + b'{"action":"half')
    os.truncate(tmp_path / "log" / "leaves", 32 * 7 + 5)
    await write(tmp_path, 1, start=10)
    assert [one.target for one in reading.entries(tmp_path)] == [f"sbx-{number}" for number in range(11)]
    assert reading.verify(tmp_path).findings == ()


async def test_segments_are_packed_and_let_go_and_the_rest_still_verifies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "SEGMENT_BYTES", 2500)
    for start in range(0, 60, 10):
        await write(tmp_path, 10, start)
    found = files.segments(tmp_path / "log")
    assert [path.suffix for path in found] == [".zst"] * (len(found) - 1) + [".jsonl"]
    assert len(found) > 3
    assert reading.verify(tmp_path).findings == ()
    early = reading.prove(tmp_path, 2)
    for start in range(60, 90, 10):
        await write(tmp_path, 10, start, retention=Retention(size_bytes=1500))
    assert len(files.segments(tmp_path / "log")) < len(found)
    assert reading.verify(tmp_path).findings == ()
    assert any(one.action == "audit.retention" for one in reading.entries(tmp_path))
    assert reading.check_proof(early, (tmp_path / "key.pub").read_text())
    with pytest.raises(ValueError, match="was let go"):
        reading.prove(tmp_path, 2)
    # Somebody else who lets the oldest go has no entry that says so.
    files.segments(tmp_path / "log")[0].unlink()
    assert "nothing says that they were let go" in reading.verify(tmp_path).findings[0].what


async def test_only_one_process_writes(tmp_path: Path) -> None:
    log = await AuditLog.open(tmp_path, "tartarus.test/log")
    with pytest.raises(DaemonUnavailable):
        await AuditLog.open(tmp_path, "tartarus.test/log")
    await log.close()
    with pytest.raises(DaemonUnavailable):
        await log.append(entry())


async def test_a_full_disk_refuses_what_must_be_durable_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = await AuditLog.open(tmp_path, "tartarus.test/log")
    await log.append(entry(0), durable=True)
    real, full = os.write, True

    def write_or_fail(fd: int, content: bytes) -> int:
        if full and fd in {log._files._segment, log._files._leaves}:
            # Half of it gets there, as on a real disk.
            real(fd, bytes(content[: len(content) // 2]))
            raise OSError(28, "No space left on device")
        return real(fd, content)

    monkeypatch.setattr(os, "write", write_or_fail)
    await log.append(entry(1))
    with pytest.raises(DaemonUnavailable, match="No space left"):
        await log.append(entry(2), durable=True)
    full = False
    await log.append(entry(3), durable=True)
    await log.close()
    assert [one.target for one in reading.entries(tmp_path)] == ["sbx-0", "sbx-1", "sbx-2", "sbx-3"]
    assert reading.verify(tmp_path).findings == ()


WRITER = """
import asyncio, structlog, sys
from pathlib import Path
from tartarus.model.audit import AuditEntry
from tartarus.store.audit import log, writing
writing.SEGMENT_BYTES = 20_000
log.CHECKPOINT_ENTRIES = 7
async def main():
    audit = await log.AuditLog.open(Path(sys.argv[1]), "tartarus.test/log", retention=writing.Retention(size_bytes=40_000))
    number = 0
    while True:
        await audit.append(AuditEntry(actor="a", tenant="t", action="x", target=str(number)), durable=True)
        print(number, flush=True)
        number += 1
structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
asyncio.run(main())
"""


async def test_what_was_durable_survives_sigkill(tmp_path: Path) -> None:
    said = 0
    for _ in range(3):
        writer = await asyncio.create_subprocess_exec(
            sys.executable, "-c", WRITER, str(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert writer.stdout is not None
        for _ in range(random.randint(1, 400)):
            assert await writer.stdout.readline()
            said += 1
        writer.send_signal(signal.SIGKILL)
        said += len((await writer.communicate())[0].splitlines())
        found = list(reading.entries(tmp_path))
        # One more than each writer said may be there, and what the log says of itself.
        assert said <= found[-1].sequence + 1 <= said + 4 + said // 20
        assert all(one.action in {"x", "audit.retention"} for one in found)
        assert reading.verify(tmp_path).findings == ()
    assert not list(tmp_path.glob("broken-*"))


def test_notes_of_others_are_refused() -> None:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from tartarus.store.audit.notes import Signer

    ours, theirs = (Signer("tartarus.test/log", Ed25519PrivateKey.generate()) for _ in range(2))
    verifier = Verifier(ours.verifier_text)
    checkpoint = Checkpoint("tartarus.test/log", 5, b"r" * 32)
    note = ours.sign(checkpoint)
    assert verifier.open(note) == checkpoint
    for bad in (theirs.sign(checkpoint), note.replace(b"\n5\n", b"\n6\n"), note[:-10], b"", note.split(b"\n\n")[0]):
        with pytest.raises(ValueError):
            verifier.open(bad)
    other = Signer("other", Ed25519PrivateKey.generate())
    for bad_key in ("", "a+b+c", other.verifier_text.replace("other", "tartarus.test/log")):
        with pytest.raises(ValueError):
            Verifier(bad_key)


async def test_nobody_reads_a_log_that_is_being_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await write(tmp_path, 40)
    ATTACKS["edit"](tmp_path)
    really = writing.LogFiles.open

    def slowly(self: writing.LogFiles) -> str:
        time.sleep(0.1)
        return really(self)

    monkeypatch.setattr(writing.LogFiles, "open", slowly)
    log = await AuditLog.open(tmp_path, "tartarus.test/log")
    try:
        await log.flush()
        assert reading.find(tmp_path, AuditQuery(action="audit.break")).entries
    finally:
        await log.close()


@pytest.mark.parametrize("text", ["\x01", '"', "\U0001f600", "\u2028", "a"])
async def test_no_text_makes_a_line_that_cannot_be_read_again(tmp_path: Path, text: str) -> None:
    hostile = text * 100_000
    values: dict[str, Any] = {}
    values |= dict.fromkeys(AuditEntry.__struct_fields__, hostile)
    values |= {"rules": (hostile,) * 1000, "duration_us": 2**200}
    made = AuditEntry(**values)
    assert len(line_of(place(made, 2**53 - 1, 2**53 - 1, "f" * 64))) < MAX_LINE
    log = await AuditLog.open(tmp_path, "tartarus.test/log")
    await log.append(made, durable=True)
    await log.close()
    await write(tmp_path, 1)
    assert len(list(reading.entries(tmp_path))) == 2
    assert reading.verify(tmp_path).findings == ()


async def packed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A log of several segments."""
    monkeypatch.setattr(writing, "SEGMENT_BYTES", 2500)
    for start in range(0, 40, 10):
        await write(root, 10, start)


@pytest.mark.parametrize("lost", ["edge", "leaves", "both"])
async def test_what_is_made_of_entries_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str) -> None:
    await packed(tmp_path, monkeypatch)
    for name in ("edge", "leaves") if lost == "both" else (lost,):
        (tmp_path / "log" / name).unlink()
    await write(tmp_path, 3, 40)
    assert [one.target for one in reading.entries(tmp_path)] == [f"sbx-{number}" for number in range(43)]
    assert reading.verify(tmp_path).findings == ()


async def test_a_forged_edge_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await packed(tmp_path, monkeypatch)
    path = tmp_path / "log" / "edge"
    size, edge = json.loads(path.read_text())
    path.write_text(json.dumps([size, ["00" * 32 for _ in edge]]))
    await write(tmp_path, 3, 40)
    assert reading.verify(tmp_path).findings == ()
    # With the segments before it changed as well, there is nothing left to go on from.
    first = files.segments(tmp_path / "log")[0]
    first.unlink()
    (tmp_path / "log" / "leaves").write_bytes(b"")
    (tmp_path / "log" / "edge").unlink()
    await write(tmp_path, 1)
    assert [one.action for one in reading.entries(tmp_path)] == ["audit.break", "sandbox.create"]


@pytest.mark.parametrize("attack", ["checkpoint of what was let go", "hash of what was let go", "middle segment"])
async def test_what_is_before_the_last_segment_is_verified_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attack: str
) -> None:
    await packed(tmp_path, monkeypatch)
    for start in range(40, 70, 10):
        await write(tmp_path, 10, start, retention=Retention(size_bytes=1500))
    assert reading.verify(tmp_path).first > 0
    checkpoints, leaves = tmp_path / "log" / "checkpoints", tmp_path / "log" / "leaves"
    if attack == "middle segment":
        files.segments(tmp_path / "log")[1].unlink()
    elif attack == "hash of what was let go":
        content = bytearray(leaves.read_bytes())
        content[40] ^= 1
        leaves.write_bytes(content)
    else:
        checkpoints.write_bytes(checkpoints.read_bytes()[1:])
    assert reading.verify(tmp_path).findings != ()


@pytest.mark.parametrize("torn", [1, 2, 3, 60, 150])
async def test_a_torn_checkpoint_is_cut_off(tmp_path: Path, torn: int) -> None:
    await write(tmp_path, 5)
    await write(tmp_path, 5, 5)
    checkpoints = tmp_path / "log" / "checkpoints"
    checkpoints.write_bytes(checkpoints.read_bytes()[:-torn])
    await write(tmp_path, 5, 10)
    verified = reading.verify(tmp_path)
    assert (verified.findings, verified.size, verified.signed) == ((), 15, 15)
    assert not list(tmp_path.glob("broken-*"))


async def test_a_key_that_is_none_begins_a_new_log(tmp_path: Path) -> None:
    await write(tmp_path, 5)
    (tmp_path / "key").write_bytes(b"short")
    await write(tmp_path, 1)
    assert [one.action for one in reading.entries(tmp_path)] == ["audit.break", "sandbox.create"]
    # Who kept the public key sees that it is another's log.
    kept = next(tmp_path.glob("broken-*/checkpoints")).read_bytes()
    assert reading.verify(tmp_path, [kept]).findings[0].what == "it is not signed by this log"


async def test_a_log_keeps_the_name_that_it_began_with(tmp_path: Path) -> None:
    await write(tmp_path, 5)
    log = await AuditLog.open(tmp_path, "tartarus.other/log")
    await log.append(entry(5), durable=True)
    await log.close()
    assert reading.verify(tmp_path).findings == ()
    assert "tartarus.test/log+" in reading.verify(tmp_path).key


async def test_a_witness_that_hangs_or_fails_holds_nothing_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "CHECKPOINT_ENTRIES", 1)
    go_on, told = threading.Event(), []

    def witness(note: bytes) -> None:
        told.append(note)
        if len(told) == 1:
            go_on.wait(30)
            raise ConnectionError("nobody there")

    log = await AuditLog.open(tmp_path, "tartarus.test/log", witness=witness)
    for number in range(5):
        await log.append(entry(number), durable=True)
    go_on.set()
    await log.close()
    assert reading.verify(tmp_path, told[-1:]).findings == ()
    assert b"\n5\n" in told[-1]


async def test_one_tenants_flood_keeps_no_other_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "_MOST_OF_A_TENANT", 10)
    monkeypatch.setattr(log_module, "_MAX_WAITING", 40)
    full = threading.Event()
    write = writing.LogFiles.write

    def slow(self: writing.LogFiles, batch: Any) -> Any:
        full.wait(10)
        return write(self, batch)

    monkeypatch.setattr(writing.LogFiles, "write", slow)
    log = await AuditLog.open(tmp_path, "tartarus.test/log")

    def said(tenant: str) -> AuditEntry:
        return msgspec.structs.replace(entry(), tenant=tenant)

    for _ in range(10):
        log.add(said("greedy"))
    for _ in range(5):
        with pytest.raises(DaemonUnavailable, match="too many of yours"):
            log.add(said("greedy"))
    for _ in range(10):
        log.add(said("other"))
    durable = asyncio.create_task(log.append(said("greedy"), durable=True))
    await asyncio.sleep(0)
    full.set()
    await durable
    await log.flush()
    log.add(said("greedy"))
    await log.close()
    entries = reading.find(tmp_path, AuditQuery(limit=100)).entries
    assert sum(one.tenant == "greedy" and one.action != log_module.GAP for one in entries) == 12
    (gap,) = [one for one in entries if one.action == log_module.GAP]
    assert (gap.tenant, gap.reason) == ("greedy", "5 entries of greedy were lost: the disk could not keep up")
    assert reading.verify(tmp_path).findings == ()


async def test_a_writer_that_breaks_lets_nobody_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(writing.LogFiles, "write", broken)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    log = await AuditLog.open(tmp_path, "tartarus.test/log")
    with pytest.raises(DaemonUnavailable, match="ZeroDivisionError"):
        await log.append(entry(), durable=True)
    with pytest.raises(DaemonUnavailable):
        log.add(entry())
    await log.close()


async def test_found_by_what_they_are_the_newest_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await packed(tmp_path, monkeypatch)
    page = reading.find(tmp_path, AuditQuery(limit=3, action="sandbox"))
    assert ([one.sequence for one in page.entries], page.next_before) == ([39, 38, 37], 37)
    rest = reading.find(tmp_path, AuditQuery(limit=1000, before=page.next_before))
    assert (len(rest.entries), rest.next_before) == (37, None)
    assert reading.find(tmp_path, AuditQuery(target="sbx-3", sandbox="sbx-3")).entries[0].sequence == 3
    for other in (AuditQuery(action="sand"), AuditQuery(tenant="x"), AuditQuery(since_ms=2**50)):
        assert reading.find(tmp_path, other).entries == ()
    monkeypatch.setattr(reading, "_MOST_LOOKED_AT", 10)
    page = reading.find(tmp_path, AuditQuery(target="sbx-3"))
    assert (page.entries, page.next_before) == ((), 30)


async def test_it_is_read_and_verified_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "SEGMENT_BYTES", 20_000)
    monkeypatch.setattr(log_module, "CHECKPOINT_ENTRIES", 50)
    log = await AuditLog.open(tmp_path, "tartarus.test/log", retention=Retention(size_bytes=20_000))
    await log.append(entry(), durable=True)
    done = threading.Event()
    findings: list[object] = []

    def look() -> None:
        while not done.is_set():
            findings.extend(reading.verify(tmp_path).findings)
            assert reading.find(tmp_path, AuditQuery()).entries

    looking = asyncio.create_task(asyncio.to_thread(look))
    for number in range(1500):
        await log.append(entry(number), durable=not number % 20)
    done.set()
    await looking
    await log.close()
    assert findings == []
    assert reading.verify(tmp_path).first > 0
