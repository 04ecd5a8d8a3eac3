"""What COPY takes files from: a build context or the layers of a stage. Both are hostile trees.

Nothing is opened by a path that the kernel would follow: `StackView` resolves links inside the tree, and files are
then opened by name in directories that were opened component by component.
"""

from __future__ import annotations

import errno
import hashlib
import os
import posixpath
import stat
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from tartarus.images.dockerfile.limits import MAX_IGNORE_BYTES, MAX_PATH_BYTES, MAX_TEXT_BYTES, CopyLimits
from tartarus.images.dockerfile.patterns import Ignore, component, has_wildcards
from tartarus.images.stackview import Entry, StackView
from tartarus.model.errors import InvalidRequest

IGNORE_FILE: Final = ".dockerignore"
_KEPT_MODE: Final = 0o1777
"""Set-id bits of files are dropped: no sandbox would honour them, and on the host they must mean nothing."""
_CHUNK: Final = 1 << 20


class Item(NamedTuple):
    """Something to copy: `below` is its path relative to what was named, empty for that itself."""

    below: str
    entry: Entry


class Picked(NamedTuple):
    """A source that a COPY named, or one that its wildcards matched. `items`: itself, then what is in it, sorted."""

    name: str
    items: list[Item]

    @property
    def top(self) -> Entry:
        """The source itself."""
        return self.items[0].entry


class Watch:
    """Ends work in a thread: when `stop` is set, when the time is over, when there is too much of it."""

    def __init__(self, limits: CopyLimits, stop: threading.Event | None = None) -> None:
        """Begin to count."""
        self.limits = limits
        self.stop = threading.Event() if stop is None else stop
        self._entries = 0
        self._bytes = 0
        self._deadline = time.monotonic() + limits.seconds

    def count(self, size: int = 0) -> None:
        """Count one entry of `size` bytes. Raises InvalidRequest."""
        self._entries += 1
        self._bytes += size
        if self._entries > self.limits.entries:
            raise self.too_many()
        if self._bytes > self.limits.bytes:
            raise InvalidRequest(f"more than {self.limits.bytes} bytes", fix=f"leave some files out with {IGNORE_FILE}")
        self.check()

    def too_many(self) -> InvalidRequest:
        """The error for more entries than may be."""
        return InvalidRequest(
            f"more than {self.limits.entries} files and directories", fix=f"leave some out with {IGNORE_FILE}"
        )

    def check(self) -> None:
        """Raise InterruptedError when the build was given up, InvalidRequest when the time is over."""
        if self.stop.is_set():
            raise InterruptedError(errno.EINTR, "the build was given up")
        if time.monotonic() > self._deadline:
            raise InvalidRequest(f"copying takes more than {self.limits.seconds:.0f} s")


