"""Copying between this host and a sandbox through the files API: files as streams, directories entry by entry.

What comes out of a sandbox is hostile: names are checked, nothing is written through a symbolic link that came
with it (links are made last, and only those that stay inside the copy), files appear whole under their
name, and neither devices nor set-user-id bits are made.
"""

from __future__ import annotations

import os
import posixpath
import stat
from collections.abc import Iterable, Iterator
from typing import IO

from tartarus.model.errors import FileFailed, InvalidRequest
from tartarus.model.sandbox import FileInfo
from tartarus.sdk.files import CHUNK_BYTES, Files, is_missing, parts_of

ELSEWHERE = "a symbolic link that leads elsewhere"


class Observer:
    """Told of what a copy does; this one does nothing about it."""

    def skipped(self, path: str, why: str) -> None:
        """Something that can't be copied was left out."""

    def moved(self, size: int) -> None:
        """So many more bytes were copied."""

    def watching(self, parts: Iterable[bytes]) -> Iterator[bytes]:
        """The same pieces, reported as they pass."""
        for part in parts:
            yield part
            self.moved(len(part))


def copy_in(files: Files, source: str, target: str, observer: Observer) -> None:
    """Copy a local file or directory to `target`: into it when it is a directory, else as it.

    Devices, sockets and links to directories are left out.
    """
    if not os.path.exists(source):
        raise FileFailed(f"can't read {source}", why="No such file or directory")
    if _is_directory(files, target) or target.endswith("/"):
        target = posixpath.join(target, os.path.basename(os.path.abspath(source)))
    if not os.path.isdir(source):
        _send(files, source, target, observer)
        return
    for directory, names, leaves in os.walk(source, onerror=_refuse):
        below = os.path.relpath(directory, source)
        there = target if below == "." else posixpath.join(target, below)
        files.mkdir(there, parents=True)
        for name in list(names):
            if os.path.islink(os.path.join(directory, name)):
                observer.skipped(os.path.join(directory, name), "a symbolic link to a directory")
        for name in leaves:
            _send(files, os.path.join(directory, name), posixpath.join(there, name), observer)


def _refuse(error: OSError) -> None:
    raise FileFailed(f"can't read {error.filename}", why=error.strerror or str(error)) from error


def _send(files: Files, source: str, target: str, observer: Observer) -> None:
    try:
        # Non-blocking, so that a FIFO does not hold us up before we see what it is.
        fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        _refuse(error)
        return
    with os.fdopen(fd, "rb", buffering=0) as opened:
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode):
            observer.skipped(source, "not a regular file")
            return
        files.write(target, observer.watching(parts_of(opened)), mode=stat.S_IMODE(mode) & 0o777)


def send_stream(files: Files, source: IO[bytes], target: str, observer: Observer) -> None:
    """Write what `source` gives to the file `target`."""
    if target.endswith("/"):
        raise InvalidRequest(f"{target!r} names no file", fix="standard input becomes a file: give its whole path")
    files.write(target, observer.watching(parts_of(source)))


def copy_out(files: Files, source: str, target: str, observer: Observer) -> None:
    """Copy a file or directory of the sandbox to the local `target`: into it when it is a directory, else as it.

    Devices, FIFOs, sockets and links that lead elsewhere are left out.
    """
    info = _followed(files, source)
    if os.path.isdir(target):
        target = os.path.join(target, _checked_name(posixpath.basename(posixpath.normpath(source)), source))
    elif target.endswith("/"):
        raise FileFailed(f"can't write {target}", why="No such file or directory")
    if info.kind == "file":
        _receive(files, info, target, observer)
        return
    if info.kind != "dir":
        raise FileFailed(f"can't copy {source}", why=f"it is a {info.kind}")
    links: list[tuple[str, str]] = []
    pending = [(info.path, target)]
    while pending:
        directory, there = pending.pop()
        _make_directory(there)
        for entry in files.list(directory):
            path = os.path.join(there, _checked_name(posixpath.basename(entry.path), entry.path))
            if entry.kind == "dir":
                pending.append((entry.path, path))
            elif entry.kind == "file":
                _receive(files, entry, path, observer)
            elif entry.kind == "symlink" and _stays_inside(target, path, entry.link_target):
                links.append((entry.link_target, path))
            else:
                observer.skipped(entry.path, ELSEWHERE if entry.kind == "symlink" else entry.kind)
    for link_target, path in links:
        _make_link(link_target, path)


def receive_stream(files: Files, source: str, observer: Observer) -> Iterator[bytes]:
    """The pieces of a file of the sandbox."""
    with files.open(source) as parts:
        yield from observer.watching(parts)


def _followed(files: Files, path: str) -> FileInfo:
    """What a path names, through symbolic links; it is the guest that resolves them."""
    info = files.stat(path)
    for _ in range(40):
        if info.kind != "symlink":
            return info
        info = files.stat(posixpath.normpath(posixpath.join(posixpath.dirname(info.path), info.link_target)))
    raise FileFailed(f"can't read {path}", why="Too many levels of symbolic links")


def _is_directory(files: Files, path: str) -> bool:
    try:
        return _followed(files, path).kind == "dir"
    except FileFailed as error:
        if is_missing(error):
            return False
        raise


def _checked_name(name: str, path: str) -> str:
    if name in {"", ".", ".."} or "/" in name or "\0" in name:
        raise FileFailed(f"can't copy {path!r}", why="it has no usable name", fix="give the target's whole name")
    return name


def _stays_inside(top: str, path: str, link_target: str) -> bool:
    """Whether a link at `path` with that target leads to something below `top`."""
    if not link_target or link_target.startswith("/"):
        return False
    # Going up is judged by name only, so it may come first (our directories are real ones), never behind a link.
    parts = [part for part in link_target.split("/") if part not in {"", "."}]
    downwards = next((index for index, part in enumerate(parts) if part != ".."), len(parts))
    if ".." in parts[downwards:]:
        return False
    top = os.path.abspath(top)
    leads_to = os.path.normpath(os.path.join(os.path.dirname(os.path.abspath(path)), link_target))
    return leads_to == top or leads_to.startswith(top.rstrip("/") + "/")


def _make_directory(path: str) -> None:
    try:
        os.mkdir(path)
    except FileExistsError:
        if os.path.islink(path) or not os.path.isdir(path):
            raise FileFailed(f"can't write {path}", why="it is in the way and no directory") from None
    except OSError as error:
        raise FileFailed(f"can't make {path}", why=error.strerror or str(error)) from error


def _make_link(target: str, path: str) -> None:
    try:
        if os.path.islink(path):
            os.unlink(path)
        os.symlink(target, path)
    except OSError as error:
        raise FileFailed(f"can't make the link {path}", why=error.strerror or str(error)) from error


def _receive(files: Files, info: FileInfo, target: str, observer: Observer) -> None:
    """Fetch a file under a name of its own, then give it its name: whole or not at all, never through a link."""
    temporary = f"{target}.{os.getpid()}.{os.urandom(4).hex()}.part"
    try:
        with files.open(info.path) as parts:
            _write_new(temporary, observer.watching(parts), info.mode & 0o777)
        os.replace(temporary, target)
    except BaseException as error:
        if os.path.lexists(temporary):
            os.unlink(temporary)
        if isinstance(error, OSError):
            raise FileFailed(f"can't write {target}", why=error.strerror or str(error)) from error
        raise


def _write_new(path: str, parts: Iterable[bytes], mode: int) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb", buffering=CHUNK_BYTES) as opened:
        for part in parts:
            opened.write(part)
        mask = os.umask(0)
        os.umask(mask)
        os.fchmod(fd, mode & ~mask)
