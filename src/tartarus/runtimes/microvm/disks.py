"""The scratch disk of a machine: ext4 in a sparse file, without a journal.

Nothing on it outlives its machine but as a part of a saved set, so there is nothing that a journal would save.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path

from tartarus.model.errors import GuestFailed, IsolationUnavailable

_MKFS_TIMEOUT_S = 900.0
_SCRATCH_OPTIONS = (
    "-q", "-F", "-m", "0", "-b", "4096", "-O", "^has_journal,^resize_inode",
    "-E", "lazy_itable_init=1,nodiscard,root_owner=0:0",
)  # fmt: skip
MIN_SCRATCH = 16 * 1024 * 1024


async def make_scratch(target: Path, size: int) -> None:
    """Make an empty scratch disk of `size` bytes; it takes next to no space until it is written to."""
    with target.open("xb") as file:
        file.truncate(max(size, MIN_SCRATCH) // 4096 * 4096)
    await run(_tool("mkfs.ext4", "e2fsprogs"), *_SCRATCH_OPTIONS, os.fspath(target))


def _tool(name: str, package: str) -> str:
    found = shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")
    if found is None:
        raise IsolationUnavailable(f"{name} is missing", fix=f"install the package {package}")
    return found


async def run(*argv: str) -> None:
    """Run a tool to its end. Raises GuestFailed with its words."""
    process = await asyncio.create_subprocess_exec(
        *argv, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
    )
    try:
        _, said = await asyncio.wait_for(process.communicate(), _MKFS_TIMEOUT_S)
    except BaseException:
        process.kill()
        await asyncio.shield(process.wait())
        raise
    if process.returncode:
        raise GuestFailed(f"{Path(argv[0]).name} failed", why=said.decode("utf-8", "replace").strip()[-500:])
