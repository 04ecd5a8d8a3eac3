"""Opening the SQLite database: pragmas, and migrations when the recorded schema is not the newest.

Alembic is imported only when there is something to migrate: a daemon that starts on an
up-to-date database reads one row instead.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import create_engine, event, text
from sqlalchemy.exc import DBAPIError

from tartarus.model.errors import NoSpace, TartarusError, VersionMismatch
from tartarus.store.schema import SCHEMA_VERSION

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection, Engine

BUSY_TIMEOUT_MS = 5000
# Pages of 4 KiB in the write-ahead log before it is folded into the database.
CHECKPOINT_PAGES = 2000


def open_engine(path: Path, *, read_only: bool = False) -> Engine:
    """An engine on the database file `path`; each thread that uses it keeps its own connection.

    Write-ahead logging with synchronous=NORMAL: a committed change survives the death of this process
    at any moment; after a power cut the newest ones may be missing, and every sandbox is gone then anyway.
    """
    engine = create_engine(
        f"sqlite:///{path}",
        connect_args={"check_same_thread": False, "isolation_level": None, "cached_statements": 256},
        query_cache_size=256,
    )

    @event.listens_for(engine, "connect")
    def prepare(raw: Any, _record: Any) -> None:
        cursor = raw.cursor()
        cursor.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}")
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=NORMAL")
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.execute(f"PRAGMA wal_autocheckpoint={CHECKPOINT_PAGES}")
        cursor.execute("PRAGMA journal_size_limit=16777216")
        if read_only:
            cursor.execute("PRAGMA query_only=ON")
        cursor.close()

    # The driver's own transaction handling would let DDL escape the transaction; see SQLAlchemy's pysqlite notes.
    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")

    return engine


def recorded_version(connection: Connection) -> str | None:
    """The schema revision that the database says it has, or None for a fresh one."""
    exists = connection.execute(text("SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'")).first()
    row = connection.execute(text("SELECT version_num FROM alembic_version")).first() if exists else None
    return None if row is None else str(row[0])


def migrate(engine: Engine, path: Path) -> bool:
    """Bring the database to SCHEMA_VERSION; True when anything had to be done.

    Raises VersionMismatch when a newer Tartarus wrote it.
    """
    with engine.connect() as connection:
        version = recorded_version(connection)
    if version == SCHEMA_VERSION:
        return False

    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    known = {revision.revision for revision in ScriptDirectory.from_config(config).walk_revisions()}
    if version is not None and version not in known:
        raise VersionMismatch(
            f"{path} has schema {version}, which this Tartarus does not know",
            why="a newer version wrote it",
            fix="upgrade Tartarus, or move the file away to start afresh",
        )
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
    return True


def storage_error(error: Exception, path: Path) -> TartarusError:
    """What a failed statement means to the user."""
    cause = str(error.orig) if isinstance(error, DBAPIError) else str(error)
    if "full" in cause or "disk I/O" in cause:
        return NoSpace(f"can't write {path}", why=cause, fix="free some disk space and try again")
    fix = "check the file and its rights"
    if "not a database" in cause or "malformed" in cause:
        fix = "put a copy back, or move it away to start afresh: sandboxes do not depend on it"
    return TartarusError(f"the state database {path} can't be used", why=cause, fix=fix)