class FileTree:
    """A tree that files are copied from. Use it as a context manager, in one thread.

    `layers` top first; a build context is a stack of one directory, with the `.dockerignore` in it (`is_context`).
    `what` names it in messages.
    """

    def __init__(self, layers: Sequence[Path], uid_base: int | None, *, is_context: bool, what: str) -> None:
        """Open the tree. Raises InvalidRequest for a bad `.dockerignore`, OSError when it can't be read."""
        self._what = what
        self._is_context = is_context
        self._view = StackView(layers, uid_base)
        self._roots: list[int] = []
        self._at: tuple[int, str, int] | None = None
        try:
            for layer in layers:
                self._roots.append(os.open(layer, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC))
            self._ignore = Ignore(self._ignore_text() if is_context else "")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> FileTree:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the tree."""
        self._leave()
        self._view.close()
        while self._roots:
            os.close(self._roots.pop())

    def pick(self, pattern: str, watch: Watch) -> list[Picked]:
        """What a source of COPY stands for, sorted by path; links at its end are followed inside the tree.

        Raises InvalidRequest when there is nothing, or something that is no file, directory or link.
        """
        wild = any(has_wildcards(part) for part in pattern.split("/"))
        picked: list[Picked] = []
        for path in self._matches(pattern, watch) if wild else [_clean(pattern)]:
            top = self._view.resolve(path)
            if top is None and wild and self._is_there(path):
                raise InvalidRequest(f"{path!r} in {self._what} is a link that leads nowhere inside of it")
            items = [] if top is None or self._hidden(path, top) else list(self._items(top, watch))
            if items:
                picked.append(Picked(posixpath.basename(path), items))
        if not picked:
            raise self._nothing(pattern)
        return picked

    def digest(self, picked: Sequence[Picked], watch: Watch) -> str:
        """SHA-256 of names, modes, link targets and contents, in hexadecimal; times do not count."""
        whole = hashlib.sha256()
        for source in picked:
            _add(whole, "source", source.name, str(len(source.items)))
            for item in source.items:
                entry = item.entry
                content = self._content_digest(entry, watch) if entry.kind == "file" else ""
                _add(whole, item.below, entry.kind, oct(file_mode(entry)), entry.target, content)
        return whole.hexdigest()

    def open(self, entry: Entry) -> int:
        """A descriptor to read the regular file `entry`; the caller closes it. Raises OSError when it changed."""
        folder, name = posixpath.split(entry.path)
        file = os.open(
            name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self._enter(entry.layer, folder)
        )
        status = os.fstat(file)
        if stat.S_ISREG(status.st_mode) and (status.st_dev, status.st_ino) == entry.inode:
            return file
        os.close(file)
        raise OSError(errno.ESTALE, "it changed while it was copied", entry.path)

    def _nothing(self, pattern: str) -> InvalidRequest:
        return InvalidRequest(
            f"{pattern!r} is not in {self._what}",
            why=f"paths are looked up inside of it, and links are not followed out of it{self._and_ignored()}",
        )

    def _and_ignored(self) -> str:
        return f"; {IGNORE_FILE} leaves some files out" if self._ignore.top else ""

    def _ignore_text(self) -> str:
        try:
            return self._view.read(IGNORE_FILE, MAX_IGNORE_BYTES).decode(errors="surrogateescape")
        except FileNotFoundError:
            return ""
        except OSError as error:
            raise InvalidRequest(f"{IGNORE_FILE} can't be read", why=error.strerror or str(error)) from error

    def _is_there(self, path: str) -> bool:
        return self._view.resolve(path, follow=False) is not None and not self._ignore.ignores(path)

    def _hidden(self, path: str, entry: Entry) -> bool:
        """Whether what was named `path`, and is `entry`, is ignored with all that may be in it."""
        if entry.kind == "dir" and self._ignore.keeps_some:
            return False
        return self._ignore.ignores(path) or self._ignore.ignores(entry.path)

    def _matches(self, pattern: str, watch: Watch) -> list[str]:
        found = [""]
        for part in _clean(pattern).split("/")[1:]:
            if not has_wildcards(part):
                found = [f"{base}/{part}" for base in found]
                continue
            matcher = component(part)
            found = [
                f"{base}/{name}"
                for base in found
                if (place := self._view.resolve(base or "/")) is not None and place.kind == "dir"
                for name in self._names(place.path, watch)
                if matcher.fullmatch(name)
            ]
        return found

    def _items(self, top: Entry, watch: Watch) -> Iterator[Item]:
        """`top` and what is below it. A directory that is ignored shows only with something in it that is not."""
        parts = [part for part in top.path.split("/") if part]
        state, ignored = self._ignore.top, False
        for depth in range(1, len(parts) + 1):
            ignored, state = self._ignore.check(parts[:depth], state)
        if top.kind != "dir":
            self._count(top, watch)
            yield Item("", top)
            return
        watch.count()
        yield from self._walk(Item("", top), state, ignored, watch)

    def _walk(self, start: Item, state: tuple[bool, ...], ignored: bool, watch: Watch) -> Iterator[Item]:
        # Without recursion: how deep a tree is, is its maker's choice. `held` are ignored directories above us.
        pending = [(start, state, ignored, 0)]
        held: list[Item] = []
        while pending:
            item, above, hidden, depth = pending.pop()
            while held and not item.below.startswith(f"{held[-1].below}/" if held[-1].below else ""):
                held.pop()
            if hidden:
                held.append(item)
            else:
                yield from held
                held.clear()
                yield item
            if item.entry.kind != "dir":
                continue
            if depth > watch.limits.depth:
                raise InvalidRequest(f"{item.below[:100]!r} is too deep", why=f"at most {watch.limits.depth} levels")
            pending += reversed(list(self._children(item, above, depth, watch)))

    def _children(
        self, parent: Item, above: tuple[bool, ...], depth: int, watch: Watch
    ) -> Iterator[tuple[Item, tuple[bool, ...], bool, int]]:
        path = parent.entry.path.rstrip("/")
        parts = [part for part in path.split("/") if part]
        for name in self._names(path or "/", watch):
            below = f"{path}/{name}"
            if len(os.fsencode(below)) > MAX_PATH_BYTES:
                raise InvalidRequest(f"{below[:100]!r} is too deep", why=f"at most {MAX_PATH_BYTES} bytes make a path")
            entry = self._view.resolve(below, follow=False)
            if entry is None:
                raise OSError(errno.ESTALE, "it changed while it was copied", below)
            folder = entry.kind == "dir"
            hidden, state = self._ignore.check([*parts, name], above, leaf=not folder)
            if hidden and not (folder and self._ignore.keeps_some):
                watch.count()
                continue
            self._count(entry, watch)
            yield Item(f"{parent.below}/{name}" if parent.below else name, entry), state, hidden, depth + 1

    def _names(self, path: str, watch: Watch) -> list[str]:
        try:
            return self._view.listdir(path, limit=watch.limits.entries)
        except OSError as error:
            if error.errno == errno.E2BIG:
                raise watch.too_many() from error
            raise

    def _count(self, entry: Entry, watch: Watch) -> None:
        if entry.kind not in {"dir", "file", "symlink"}:
            raise InvalidRequest(
                f"{entry.path[:200]!r} in {self._what} is a {_NAMES[entry.kind]}",
                why="only files, directories and symbolic links can be copied",
                fix=f"remove it, or leave it out with {IGNORE_FILE}" if self._is_context else "remove it in that stage",
            )
        watch.count(entry.size if entry.kind == "file" else 0)

    def _content_digest(self, entry: Entry, watch: Watch) -> str:
        content = hashlib.sha256()
        for chunk in self.chunks(entry, watch):
            content.update(chunk)
        return content.hexdigest()

    def chunks(self, entry: Entry, watch: Watch) -> Iterator[bytes]:
        """The content of the regular file `entry`. Raises OSError when it has another size than it had."""
        file = self.open(entry)
        try:
            left = entry.size
            while True:
                chunk = os.read(file, min(_CHUNK, left + 1))
                left -= len(chunk)
                if left < 0 or (not chunk and left):
                    raise OSError(errno.ESTALE, "it changed while it was copied", entry.path)
                if not chunk:
                    return
                yield chunk
                watch.check()
        finally:
            os.close(file)

    def _enter(self, layer: int, folder: str) -> int:
        """The directory's descriptor, kept until another is asked for."""
        if self._at is not None and self._at[:2] == (layer, folder):
            return self._at[2]
        self._leave()
        here = os.dup(self._roots[layer])
        for name in folder.split("/"):
            if name:
                try:
                    there = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=here)
                finally:
                    os.close(here)
                here = there
        self._at = (layer, folder, here)
        return here

    def _leave(self) -> None:
        if self._at is not None:
            os.close(self._at[2])
            self._at = None


