"""What is kept of a saved gVisor guest: runsc's image, the files it wrote, and what a restored one must have again."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import platform
import stat
import subprocess
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Protocol

import msgspec

from tartarus.guest.binary import agent_binary
from tartarus.model.errors import GuestFailed, ImageRefused, NoSpace, Unsupported
from tartarus.model.sandbox import Resources, Stats
from tartarus.runtimes.base import GuestRequest, RootFs, Wire
from tartarus.runtimes.container.storage import UPPER
from tartarus.runtimes.descriptors import close_all
from tartarus.runtimes.gvisor.layout import IMAGE_FILES
from tartarus.runtimes.idmap import IdMap

FILES, FACTS = "files.tar", "guest.json"
_MOST_FACTS = 64 * 1024
_MOST_ADDRESSES = 512
"""Of both families. A socket that still had an earlier one would end a restored guest; slots are used in turn."""
_DELETED = " (deleted)"
_SHOWN, _MOST_NAME = 3, 80
_SPARE_BYTES = 64 * 1024**2
_VERSION_TIMEOUT_S = 20.0


class Trees(Protocol):
    """Keeps directories in archives; see `tartarus.images.unpack.written`, which this layer does not know."""

    def pack(self, tree: str, archive: int, *, most_bytes: int, id_base: int) -> str:
        """Write a directory to an open file; its digest. Raises ImageRefused or OSError; blocks."""
        ...

    async def unpack(self, archive: int, tree: int, digest: str, *, most_bytes: int, id_base: int) -> None:
        """Fill an open directory from an open archive of any origin. Raises ImageRefused or NoSpace."""
        ...


class Facts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is in runsc's image: the process limit, where host directories are mounted, the host name.

    `addresses`: those that its sockets may have, the latest last: all that it had so far; none without a network.
    `files`: the digest of the archive of what the guest wrote; nothing when it wrote nothing.
    """

    pids: int
    mounts: tuple[str, ...]
    hostname: str
    addresses: tuple[str, ...] = ()
    files: str = ""


def with_addresses(before: Sequence[str], wire: Wire | None) -> tuple[str, ...]:
    """The addresses that a guest has had once it has its wire's."""
    own = () if wire is None else wire.addresses
    return (*others(before, wire), *own)[-_MOST_ADDRESSES:]


def others(before: Sequence[str], wire: Wire | None) -> tuple[str, ...]:
    """Those of `before` that are not its wire's."""
    return tuple(one for one in before if wire is None or one not in wire.addresses)


@functools.cache
def version_of(runsc: Path) -> str:
    """Which runsc that is. Raises GuestFailed when it does not say; blocks."""
    try:
        done = subprocess.run(
            [runsc, "--version"], capture_output=True, text=True, timeout=_VERSION_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise GuestFailed("runsc does not say its version", why=str(error), fix="tartarus doctor") from error
    return done.stdout.splitlines()[0].removeprefix("runsc version ") if done.stdout else ""


def needs_of(rootfs: RootFs, runsc: Path, platform_name: str) -> dict[str, str]:
    """What must be the same for a saved guest to go on."""
    return {
        "monitor": f"runsc {version_of(runsc)}",
        "platform": platform_name,
        "processor": f"{platform.machine()} {_processor()}",
        "agent": _agent(),
        "template": rootfs.digest,
        "hardening": rootfs.hardening.digest,
    }


@functools.cache
def _processor() -> str:
    """A digest of what this processor can do: programs look once, and go on using it."""
    with open("/proc/cpuinfo", encoding="ascii", errors="replace") as info:
        for line in info:
            name, _, value = line.partition(":")
            if name.strip() in {"flags", "Features"}:
                return hashlib.sha256(" ".join(sorted(value.split())).encode()).hexdigest()[:16]
    return "unknown"


@functools.cache
def _agent() -> str:
    """The agent's pages are not in an image: they are read from its file again."""
    return hashlib.sha256(agent_binary().read_bytes()).hexdigest()[:16]


def check_room(directory: int, stats: Stats) -> None:
    """Refuse what will not fit: a runsc that can't write its image has ended its guest by then. Raises NoSpace."""
    found = os.fstatvfs(directory)
    wanted = stats.memory_bytes + stats.disk_bytes + _SPARE_BYTES
    if found.f_bavail * found.f_frsize < wanted:
        raise NoSpace(
            "no room to save the sandbox",
            why=f"it may take {wanted >> 20} MiB and there are {found.f_bavail * found.f_frsize >> 20}",
            fix="free some disk, or move TARTARUS_HOME",
        )


def deleted_files(pids: Sequence[int]) -> list[str]:
    """Some of the deleted files that these processes hold open; blocks.

    runsc's own memory is deleted files too: those of the kernel's own file system, where no guest can open any.
    """
    own = os.memfd_create("own", os.MFD_CLOEXEC)
    try:
        anonymous = os.fstat(own).st_dev
    finally:
        os.close(own)
    found: list[str] = []
    for pid in pids:
        with contextlib.suppress(OSError):
            for fd in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    target = os.readlink(f"/proc/{pid}/fd/{fd}")
                    if target.endswith(_DELETED) and os.stat(f"/proc/{pid}/fd/{fd}").st_dev != anonymous:
                        name = target.removeprefix("/root").removesuffix(_DELETED)
                        found.append(ascii(name)[1:-1][:_MOST_NAME])
    return sorted(set(found))[:_SHOWN]


def is_whole(images: Sequence[int]) -> bool:
    """Whether runsc wrote something to each of an image's open files."""
    return all(os.fstat(image).st_size for image in images)


def keep_files(trees: Trees, storage: int, directory: int, resources: Resources, facts: Facts, id_base: int) -> None:
    """Write what the guest wrote, and the facts, beside its image. Raises GuestFailed or NoSpace; blocks.

    Nothing of the guest may run.
    """
    digest = ""
    upper = f"/proc/self/fd/{storage}/{UPPER}"
    try:
        if os.listdir(upper):
            archive = os.open(FILES, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=directory)
            try:
                digest = trees.pack(upper, archive, most_bytes=resources.disk_bytes, id_base=id_base)
            finally:
                os.close(archive)
        _write(directory, FACTS, msgspec.json.encode(msgspec.structs.replace(facts, files=digest)))
    except ImageRefused as refused:
        raise GuestFailed("the sandbox's files can't be saved", why=f"{refused.what}: {refused.why}") from None
    except OSError as error:
        raise NoSpace("the sandbox's files can't be saved", why=error.strerror or str(error)) from error


def _write(directory: int, name: str, content: bytes) -> None:
    file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=directory)
    with os.fdopen(file, "wb") as out:
        out.write(content)


