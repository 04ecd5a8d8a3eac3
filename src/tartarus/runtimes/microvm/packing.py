"""Directories as an erofs image.

The packing tool reads what foreign code wrote, so it runs as the layers' own ids do: in a user namespace that maps
them to 0 and up, which also puts those ids into the image, without a network, below a root that is the template's.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
from pathlib import Path
from typing import NamedTuple

from tartarus.guest.program import Program
from tartarus.model.errors import GuestFailed, IsolationUnavailable
from tartarus.runtimes.container.layout import (
    CLONE_NEWIPC,
    CLONE_NEWNET,
    CLONE_NEWNS,
    CLONE_NEWUSER,
    MS_BIND,
    MS_NODEV,
    MS_NOSUID,
    MS_PRIVATE,
    MS_RDONLY,
    MS_REC,
    unshare_program,
)
from tartarus.runtimes.idmap import IdMap
from tartarus.runtimes.microvm.launcher import add_exec, descriptor
from tartarus.runtimes.nursery import Nursery

TOOL = "mkfs.erofs"
_TIMEOUT_S = 900.0
_OUTPUT_MAX = 64 * 1024
_OPEN_TO_ALL = "/tmp"  # noqa: S108 - a mount point in a namespace of our own


def packing_tool() -> str:
    """Where mkfs.erofs is. Raises IsolationUnavailable."""
    found = shutil.which(TOOL, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")
    if found is None:
        raise IsolationUnavailable(f"{TOOL} is missing", fix="install the package erofs-utils")
    return found


class Source(NamedTuple):
    """What is packed: directories that lie over each other, top first; `without`: paths that are left out."""

    layers: tuple[Path, ...]
    without: tuple[str, ...] = ()


def merged(layers: tuple[Path, ...]) -> Source:
    """A template's layers."""
    return Source(layers)


async def pack(source: Source, stage: Path, target: Path, id_map: IdMap, what: str) -> None:
    """Write an image to `target`. `stage`: an empty directory to mount on, which nobody else sees.

    Raises GuestFailed with the tool's words.
    """
    tool = packing_tool()
    image = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.fchown(image, id_map.base, id_map.base)
        nursery = await Nursery.spawn(what, shared_pids=False)
        try:
            await nursery.run(unshare_program(CLONE_NEWNS))
            await nursery.run(_stage_program(source, stage))
            await nursery.run(unshare_program(CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWIPC))
            id_map.apply(nursery.pid)
            await nursery.run(_merge_program(source))
            without = [f"--exclude-path={path}" for path in source.without]
            if without:
                without.append("-x-1")  # it looks for attributes even where it is told not to go, and fails there
            await _run(nursery, [tool, "--quiet", *without, f"/proc/self/fd/{descriptor(2)}", "root"], image)
        finally:
            nursery.close()
            await asyncio.shield(nursery.gone())
        if os.fstat(image).st_size == 0:
            raise GuestFailed(f"{TOOL} wrote nothing")
        os.fchmod(image, 0o444)
        os.fchown(image, 0, 0)
        await asyncio.to_thread(os.fsync, image)
    finally:
        os.close(image)


def _stage_program(source: Source, stage: Path) -> Program:
    """With the host's rights: gather the layers below the stage, without what is mounted on them."""
    base = str(stage)
    program = Program()
    program.syscall("mount", 0, "/", 0, MS_REC | MS_PRIVATE, 0, step="make mounts private")
    program.syscall("mount", "tmpfs", base, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755", step="mount the stage")
    program.syscall("chdir", base, step="enter the stage")
    for name in ("root", "none", *(f"s{index}" for index in range(len(source.layers)))):
        program.syscall("mkdirat", -100, name, 0o755, step=f"make {name}")
    for index, layer in enumerate(source.layers):
        program.syscall("mount", str(layer), f"s{index}", 0, MS_BIND, 0, step=f"bind {layer}")
    # The tool asks for the whole path of what it packs, and the namespace's root may not be let through to the stage.
    program.syscall("mount", base, _OPEN_TO_ALL, 0, MS_BIND | MS_REC, 0, step="show the stage")
    program.syscall("chdir", _OPEN_TO_ALL, step="enter the stage")
    return program


def _merge_program(source: Source) -> Program:
    """As root of the new namespace: lay the layers over each other."""
    program = Program()
    program.syscall("setresgid", 0, 0, 0, step="become the namespace's root group")
    program.syscall("setresuid", 0, 0, 0, step="become the namespace's root")
    program.syscall("setgroups", 0, 0, step="leave all groups")
    # An overlay needs two lower directories when it has none to write to.
    lower = ":".join([*(f"s{index}" for index in range(len(source.layers))), "none"])
    program.syscall("mount", "overlay", "root", "overlay", MS_RDONLY | MS_NOSUID | MS_NODEV,
                    f"lowerdir={lower},userxattr", step="mount the layers")  # fmt: skip
    return program


async def _run(nursery: Nursery, argv: list[str], image: int) -> None:
    """Run the tool to its end; what it says is its error."""
    ours, theirs = socket.socketpair()
    try:
        program = Program()
        program.syscall("dup2", descriptor(0), 1, step="say on the channel")
        program.syscall("dup2", descriptor(0), 2, step="say on the channel")
        add_exec(program, argv, ["PATH=/usr/bin:/bin"])
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        try:
            born = await nursery.clone(program.encode(), 0, [theirs.fileno(), null, image])
        finally:
            os.close(null)
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
    os.close(born.pidfd)
    ours.setblocking(False)
    loop = asyncio.get_running_loop()
    said = b""
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            while chunk := await loop.sock_recv(ours, 4096):
                said = (said + chunk)[-_OUTPUT_MAX:]
    finally:
        ours.close()
    if said.strip():
        raise GuestFailed(f"{TOOL} failed", why=said.decode("utf-8", "replace").strip()[-500:])
