"""The file: migrations from empty, refusal of what a newer version wrote, and death in the middle of writing."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import text

from tartarus.model.errors import NoSpace, TartarusError, VersionMismatch
from tartarus.model.states import State
from tartarus.store import SandboxStore, database
from tartarus.store.schema import SCHEMA_VERSION, metadata

from .conftest import a_record

pytestmark = pytest.mark.anyio
MIGRATIONS = Path(database.__file__).parent / "migrations"


def test_the_schema_version_is_the_newest_migration() -> None:
    assert ScriptDirectory(str(MIGRATIONS)).get_current_head() == SCHEMA_VERSION


def test_migrations_from_empty_give_the_schema_of_the_code(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    engine = database.open_engine(path)
    assert database.migrate(engine, path) is True
    assert database.migrate(engine, path) is False
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, metadata) == []
        made = {
            row[0]: row[1]
            for row in connection.execute(text("SELECT name, sql FROM sqlite_master WHERE type = 'index'"))
            if row[1]
        }
    engine.dispose()
    fresh = database.open_engine(tmp_path / "fresh.db")
    with fresh.begin() as connection:
        metadata.create_all(connection)
        expected = {
            row[0]: row[1]
            for row in connection.execute(text("SELECT name, sql FROM sqlite_master WHERE type = 'index'"))
            if row[1]
        }
    fresh.dispose()
    assert made == expected


def test_an_up_to_date_database_opens_without_alembic(tmp_path: Path) -> None:
    program = (
        "import asyncio, pathlib, sys\n"
        "from tartarus.store import SandboxStore\n"
        "async def main():\n"
        "    store = await SandboxStore.open(pathlib.Path(sys.argv[1]))\n"
        "    await store.close()\n"
        "asyncio.run(main())\n"
        "print('alembic' in sys.modules)\n"
    )
    path = str(tmp_path / "state.db")
    answers = [
        subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, check=True).stdout.strip()
        for _ in range(2)
    ]
    assert answers == ["True", "False"]


async def test_a_newer_database_is_refused_and_untouched(path: Path) -> None:
    await (await SandboxStore.open(path)).close()
    engine = database.open_engine(path)
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    engine.dispose()
    with pytest.raises(VersionMismatch, match="9999"):
        await SandboxStore.open(path)
    engine = database.open_engine(path)
    with engine.connect() as connection:
        assert database.recorded_version(connection) == "9999"
    engine.dispose()


async def test_a_file_that_is_no_database_is_refused_clearly(path: Path) -> None:
    path.parent.mkdir(parents=True)
    path.write_bytes(b"this is not a database" * 100)
    with pytest.raises(TartarusError, match="can't be used"):
        await SandboxStore.open(path)


async def test_records_survive_reopening(path: Path) -> None:
    store = await SandboxStore.open(path)
    record = await store.insert(a_record(name="kept", labels={"a": "b"}), State.SCHEDULED)
    await store.close()
    store = await SandboxStore.open(path)
    assert await store.get("uid-1", "kept") == record
    await store.close()


WRITER = """
import asyncio, pathlib, sys
from tartarus.model.ids import new_id
from tartarus.model.sandbox import Isolation, SandboxRecord, SandboxSpec
from tartarus.model.states import State
from tartarus.store import SandboxStore

def a_record():
    return SandboxRecord(
        id=new_id("sbx"), tenant="uid-1", name="", template="host", isolation=Isolation.PROCESS,
        isolation_reason="", state=State.PENDING, spec=SandboxSpec(labels={"k": "v"}), created_at=1.0)

async def one(store):
    record = await store.insert(a_record())
    print("inserted", record.id, flush=True)
    await store.transition(record.id, {State.PENDING}, State.SCHEDULED, State.STARTING, State.RUNNING)
    print("running", record.id, flush=True)

async def main():
    store = await SandboxStore.open(pathlib.Path(sys.argv[1]))
    while True:
        await asyncio.gather(*(one(store) for _ in range(8)))

asyncio.run(main())
"""


@pytest.mark.parametrize("lines_before_the_kill", [1, 40, 333])
async def test_killing_the_writer_loses_nothing_that_it_had_acknowledged(
    path: Path, lines_before_the_kill: int
) -> None:
    said: list[list[str]] = []
    with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        for line in writer.stdout:
            if line.endswith("\n"):  # the last one may be cut short
                said.append(line.split())
            if len(said) == lines_before_the_kill:
                os.kill(writer.pid, signal.SIGKILL)
    engine = database.open_engine(path)
    with engine.connect() as connection:
        assert connection.execute(text("PRAGMA integrity_check")).scalar() == "ok"
        assert connection.execute(text("PRAGMA foreign_key_check")).all() == []
        labels = connection.execute(text("SELECT count(*) FROM sandbox_labels")).scalar()
    engine.dispose()
    store = await SandboxStore.open(path)
    records = {record.id: record for record in await store.alive()}
    assert labels == len(records)
    for word, sandbox_id in said:
        if word == "running":
            assert records[sandbox_id].state is State.RUNNING
        else:
            assert records[sandbox_id].state in {State.PENDING, State.RUNNING}
    assert all(
        (record.state, record.version) in {(State.PENDING, 0), (State.RUNNING, 3)} for record in records.values()
    )
    await store.insert(a_record())
    await store.close()


@pytest.mark.needs("root")
async def test_a_full_disk_refuses_changes_and_keeps_what_was_there(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], check=True)
    try:
        store = await SandboxStore.open(disk / "state.db")
        first = await store.insert(a_record())
        filler = disk / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * 4096)
        inserted = [first.id]

        async def insert_for_ever() -> None:
            while True:
                inserted.append((await store.insert(a_record(message="m" * 2000))).id)

        with pytest.raises(NoSpace, match=r"state\.db"):
            await insert_for_ever()
        assert [record.id for record in await store.alive()] == inserted
        filler.unlink()
        inserted.append((await store.insert(a_record())).id)
        assert [record.id for record in await store.alive()] == inserted
        await store.close()
    finally:
        subprocess.run(["umount", str(disk)], check=True)
