"""What outlives a process: sandbox records, their state machine in the database, and its migrations.

The node writes here and the control layer reads here; nothing else touches the database.
"""

from __future__ import annotations

from tartarus.store.sandboxes import SandboxStore
from tartarus.store.snapshots import SnapshotStore
from tartarus.store.templates import TemplateStore

__all__ = ["SandboxStore", "SnapshotStore", "TemplateStore"]
