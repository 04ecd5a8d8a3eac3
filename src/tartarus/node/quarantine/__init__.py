"""Quarantine (Typhon): a sandbox that is frozen, cut off and kept as evidence, until its daemon's owner decides."""
