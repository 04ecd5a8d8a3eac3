"""Several layers as one, exactly as overlayfs would show them, without copying: files are hard links.

The names and types come from layers that were unpacked here, so this parses no foreign bytes; it is jailed all the
same. It can link and make, but open no file for writing.
"""

from __future__ import annotations

import os
import stat
from typing import Any

from tartarus.images.unpack.inside.copying import set_attributes, settle
from tartarus.images.unpack.inside.cursor import DIRECTORY, Cursor, Parts
from tartarus.images.unpack.inside.extract import OPAQUE
from tartarus.images.unpack.inside.refusal import Refused
from tartarus.images.unpack.inside.trees import Entry, attributes
from tartarus.images.unpack.limits import Limits


class _Folder:
    """A directory of the result: the layers that it is in, top first, and whether it hides what lies below them.

    `beneath`: those of the layers below the run that an overlay would merge with it.
    """

    __slots__ = ("beneath", "layers", "opaque", "parts")

    def __init__(self, parts: Parts, layers: list[int], beneath: list[int]) -> None:
        self.parts = parts
        self.layers = layers
        self.beneath = beneath
        self.opaque = False


def merge(layers: list[str], beneath: list[str], into: str, limits: Limits, *, owners: bool) -> dict[str, Any]:
    """Link the content of `layers` (top first) into the empty directory `into`; its entries, and its files' bytes.

    `beneath` are the layers below these, top first. A deletion is kept only where it deletes something of theirs:
    overlayfs lists others by name in directories that it need not merge, though nobody can open them.
    """
    sources = [Cursor(os.open(layer, DIRECTORY)) for layer in (*layers, *beneath)]
    target = Cursor(os.open(into, DIRECTORY))
    # Overlayfs merges the roots of all layers, whatever their attributes say.
    pending = [_Folder((), list(range(len(layers))), list(range(len(layers), len(sources))))]
    made: list[_Folder] = []
    entries = total = 0
    while pending:
        folder = pending.pop()
        made.append(folder)
        directory = target.to(folder.parts)
        found, count, size = _merge_folder(folder, sources, directory)
        entries += count
        total += size
        if entries > limits.entries:
            raise Refused("the layers have too many entries", f"more than {limits.entries}")
        for child in found:
            os.mkdir(child.parts[-1], 0o700, dir_fd=directory)
            child.beneath = [] if child.opaque else _merged(child.parts, folder.beneath, sources)
        pending += found
    for folder in made:
        _settle(folder, sources[folder.layers[0]], target, limits, owners=owners)
    return {"entries": entries, "bytes": total}


def _merge_folder(folder: _Folder, sources: list[Cursor], into: int) -> tuple[list[_Folder], int, int]:
    """Link what is no directory; the directories, how many entries there are, and the bytes of the files."""
    folders: dict[bytes, _Folder] = {}
    finished: set[bytes] = set()
    size = 0
    for layer in folder.layers:
        for name in _names(sources[layer].to(folder.parts)):
            if name in finished:
                continue
            parts = (*folder.parts, name)
            directory = sources[layer].to(folder.parts)
            status = os.stat(name, dir_fd=directory, follow_symlinks=False)
            above = folders.get(name)
            if stat.S_ISDIR(status.st_mode):
                if above is None:
                    above = folders[name] = _Folder(parts, [], [])
                above.layers.append(layer)
                above.opaque = _is_opaque(sources[layer].to(parts))
                if above.opaque:
                    finished.add(name)
                continue
            finished.add(name)
            if above is not None:
                # What the lowest of these directories stands on was deleted or is no directory: the rest is hidden.
                above.opaque = True
            elif not stat.S_ISCHR(status.st_mode):
                os.link(name, name, src_dir_fd=directory, dst_dir_fd=into, follow_symlinks=False)
                size += status.st_size if stat.S_ISREG(status.st_mode) else 0
            elif any(_kind(sources[below], parts) for below in folder.beneath):
                os.mknod(name, stat.S_IFCHR, 0, dir_fd=into)
    return list(folders.values()), len(folders.keys() | finished), size


def _merged(parts: Parts, candidates: list[int], sources: list[Cursor]) -> list[int]:
    """The layers, of those that have the directory above, whose directory `parts` an overlay merges."""
    found = []
    for layer in candidates:
        kind = _kind(sources[layer], parts)
        if kind == stat.S_IFDIR:
            found.append(layer)
        if kind and (kind != stat.S_IFDIR or _is_opaque(sources[layer].to(parts))):
            break
    return found


def _kind(source: Cursor, parts: Parts) -> int:
    """What a layer has at `parts`, whose directory it has; 0 for nothing."""
    try:
        status = os.stat(parts[-1], dir_fd=source.to(parts[:-1]), follow_symlinks=False)
    except FileNotFoundError:
        return 0
    return stat.S_IFMT(status.st_mode)


def _names(directory: int) -> list[bytes]:
    return [os.fsencode(name) for name in os.listdir(directory)]


def _is_opaque(directory: int) -> bool:
    try:
        return os.getxattr(directory, OPAQUE) == b"y"
    except OSError:
        return False


def _settle(folder: _Folder, source: Cursor, target: Cursor, limits: Limits, *, owners: bool) -> None:
    """The attributes, owner, mode and time of a directory are those of the topmost layer that has it."""
    fd = source.to(folder.parts)
    made = target.to(folder.parts)
    status = os.fstat(fd)
    set_attributes(made, attributes(fd, Entry(fd, folder.parts, status), limits)[0])
    if folder.opaque:
        os.setxattr(made, OPAQUE, b"y")
    settle(made, status, owners=owners)
