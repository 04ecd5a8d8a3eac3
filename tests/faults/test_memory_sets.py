"""The store of memory sets, killed at any moment: what it offers afterwards is whole, and nothing else is left."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from tartarus.images.memory import KeptSet, MemorySets

pytestmark = pytest.mark.anyio
TENANT = "t"

# Keeps, packs, uses, exports and removes sets without end; says each set's record once it may be relied upon.
WRITER = """
import asyncio, hashlib, sys
from pathlib import Path
import msgspec
from tartarus.images.memory import Facts, MemorySets
from tartarus.images.memory.bundle import Seals
from tartarus.model.sandbox import Resources

async def main():
    sets = MemorySets(Path(sys.argv[1]) / "memory", 2**30)
    sets.open()
    seals = Seals(Path(sys.argv[1]) / "keys")
    facts = Facts(isolation="gvisor", needs={}, offer={}, resources=Resources())
    number = 0
    while True:
        number += 1
        async with sets.staging("t") as place:
            with open(place / "memory", "wb") as file:
                file.truncate(2**24)
                for part in range(4):
                    file.seek(part * 2**21)
                    file.write(hashlib.shake_256(b"%d" % (number % 3 + part)).digest(200_000))
            kept = await sets.keep("t", f"{sys.argv[2]}-{number}", place, facts)
        sys.stdout.buffer.write(b"kept " + msgspec.json.encode(kept) + b"\\n")
        sys.stdout.flush()
        if number % 2:
            await sets.cool(0)
        async with sets.taken("t", kept.id, kept.digest) as taken:
            taken.confirm()
        if number % 4 == 3:
            with open(sys.argv[1] + "/file", "wb") as file:
                async for piece in sets.export("t", kept.id, kept.digest, seals):
                    file.write(piece)
            kept = await sets.bring("t", kept.id + "-b", Path(sys.argv[1]) / "file", seals)
            sys.stdout.buffer.write(b"kept " + msgspec.json.encode(kept) + b"\\n")
        if number % 3 == 0:
            sys.stdout.buffer.write(b"gone " + msgspec.json.encode(kept) + b"\\n")
            sys.stdout.flush()
            await sets.remove("t", kept.id)

asyncio.run(main())
"""


async def test_killed_at_any_moment_it_offers_only_what_is_whole(tmp_path: Path) -> None:
    chance = random.Random(4711)
    known: dict[str, KeptSet] = {}
    for round_ in range(8):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), f"r{round_}"], stdout=subprocess.PIPE, text=True
        )
        try:
            assert writer.stdout is not None
            line = writer.stdout.readline()
            time.sleep(chance.random() * 0.4)
        finally:
            writer.send_signal(signal.SIGKILL)
            rest, _ = writer.communicate(timeout=30)
        gone: set[str] = set()
        for said in [line, *rest.splitlines()]:
            word, _, record = said.strip().partition(" ")
            if record.endswith("}"):
                kept = msgspec.json.decode(record, type=KeptSet)
                if word == "gone":
                    gone.add(kept.id)
                else:
                    known[kept.id] = kept
        for name in gone:  # it may have been killed before it began to remove it
            known.pop(name, None)

        sets = MemorySets(tmp_path / "memory", 2**30)
        sets.open()
        assert not [path for path in (tmp_path / "memory").rglob("*") if path.name.startswith(".")]
        for kept in known.values():
            async with sets.taken(TENANT, kept.id, kept.digest) as taken:
                assert taken.facts == kept.facts
                taken.confirm()
        # Nobody knows what was kept and not yet said.
        await sets.sweep(set(known), older_than_s=0)
        assert {path.name for path in (tmp_path / "memory" / TENANT / "sets").iterdir()} == set(known)
    assert len(known) > 4
    for kept in known.values():
        await sets.remove(TENANT, kept.id)
    assert sets.used_bytes() == 0


def test_what_was_being_written_is_gone_when_it_opens_again(tmp_path: Path) -> None:
    one = tmp_path / "memory" / TENANT / "sets" / "one"
    for directory in (one / "maps", one / ".removing-raw", one.with_name(".another-1") / "maps"):
        directory.mkdir(parents=True)
    for left in (
        one / ".packs.json.new",
        one / "maps" / ".memory.new",
        one.with_name(".another-1") / "maps" / ".x.new",
    ):
        left.write_bytes(b"half")
    (one / "maps" / "memory").write_bytes(b"whole")
    MemorySets(tmp_path / "memory", 2**30).open()
    assert [path.name for path in sorted((tmp_path / "memory").rglob("*"))] == [TENANT, "sets", "one", "maps", "memory"]
