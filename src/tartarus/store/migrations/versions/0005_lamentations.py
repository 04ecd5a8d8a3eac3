"""Failed runs, and what was asked for where it never ran."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the table and its indexes."""
    op.create_table(
        "lamentations",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("tenant", sa.String(128), nullable=False),
        sa.Column("sandbox_id", sa.String(32), nullable=False),
        sa.Column("template", sa.String(128), nullable=False),
        sa.Column("timestamp", sa.Float, nullable=False),
        sa.Column("category", sa.String(32), nullable=False),
        sa.Column("fault", sa.String(16), nullable=False),
        sa.Column("message", sa.Text, nullable=False),
        sa.Column("stack_trace", sa.Text, nullable=False),
        sa.Column("metadata", sa.LargeBinary, nullable=False),
        sa.Column("dead_letter", sa.Boolean(create_constraint=False), nullable=False),
        sa.Column("retried_as", sa.String(32), nullable=False),
        sa.Column("spec", sa.LargeBinary),
    )
    op.create_index("ix_lamentations_listing", "lamentations", ["tenant", "timestamp", "id"])
    op.create_index("ix_lamentations_age", "lamentations", ["timestamp"])


def downgrade() -> None:
    """Forget them; used by tests only."""
    op.drop_table("lamentations")
