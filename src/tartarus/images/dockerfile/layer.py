"""Writing one layer: directories, files and links, put where the stack below says that their path leads.

A path is followed through the layer and the stack as in a sandbox: a link in a lower layer leads inside, ".." ends
at the root. What is found that way has no link in it any more, and is then opened in the new layer's own directory
component by component without following anything, so that no tree can lead a write outside.
"""

from __future__ import annotations

import errno
import os
import posixpath
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Final, NamedTuple

from tartarus.images.accounts import MAX_ID
from tartarus.images.stackview import MAX_LINKS, StackView
from tartarus.model.errors import InvalidRequest

_MAX_STEPS: Final = 4_096
_SET_ID: Final = stat.S_ISUID | stat.S_ISGID


class Owner(NamedTuple):
    """Ids as the sandbox sees them."""

    uid: int = 0
    gid: int = 0


ROOT: Final = Owner()


class Found(NamedTuple):
    """What is at a path: its kind, and a link's target."""

    kind: str
    target: str = ""


class LayerWriter:
    """Fills the empty directory `tree` with a layer for on top of `below`. Use it as a context manager, in one thread.

    `below` is None for an empty stack. `uid_base` is added to owners; without it all is ours, and nothing is made
    that we could not remove again. Paths handed in are text of the sandbox; those handed out are canonical: absolute,
    without a link in them.
    """

    def __init__(self, tree: Path, below: StackView | None, uid_base: int | None) -> None:
        """Open the directory and give it the mode and owner of the stack's root."""
        self._below = below
        self._uid_base = uid_base
        self._made: dict[str, Found] = {"/": Found("dir")}
        self._times: dict[str, int] = {}
        self._at: tuple[str, int] | None = None
        self._root = os.open(tree, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        root = below.resolve("/") if below is not None else None
        try:
            if root is None:
                self._dress(self._root, 0o755, ROOT, folder=True)
            else:
                self._dress(self._root, root.mode, Owner(root.uid, root.gid), folder=True)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> LayerWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the directory."""
        self._leave()
        if self._root >= 0:
            os.close(self._root)
            self._root = -1

    def finish(self) -> None:
        """Set the times of the directories, which writing into them has changed."""
        for path, mtime_ns in self._times.items():
            os.utime(self._enter(path), ns=(mtime_ns, mtime_ns))

    def look(self, path: str) -> Found | None:
        """What is at the canonical `path`, seen through the layer and the stack; a link is not followed."""
        made = self._made.get(path)
        if made is not None or self._below is None:
            return made
        entry = self._below.resolve(path, follow=False)
        return None if entry is None else Found(entry.kind, entry.target)

    def resolve(self, path: str, create: Owner | None = None) -> str | None:
        """Where `path` leads, as a canonical path, links followed to the end.

        None when something on the way is missing; with `create` missing directories are made for that owner, and so
        the answer is a directory. Raises InvalidRequest for a loop, and, with `create`, for what is no directory.
        """
        trail: list[str] = []
        pending = path.split("/")[::-1]
        links = steps = 0
        while pending:
            name = pending.pop()
            steps += 1
            if steps > _MAX_STEPS:
                raise InvalidRequest(f"{path[:200]!r} leads nowhere", why="too many components")
            if name in {"", "."}:
                continue
            if name == "..":
                del trail[-1:]
                continue
            here = f"/{'/'.join([*trail, name])}"
            found = self.look(here)
            if found is None:
                if create is None:
                    return None
                self.directory(here, 0o755, create)
            elif found.kind == "symlink":
                links += 1
                if links > MAX_LINKS:
                    raise InvalidRequest(f"{path[:200]!r} leads nowhere", why="symbolic links in a circle")
                if found.target.startswith("/"):
                    trail.clear()
                pending += found.target.split("/")[::-1]
                continue
            elif found.kind != "dir" and (pending or create is not None):
                raise InvalidRequest(f"{here[:200]!r} is no directory", why=f"it is a {found.kind}")
            trail.append(name)
        return f"/{'/'.join(trail)}"

    def is_directory(self, path: str) -> bool:
        """Whether `path` leads to a directory that exists."""
        place = self.resolve(path)
        found = None if place is None else self.look(place)
        return found is not None and found.kind == "dir"

    def directory(self, path: str, mode: int, owner: Owner, mtime_ns: int | None = None) -> None:
        """Make the canonical `path`, whose parent is a directory. One that exists gets the mode, keeping its owner.

        Raises InvalidRequest when something else is there.
        """
        found = self.look(path)
        if found is not None and found.kind != "dir":
            raise InvalidRequest(f"a directory can't take the place of {path[:200]!r}", why=f"it is a {found.kind}")
        if found is not None:
            held = self._own(path)
            os.fchmod(held, self._mode(mode, folder=True))
        else:
            held = self._make_directory(path, mode, owner)
        if mtime_ns is not None and path != "/":
            self._times[path] = mtime_ns

    def file(self, path: str, chunks: Iterable[bytes], mode: int, owner: Owner, mtime_ns: int | None = None) -> None:
        """Write a regular file at the canonical `path`, in place of a file or link that is there.

        Raises InvalidRequest when a directory is there.
        """
        parent, name = self._clear(path)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        file = os.open(name, flags, 0o600, dir_fd=parent)
        try:
            for chunk in chunks:
                rest = memoryview(chunk)
                while rest:
                    rest = rest[os.write(file, rest) :]
            self._dress(file, mode, owner, folder=False)
            if mtime_ns is not None:
                os.utime(file, ns=(mtime_ns, mtime_ns))
        finally:
            os.close(file)
        self._made[path] = Found("file")

    def symlink(self, path: str, target: str, owner: Owner, mtime_ns: int | None = None) -> None:
        """Make a symbolic link at the canonical `path`. Raises as `file` does."""
        parent, name = self._clear(path)
        os.symlink(target, name, dir_fd=parent)
        if self._uid_base is not None:
            os.chown(name, *self._ids(owner), dir_fd=parent, follow_symlinks=False)
        if mtime_ns is not None:
            os.utime(name, ns=(mtime_ns, mtime_ns), dir_fd=parent, follow_symlinks=False)
        self._made[path] = Found("symlink", target)

    def hard_link(self, path: str, existing: str) -> None:
        """Make a second name of a file that this layer has. Both paths are canonical.

        Raises InvalidRequest when `existing` is no file of this layer, and as `file` does.
        """
        if existing == path:
            return
        if self._made.get(existing, Found("")).kind != "file":
            raise InvalidRequest(f"a hard link to {existing[:200]!r}", why="no file of that name came before it")
        source = os.dup(self._enter(posixpath.dirname(existing)))
        try:
            parent, name = self._clear(path)
            os.link(posixpath.basename(existing), name, src_dir_fd=source, dst_dir_fd=parent, follow_symlinks=False)
        finally:
            os.close(source)
        self._made[path] = Found("file")

    def _clear(self, path: str) -> tuple[int, str]:
        """Make room at `path`: (its parent's descriptor in the layer, its name)."""
        parent, name = _split(path)
        found = self.look(path)
        if found is not None and found.kind == "dir":
            raise InvalidRequest(f"a file can't take the place of the directory {path[:200]!r}")
        held = self._own(parent)
        if path in self._made:
            os.unlink(name, dir_fd=held)
            del self._made[path]
        return held, name

    def _own(self, path: str) -> int:
        """The directory `path`, with its parents, in the layer itself: made as the stack has it when it isn't there."""
        missing: list[str] = []
        here = path
        while here not in self._made:
            missing.append(here)
            here = posixpath.dirname(here)
        for each in reversed(missing):
            entry = None if self._below is None else self._below.resolve(each, follow=False)
            if entry is None or entry.kind != "dir":
                raise OSError(errno.ENOTDIR, "not a directory of the stack", each)
            self._make_directory(each, entry.mode, Owner(entry.uid, entry.gid))
        return self._enter(path)

    def _make_directory(self, path: str, mode: int, owner: Owner) -> int:
        parent, name = _split(path)
        os.mkdir(name, 0o700, dir_fd=self._own(parent))
        self._made[path] = Found("dir")
        held = self._enter(path)
        self._dress(held, mode, owner, folder=True)
        return held

    def _dress(self, file: int, mode: int, owner: Owner, *, folder: bool) -> None:
        if self._uid_base is not None:
            os.fchown(file, *self._ids(owner))
        os.fchmod(file, self._mode(mode, folder=folder))

    def _mode(self, mode: int, *, folder: bool) -> int:
        mode &= 0o7777 if folder else 0o7777 & ~_SET_ID
        if self._uid_base is None:
            # The owner is us: what we could neither read nor remove again would outlive its layer.
            mode |= 0o700 if folder else 0o600
        return mode

    def _ids(self, owner: Owner) -> tuple[int, int]:
        if not (0 <= owner.uid <= MAX_ID and 0 <= owner.gid <= MAX_ID):
            raise InvalidRequest(f"owner {owner.uid}:{owner.gid}", why=f"sandboxes have ids 0 to {MAX_ID}")
        assert self._uid_base is not None
        return self._uid_base + owner.uid, self._uid_base + owner.gid

    def _enter(self, path: str) -> int:
        """A directory of the layer, its descriptor kept until another is asked for."""
        if self._at is not None and self._at[0] == path:
            return self._at[1]
        self._leave()
        here = os.dup(self._root)
        for name in path.split("/"):
            if name:
                try:
                    there = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=here)
                finally:
                    os.close(here)
                here = there
        self._at = (path, here)
        return here

    def _leave(self) -> None:
        if self._at is not None:
            os.close(self._at[1])
            self._at = None


def _split(path: str) -> tuple[str, str]:
    parent, name = posixpath.split(path)
    if name in {"", ".", ".."}:
        raise InvalidRequest(f"{path[:200]!r} is no place for a file")
    return parent, name
