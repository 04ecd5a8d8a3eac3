"""The limits of the group that holds a sandbox together with its runsc."""

from __future__ import annotations

import msgspec

from tartarus.model.sandbox import Resources

OVERHEAD_BYTES = 96 * 1024**2
"""Added to a sandbox's memory limit for runsc itself: its three processes held 54 MiB (PSS) at rest when measured."""
OVERHEAD_TASKS = 160
"""Added to a sandbox's process limit for runsc's threads."""
TASKS_EACH = 3
"""Host tasks for each guest process: the stub that runs it, its thread, and one that wakes it."""


def with_overhead(resources: Resources) -> Resources:
    """What the group may use, so that the sandbox may use `resources`."""
    return msgspec.structs.replace(
        resources,
        memory_bytes=resources.memory_bytes + OVERHEAD_BYTES,
        pids=resources.pids * TASKS_EACH + OVERHEAD_TASKS,
    )
