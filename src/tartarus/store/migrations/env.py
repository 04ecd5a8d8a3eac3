"""Alembic's entry point: it is handed an open connection and runs the revisions in one transaction."""

from __future__ import annotations

from alembic import context

from tartarus.store.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    # SQLite can't alter most things in place: batch mode copies the table instead.
    render_as_batch=True,
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
