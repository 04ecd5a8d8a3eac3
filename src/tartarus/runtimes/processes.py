"""What the kernel says of a process."""

from __future__ import annotations

from pathlib import Path


def stat_fields(pid: int) -> list[str]:
    """/proc/PID/stat from its state on (proc(5), third field); empty when the process is gone."""
    try:
        # Behind the name, which is the program's own choice and may hold anything.
        return Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
    except OSError:
        return []