def open_images(directory: str | int, *, new: bool = False) -> list[int]:
    """The open files of an image in a directory; `new`: made there, to be written. Raises OSError; blocks."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL if new else os.O_RDONLY | os.O_NONBLOCK
    base = "" if isinstance(directory, int) else f"{directory}/"
    at = directory if isinstance(directory, int) else None
    opened: list[int] = []
    try:
        for name in IMAGE_FILES:
            opened.append(os.open(f"{base}{name}", flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=at))
            if not stat.S_ISREG(os.fstat(opened[-1]).st_mode):
                raise OSError(errno.EINVAL, "no regular file", name)
    except BaseException:
        close_all(opened)
        raise
    return opened


class SavedGuest:
    """A saved guest, open to be restored: its image's files, its facts, the archive of what it wrote."""

    def __init__(self, saved: Path) -> None:
        """Open it. Raises ImageRefused; blocks."""
        self.images: list[int] = []
        self._archive = -1
        try:
            directory = os.open(saved, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                self.facts = _facts(directory)
                self.images = open_images(directory)
                if self.facts.files:
                    self._archive = _open(directory, FILES)
            finally:
                os.close(directory)
        except OSError as error:
            self.close()
            raise ImageRefused("the saved sandbox can't be read", why=f"{error.filename}: {error.strerror}") from error
        except msgspec.MsgspecError as error:
            self.close()
            raise ImageRefused("the saved sandbox can't be read", why=f"{FACTS}: {error}") from error

    def check(self, request: GuestRequest) -> None:
        """Raises Unsupported for a request that a guest saved like this can't become."""
        if request.resources.pids != self.facts.pids:
            raise Unsupported(
                f"a saved gVisor sandbox keeps its process limit of {self.facts.pids}",
                why="its own kernel counts, and was saved with it",
                fix=f"ask for {self.facts.pids} processes",
            )
        if (request.network is None) != (not self.facts.addresses):
            raise Unsupported(
                "a saved gVisor sandbox has a network if it had one", why="what runs in it has its sockets open",
                fix="go on from a snapshot of files",
            )  # fmt: skip
        if tuple(mount.target for mount in request.mounts) != self.facts.mounts:
            raise Unsupported(
                "a saved gVisor sandbox keeps the places of its mounts",
                why="it was saved with other ones",
                fix=f"mount at {', '.join(self.facts.mounts) or 'nothing'}",
            )

    async def write_files(self, trees: Trees, storage: int, id_map: IdMap, resources: Resources) -> None:
        """Put what it wrote into a new storage. Raises ImageRefused or NoSpace."""
        if self._archive < 0:
            return
        os.mkdir(UPPER, 0o755, dir_fd=storage)
        upper = os.open(UPPER, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=storage)
        try:
            os.fchown(upper, id_map.base, id_map.base)
            await trees.unpack(
                self._archive, upper, self.facts.files, most_bytes=resources.disk_bytes, id_base=id_map.base
            )
        finally:
            os.close(upper)

    def take_images(self) -> list[int]:
        """The open files of its image; the caller closes them."""
        taken, self.images = self.images, []
        return taken

    def close(self) -> None:
        """Let go of it; safe to repeat."""
        for fd in (*self.images, self._archive):
            if fd >= 0:
                os.close(fd)
        self.images, self._archive = [], -1


def _facts(directory: int) -> Facts:
    with os.fdopen(_open(directory, FACTS), "rb") as file:
        facts = msgspec.json.decode(file.read(_MOST_FACTS), type=Facts)
    if len(facts.addresses) > _MOST_ADDRESSES:
        raise msgspec.ValidationError("too many addresses")
    # As they are compared, and told to programs.
    return msgspec.structs.replace(facts, addresses=tuple(str(_address(one)) for one in facts.addresses))


def _address(text: str) -> IPv4Address | IPv6Address:
    try:
        found = ip_address(text)
    except ValueError as error:
        raise msgspec.ValidationError(str(error)) from None
    if found.is_loopback or found.is_unspecified or found.is_multicast:
        raise msgspec.ValidationError(f"no sandbox has the address {found}")
    return found


def _open(directory: int, name: str) -> int:
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "no regular file", name)
    return fd
