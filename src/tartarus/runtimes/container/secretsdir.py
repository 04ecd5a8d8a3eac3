"""The directory of a sandbox's secrets: memory, and its user's alone."""

from __future__ import annotations

from tartarus.guest.program import Program
from tartarus.model.secrets import MAX_SECRET_BYTES, MAX_SECRETS, SECRETS_DIRECTORY
from tartarus.model.template import RunAs

SECRETS_BYTES = 2 * MAX_SECRETS * MAX_SECRET_BYTES
"""Room for all of a sandbox's secrets twice: a new value stands beside the old one until it takes its place."""
_AT_FDCWD, _EEXIST = -100, 17
_NOSUID, _NODEV, _NOEXEC = 2, 4, 8


def add_secrets_directory(program: Program, user: RunAs) -> None:
    """Mount it over whatever the template has there; runs in the new root, which its links can't lead out of.

    Not in the overlay's upper directory, which snapshots are made of. Swap is the cgroup's: guests have none.
    """
    parent = SECRETS_DIRECTORY.rpartition("/")[0]
    for path in (parent, SECRETS_DIRECTORY):
        program.syscall("mkdirat", _AT_FDCWD, path, 0o755, step=f"make {path}", ok=_EEXIST)
    options = f"size={SECRETS_BYTES},nr_inodes={4 * MAX_SECRETS},mode=700,uid={user.uid},gid={user.gid}"
    program.syscall("mount", "tmpfs", SECRETS_DIRECTORY, "tmpfs", _NOSUID | _NODEV | _NOEXEC, options,
                    step=f"mount {SECRETS_DIRECTORY}")  # fmt: skip
