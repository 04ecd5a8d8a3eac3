"""The audit log: who did what to whom, and what was decided; kept so that a change to it shows (Aeacus)."""