_NAMES: Final = {"fifo": "named pipe", "socket": "socket", "char": "device", "block": "device"}


def read_dockerfile(context: Path, name: str = "Dockerfile") -> str:
    """A Dockerfile out of a build context, which may be hostile: a link is followed inside of it only.

    Raises InvalidRequest when it is not there, too long, no file, or not UTF-8.
    """
    try:
        with StackView([context]) as view:
            return view.read(name, MAX_TEXT_BYTES).decode()
    except FileNotFoundError as error:
        raise InvalidRequest(f"the build context has no {name!r}", fix="name the Dockerfile") from error
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror or str(error) if isinstance(error, OSError) else "it is not UTF-8"
        raise InvalidRequest(f"{name!r} can't be read", why=reason) from error


def file_mode(entry: Entry) -> int:
    """The permission bits that a copy of `entry` gets."""
    return entry.mode if entry.kind == "dir" else entry.mode & _KEPT_MODE


def _clean(path: str) -> str:
    # Docker's: a source is always inside, "../x" is "x".
    return posixpath.normpath(f"/{path.lstrip('/')}")


def _add(digest: hashlib._Hash, *fields: str) -> None:
    # With their lengths, so that no name can look like two.
    for field in fields:
        encoded = os.fsencode(field)
        digest.update(len(encoded).to_bytes(8, "big") + encoded)
