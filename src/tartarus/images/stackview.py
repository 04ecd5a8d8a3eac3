"""A stack of layer directories, read as overlayfs would show it, without a mount and without trust.

The scanner, the builder and the node ask it what an image holds: which user `app` is, where `python3` lies,
which packages are installed. The layers are an image's own choice, so no path is ever handed to the kernel to
follow: each lookup is openat2(2) below the layer's root with symbolic links forbidden, links are followed here,
inside the view, and nothing but a regular file is ever opened for reading.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, Literal, NamedTuple

from tartarus.images.beneath import is_opaque, is_whiteout, open_beneath
from tartarus.model.errors import ImageRefused

MAX_LINKS: Final = 40
"""Symbolic links followed for one path, as in the kernel (MAXSYMLINKS, linux/namei.h)."""
MAX_ENTRIES: Final = 2_000_000
MAX_DEPTH: Final = 512
MAX_LIST: Final = 200_000

_PATH_MAX = 4095  # without the final NUL, limits.h
_MAX_STEPS = 4096  # components looked up for one path, links unfolded
_MAX_CACHED = 8192
_MOST_PLACES = 128  # directories of PATH that are looked into; an image's may name as many as it likes

Kind = Literal["dir", "file", "symlink", "fifo", "socket", "char", "block"]
_KINDS: dict[int, Kind] = {
    stat.S_IFDIR: "dir", stat.S_IFREG: "file", stat.S_IFLNK: "symlink", stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket", stat.S_IFCHR: "char", stat.S_IFBLK: "block",
}  # fmt: skip


class Entry(NamedTuple):
    """Something in the view. `path` is where it really is, with no symbolic link in it.

    `mode` are the permission bits, `uid` and `gid` the sandbox's ids where the view knows the shift, `size` is in
    bytes, `target` a symbolic link's text; `layer` says which directory of the stack it lies in (0 is the top), and
    `inode` is the same for two hard links of that layer.
    """

    path: str
    kind: Kind
    mode: int
    uid: int
    gid: int
    size: int
    mtime_ns: int
    target: str
    layer: int
    inode: tuple[int, int]


class Directory(NamedTuple):
    """One step of a walk: directories, regular files, symbolic links. Names removed from `dirs` are not walked into."""

    path: str
    dirs: list[str]
    files: list[str]
    links: list[str]


class _Place(NamedTuple):
    """A directory of the view: its path without a slash at the end ("" is the root), and who contributes to it."""

    path: str
    layers: tuple[int, ...]
    entry: Entry


class StackView:
    """What overlayfs (with ``userxattr``) would show of `layers`, top first. Use it as a context manager.

    `uid_base` is subtracted from owners on disk; owners outside of the range are shown as 65534.

    Errors are OSError as of a file system's; a layer that is missing or no directory is one, at once.
    """

    def __init__(self, layers: Sequence[Path], uid_base: int | None = None) -> None:
        self._uid_base = uid_base
        self._roots: list[int] = []
        self._places: dict[str, _Place] = {}
        try:
            for layer in layers:
                self._roots.append(os.open(layer, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
        except OSError:
            self.close()
            raise
        if not self._roots:
            raise FileNotFoundError(errno.ENOENT, "a stack has at least one layer")
        # Overlayfs merges the roots of all layers; an opaque mark on a root means nothing to it.
        root = self._entry("/", os.fstat(self._roots[0]), "", 0)
        self._root = _Place("", tuple(range(len(self._roots))), root)

    def __enter__(self) -> StackView:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the layers."""
        while self._roots:
            os.close(self._roots.pop())

    def resolve(self, path: str, *, follow: bool = True) -> Entry | None:
        """What is at `path`, or None: nothing there, or a way that leads nowhere (loops, files taken for directories).

        Symbolic links are followed inside the view, the last one only with `follow`. A path without a slash in
        front starts at the root, too.
        """
        found = self._resolve(path, follow)
        return found.entry if isinstance(found, _Place) else found

    def open(self, path: str) -> int:
        """A descriptor to read the regular file at `path`; the caller closes it.

        Raises FileNotFoundError; IsADirectoryError; PermissionError; OSError with EINVAL for what is no file.
        """
        found = self._resolve(path, follow=True)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        if isinstance(found, _Place):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        if found.kind != "file":
            raise OSError(errno.EINVAL, f"not a regular file but a {found.kind}", path)
        held = open_beneath(self._roots[found.layer], found.path)
        try:
            # A second look, now that nobody can swap it: opening a fifo would block, opening a device can do harm.
            if not stat.S_ISREG(os.fstat(held).st_mode):
                raise OSError(errno.EINVAL, "not a regular file", path)
            return os.open(f"/proc/self/fd/{held}", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            os.close(held)

    def read(self, path: str, limit: int) -> bytes:
        """The whole content of the regular file at `path`, if it is at most `limit` bytes.

        Raises what `open` raises, and OSError with EFBIG for a larger file.
        """
        file = self.open(path)
        try:
            size = os.fstat(file).st_size
            if size > limit:
                raise OSError(errno.EFBIG, f"{size} bytes, where at most {limit} make sense", path)
            content = bytearray()
            while chunk := os.read(file, min(1 << 20, limit + 1 - len(content))):
                content += chunk
            if len(content) > limit:
                raise OSError(errno.EFBIG, f"more than {limit} bytes", path)
            return bytes(content)
        finally:
            os.close(file)

    def listdir(self, path: str, limit: int = MAX_LIST) -> list[str]:
        """The names in the directory at `path`, sorted.

        Raises FileNotFoundError; NotADirectoryError; OSError with E2BIG when more than `limit` must be looked at.
        """
        found = self._resolve(path, follow=True)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        if not isinstance(found, _Place):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
        return sorted(self._list(found.path, found.layers, limit)[0])

    def walk(
        self,
        top: str = "/",
        *,
        max_entries: int = MAX_ENTRIES,
        max_depth: int = MAX_DEPTH,
        closed: Callable[[str], None] | None = None,
    ) -> Iterator[Directory]:
        """Every directory below `top` and itself, parents first, names sorted. Symbolic links are not walked.

        A directory that we may not read (there are none for root) is passed to `closed` instead, if that is given.
        Raises ImageRefused when there are more than `max_entries` names, or more than `max_depth` levels below
        `top`, or a path that no program could name; PermissionError for a directory that is closed to us.
        """
        start = self._resolve(top, follow=True)
        if not isinstance(start, _Place):
            return
        seen = 0
        pending: list[tuple[str, Sequence[int], int]] = [(start.path, start.layers, 0)]
        while pending:
            path, layers, depth = pending.pop()
            if depth > max_depth or len(os.fsencode(path)) > _PATH_MAX:
                raise ImageRefused(
                    f"{path[:200]!r} is too deep", why=f"at most {max_depth} levels and {_PATH_MAX} bytes are walked"
                )
            try:
                names, examined = self._list(path, layers, max_entries - seen)
            except PermissionError:
                if closed is None:
                    raise
                closed(path or "/")
                continue
            except OSError as error:
                if error.errno != errno.E2BIG:
                    raise
                raise ImageRefused(
                    f"more than {max_entries} files and directories", why=f"counted to {path!r}"
                ) from error
            seen += examined
            step = Directory(path or "/", [], [], [])
            groups = {"dir": step.dirs, "file": step.files, "symlink": step.links}
            for name in sorted(names):
                if names[name][0] in groups:
                    groups[names[name][0]].append(name)
            yield step
            for name in reversed(step.dirs):
                below = f"{path}/{name}"
                pending.append((below, self._parts(below, names[name][1]), depth + 1))

    def which(self, program: str, path_env: str) -> str | None:
        """The path at which execvp(3) would find `program`, in the sandbox's words; relative places are passed over."""
        if "/" in program:
            places = [program] if program.startswith("/") else []
        else:
            names = path_env.split(":", _MOST_PLACES)[:_MOST_PLACES]
            places = [f"{place.rstrip('/')}/{program}" for place in names if place.startswith("/")]
        for place in places:
            found = self.resolve(place) if program else None
            if found is not None and found.kind == "file" and found.mode & 0o111:
                return place
        return None

    def _resolve(self, path: str, follow: bool) -> _Place | Entry | None:
        trail = [self._root]
        pending = path.split("/")[::-1]
        links = steps = 0
        while pending:
            name = pending.pop()
            steps += 1
            if steps > _MAX_STEPS:
                return None
            if name in {"", "."}:
                continue
            if name == "..":
                del trail[max(1, len(trail) - 1) :]
                continue
            found = self._look(trail[-1], name)
            if isinstance(found, _Place):
                trail.append(found)
            elif found is None:
                return None
            elif found.kind == "symlink" and (pending or follow):
                links += 1
                if links > MAX_LINKS or not found.target:
                    return None
                if found.target.startswith("/"):
                    del trail[1:]
                pending += found.target.split("/")[::-1]
            else:
                return None if pending else found
        return trail[-1]

    def _look(self, parent: _Place, name: str) -> _Place | Entry | None:
        """What is called `name` in the directory `parent`; no link is followed."""
        path = f"{parent.path}/{name}"
        if path in self._places:
            return self._places[path]
        first: Entry | None = None
        layers: list[int] = []
        for layer in parent.layers:
            try:
                held = open_beneath(self._roots[layer], path)
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                if error.errno == errno.ENAMETOOLONG:
                    return None
                raise
            except ValueError:
                return None  # a NUL, or what no file name can be encoded from
            try:
                status = os.fstat(held)
                if is_whiteout(status):
                    break
                if not stat.S_ISDIR(status.st_mode):
                    if first is None:
                        target = os.readlink("", dir_fd=held) if stat.S_ISLNK(status.st_mode) else ""
                        return self._entry(path, status, target, layer)
                    break
                first = first or self._entry(path, status, "", layer)
                layers.append(layer)
                if layer != parent.layers[-1] and is_opaque(held):
                    break
            finally:
                os.close(held)
        if first is None:
            return None
        if len(self._places) >= _MAX_CACHED:
            self._places.clear()
        place = _Place(path, tuple(layers), first)
        self._places[path] = place
        return place

    def _list(self, path: str, layers: Sequence[int], limit: int) -> tuple[dict[str, tuple[Kind, list[int]]], int]:
        """What a directory holds, and how many names had to be looked at for it.

        With each name comes its kind and, for a directory, the layers that may have a part in it.
        """
        names: dict[str, tuple[Kind, list[int]]] = {}
        closed: set[str] = set()  # names that nothing below can change any more
        examined = 0
        for layer in layers:
            held = open_beneath(self._roots[layer], path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                with os.scandir(held) as entries:
                    for entry in entries:
                        examined += 1
                        if examined > limit:
                            raise OSError(errno.E2BIG, f"more than {limit} names", path or "/")
                        name = entry.name
                        if name in closed:
                            continue
                        if entry.is_dir(follow_symlinks=False):
                            names.setdefault(name, ("dir", []))[1].append(layer)
                            continue
                        closed.add(name)
                        kind = _kind_of(entry)
                        if name not in names and kind is not None:
                            names[name] = (kind, [])
            finally:
                os.close(held)
        return names, examined

    def _parts(self, path: str, layers: Sequence[int]) -> list[int]:
        """Which of `layers`, that all have a directory at `path`, are seen there: down to the first opaque one."""
        parts: list[int] = []
        for layer in layers:
            parts.append(layer)
            if layer != layers[-1]:
                held = open_beneath(self._roots[layer], path)
                try:
                    if is_opaque(held):
                        break
                finally:
                    os.close(held)
        return parts

    def _entry(self, path: str, status: os.stat_result, target: str, layer: int) -> Entry:
        kind = _KINDS[stat.S_IFMT(status.st_mode)]
        return Entry(
            path, kind, stat.S_IMODE(status.st_mode), self._shown(status.st_uid), self._shown(status.st_gid),
            status.st_size, status.st_mtime_ns, target, layer, (status.st_dev, status.st_ino),
        )  # fmt: skip

    def _shown(self, number: int) -> int:
        if self._uid_base is None:
            return number
        number -= self._uid_base
        return number if 0 <= number <= 65535 else 65534


def _kind_of(entry: os.DirEntry[str]) -> Kind | None:
    """The kind of what is no directory; None for a whiteout, and for what went away."""
    if entry.is_file(follow_symlinks=False):
        return "file"
    if entry.is_symlink():
        return "symlink"
    try:
        status = entry.stat(follow_symlinks=False)
    except FileNotFoundError:
        return None
    return None if is_whiteout(status) else _KINDS[stat.S_IFMT(status.st_mode)]
