"""The tables as SQLAlchemy Core sees them; `migrations/` is what creates them."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    text,
)

# The newest revision in `migrations/versions`; a test holds the two together. Bump it with each migration.
SCHEMA_VERSION = "0005"

metadata = MetaData()

sandboxes = Table(
    "sandboxes",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("tenant", String(128), nullable=False),
    Column("name", String(63), nullable=False),
    Column("template", String(128), nullable=False),
    Column("isolation", String(16), nullable=False),
    Column("isolation_reason", Text, nullable=False),
    Column("state", String(16), nullable=False),
    Column("spec", LargeBinary, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("started_at", Float),
    Column("ended_at", Float),
    Column("start_ms", Float),
    Column("warm", Boolean(create_constraint=False), nullable=False),
    Column("exit_code", Integer),
    Column("exit_signal", Integer),
    Column("reason", String(32)),
    Column("message", Text, nullable=False),
    Column("saved", String(128), nullable=False, server_default=text("''")),
    Column("version", Integer, nullable=False),
)

sandbox_labels = Table(
    "sandbox_labels",
    metadata,
    Column("sandbox_id", String(32), ForeignKey("sandboxes.id", ondelete="CASCADE"), primary_key=True),
    Column("key", Text, primary_key=True),
    Column("value", Text, nullable=False),
)

templates = Table(
    "templates",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("tenant", String(128), nullable=False),
    Column("name", String(63), nullable=False),
    Column("status", String(16), nullable=False),
    # JSON: as its author wrote it.
    Column("definition", LargeBinary, nullable=False),
    Column("base", Text, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("updated_at", Float, nullable=False),
    Column("build", Integer, nullable=False),
    Column("message", Text, nullable=False),
    Column("digest", String(128), nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("layers", LargeBinary, nullable=False),
    Column("warm_up", LargeBinary, nullable=False),
    Column("warmed_at", Float),
    Column("warm_ms", Float),
    Column("warm_error", Text, nullable=False),
    Column("details", LargeBinary, nullable=False),
    Column("revision", Integer, nullable=False),
)

snapshots = Table(
    "snapshots",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("tenant", String(128), nullable=False),
    Column("name", String(63), nullable=False),
    # What it was taken of; both may be gone by now.
    Column("sandbox", String(32), nullable=False),
    Column("template", String(128), nullable=False),
    Column("digest", String(128), nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("labels", LargeBinary, nullable=False),
    Column("layers", LargeBinary, nullable=False),
    Column("details", LargeBinary, nullable=False),
    Column("revision", Integer, nullable=False),
)

policy_versions = Table(
    "policy_versions",
    metadata,
    Column("id", String(63), primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("text", Text, nullable=False),
    Column("digest", String(64), nullable=False),
    Column("author", String(128), nullable=False),
    Column("comment", Text, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("deleted", Boolean(create_constraint=False), nullable=False),
)

lamentations = Table(
    "lamentations",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("tenant", String(128), nullable=False),
    Column("sandbox_id", String(32), nullable=False),
    Column("template", String(128), nullable=False),
    Column("timestamp", Float, nullable=False),
    Column("category", String(32), nullable=False),
    Column("fault", String(16), nullable=False),
    Column("message", Text, nullable=False),
    Column("stack_trace", Text, nullable=False),
    Column("metadata", LargeBinary, nullable=False),
    Column("dead_letter", Boolean(create_constraint=False), nullable=False),
    Column("retried_as", String(32), nullable=False),
    # JSON: what was asked for, of those that never ran.
    Column("spec", LargeBinary),
)

# Alive is "has not ended": the store sets `ended_at` in the same statement as the terminal state.
_ALIVE = text("ended_at IS NULL")
_NAMED_ALIVE = text("name <> '' AND ended_at IS NULL")
_ENDED = text("ended_at IS NOT NULL")

# One live sandbox per tenant and name; ended ones may share it.
Index(
    "ix_sandboxes_live_name",
    sandboxes.c.tenant,
    sandboxes.c.name,
    unique=True,
    sqlite_where=_NAMED_ALIVE,
)
Index("ix_sandboxes_listing", sandboxes.c.tenant, sandboxes.c.created_at, sandboxes.c.id)
# Few of the many rows are alive: this keeps `alive()` and `ps` independent of history.
Index("ix_sandboxes_alive", sandboxes.c.created_at, sqlite_where=_ALIVE)
Index("ix_sandboxes_ended", sandboxes.c.ended_at, sqlite_where=_ENDED)
Index("ix_sandbox_labels_pair", sandbox_labels.c.key, sandbox_labels.c.value)
# A template's name is its tenant's own; so is a snapshot's, if it has one.
Index("ix_templates_name", templates.c.tenant, templates.c.name, unique=True)
Index("ix_snapshots_name", snapshots.c.tenant, snapshots.c.name, unique=True, sqlite_where=text("name <> ''"))
Index("ix_snapshots_listing", snapshots.c.tenant, snapshots.c.created_at, snapshots.c.id)
Index("ix_lamentations_listing", lamentations.c.tenant, lamentations.c.timestamp, lamentations.c.id)
Index("ix_lamentations_age", lamentations.c.timestamp)
