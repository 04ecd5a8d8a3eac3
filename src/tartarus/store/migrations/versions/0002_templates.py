"""Templates and snapshots of users."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create both tables and their indexes."""
    op.create_table(
        "templates",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("tenant", sa.String(128), nullable=False),
        sa.Column("name", sa.String(63), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("definition", sa.LargeBinary, nullable=False),
        sa.Column("base", sa.Text, nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("updated_at", sa.Float, nullable=False),
        sa.Column("build", sa.Integer, nullable=False),
        sa.Column("message", sa.Text, nullable=False),
        sa.Column("digest", sa.String(128), nullable=False),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        sa.Column("layers", sa.LargeBinary, nullable=False),
        sa.Column("warm_up", sa.LargeBinary, nullable=False),
        sa.Column("warmed_at", sa.Float),
        sa.Column("warm_ms", sa.Float),
        sa.Column("warm_error", sa.Text, nullable=False),
        sa.Column("details", sa.LargeBinary, nullable=False),
        sa.Column("revision", sa.Integer, nullable=False),
    )
    op.create_table(
        "snapshots",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("tenant", sa.String(128), nullable=False),
        sa.Column("name", sa.String(63), nullable=False),
        sa.Column("sandbox", sa.String(32), nullable=False),
        sa.Column("template", sa.String(128), nullable=False),
        sa.Column("digest", sa.String(128), nullable=False),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("labels", sa.LargeBinary, nullable=False),
        sa.Column("layers", sa.LargeBinary, nullable=False),
        sa.Column("details", sa.LargeBinary, nullable=False),
        sa.Column("revision", sa.Integer, nullable=False),
    )
    named = sa.text("name <> ''")
    op.create_index("ix_templates_name", "templates", ["tenant", "name"], unique=True)
    op.create_index("ix_snapshots_name", "snapshots", ["tenant", "name"], unique=True, sqlite_where=named)
    op.create_index("ix_snapshots_listing", "snapshots", ["tenant", "created_at", "id"])


def downgrade() -> None:
    """Drop both tables."""
    op.drop_table("snapshots")
    op.drop_table("templates")
