"""The digest of a hibernated sandbox's memory."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column; nothing was hibernated before."""
    op.add_column("sandboxes", sa.Column("saved", sa.String(128), nullable=False, server_default=sa.text("''")))


def downgrade() -> None:
    """Forget where sleeping sandboxes lie; used by tests only."""
    op.drop_column("sandboxes", "saved")
