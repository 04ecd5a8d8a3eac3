"""Sandboxes and their labels."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create both tables and their indexes."""
    op.create_table(
        "sandboxes",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("tenant", sa.String(128), nullable=False),
        sa.Column("name", sa.String(63), nullable=False),
        sa.Column("template", sa.String(128), nullable=False),
        sa.Column("isolation", sa.String(16), nullable=False),
        sa.Column("isolation_reason", sa.Text, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("spec", sa.LargeBinary, nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("started_at", sa.Float),
        sa.Column("ended_at", sa.Float),
        sa.Column("start_ms", sa.Float),
        sa.Column("warm", sa.Boolean(create_constraint=False), nullable=False),
        sa.Column("exit_code", sa.Integer),
        sa.Column("exit_signal", sa.Integer),
        sa.Column("reason", sa.String(32)),
        sa.Column("message", sa.Text, nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
    )
    op.create_table(
        "sandbox_labels",
        sa.Column("sandbox_id", sa.String(32), sa.ForeignKey("sandboxes.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("key", sa.Text, primary_key=True),
        sa.Column("value", sa.Text, nullable=False),
    )
    alive = sa.text("ended_at IS NULL")
    ended = sa.text("ended_at IS NOT NULL")
    named_alive = sa.text("name <> '' AND ended_at IS NULL")
    op.create_index(
        "ix_sandboxes_live_name",
        "sandboxes",
        ["tenant", "name"],
        unique=True,
        sqlite_where=named_alive,
    )
    op.create_index("ix_sandboxes_listing", "sandboxes", ["tenant", "created_at", "id"])
    op.create_index("ix_sandboxes_alive", "sandboxes", ["created_at"], sqlite_where=alive)
    op.create_index("ix_sandboxes_ended", "sandboxes", ["ended_at"], sqlite_where=ended)
    op.create_index("ix_sandbox_labels_pair", "sandbox_labels", ["key", "value"])


def downgrade() -> None:
    """Drop both tables."""
    op.drop_table("sandbox_labels")
    op.drop_table("sandboxes")
