"""The two disks of a machine: an image of the template's files, read by all of its guests, and a scratch disk of its own.

The image is erofs: made to be read only, small to parse, shared in the host's page cache by all machines. The scratch
disk is ext4 in a sparse file, without a journal: nothing on it outlives its machine but as a part of a saved set.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path

from tartarus.model.errors import GuestFailed, IsolationUnavailable
from tartarus.runtimes.microvm import memory

_MKFS_TIMEOUT_S = 900.0
_SCRATCH_OPTIONS = (
    "-q", "-F", "-m", "0", "-b", "4096", "-O", "^has_journal,^resize_inode",
    "-E", "lazy_itable_init=1,nodiscard,root_owner=0:0",
)  # fmt: skip
MIN_SCRATCH = 16 * 1024 * 1024


async def make_image(tree: Path, target: Path) -> None:
    """Write an erofs image of a directory. Raises IsolationUnavailable without mkfs.erofs, GuestFailed when it fails."""
    await _run(_tool("mkfs.erofs", "erofs-utils"), "--quiet", "-T0", os.fspath(target), os.fspath(tree))


async def make_scratch(target: Path, size: int) -> None:
    """Make an empty scratch disk of `size` bytes; it takes next to no space until it is written to."""
    with target.open("xb") as file:
        file.truncate(max(size, MIN_SCRATCH) // 4096 * 4096)
    await _run(_tool("mkfs.ext4", "e2fsprogs"), *_SCRATCH_OPTIONS, os.fspath(target))


def clone_scratch(source: Path, target: Path) -> int:
    """Copy a scratch disk, holes left holes; a descriptor of the copy, open for writing."""
    original = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        copy = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            memory.copy_data(original, copy)
        except BaseException:
            os.close(copy)
            target.unlink(missing_ok=True)
            raise
        return copy
    finally:
        os.close(original)


def _tool(name: str, package: str) -> str:
    found = shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")
    if found is None:
        raise IsolationUnavailable(f"{name} is missing", fix=f"install the package {package}")
    return found


async def _run(*argv: str) -> None:
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
