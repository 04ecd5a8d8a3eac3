"""Alembic's environment and revisions, shipped in the package so that any daemon can bring its database up to date."""
