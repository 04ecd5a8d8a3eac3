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
    """A directory of the result: the layers that it is in, top first, and whether it hides what lies below them."""

    __slots__ = ("layers", "opaque", "parts")

    def __init__(self, parts: Parts, layers: list[int], *, opaque: bool) -> None:
        self.parts = parts
        self.layers = layers
        self.opaque = opaque


def merge(layers: list[str], into: str, limits: Limits, *, owners: bool) -> dict[str, Any]:
    """Link the content of `layers` (top first) into the empty directory `into`; its entries, and its files' bytes."""
    sources = [Cursor(os.open(layer, DIRECTORY)) for layer in layers]
    target = Cursor(os.open(into, DIRECTORY))
    # Overlayfs merges the roots of all layers, whatever their attributes say.
    pending = [_Folder((), list(range(len(layers))), opaque=False)]
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
                    above = folders[name] = _Folder(parts, [], opaque=False)
                above.layers.append(layer)
                above.opaque = _is_opaque(sources[layer].to(parts))
                if above.opaque:
                    finished.add(name)
                continue
            finished.add(name)
            if above is not None:
                # What the lowest of these directories stands on was deleted or is no directory: the rest is hidden.
                above.opaque = True
            elif stat.S_ISCHR(status.st_mode):
                os.mknod(name, stat.S_IFCHR, 0, dir_fd=into)
            else:
                os.link(name, name, src_dir_fd=directory, dst_dir_fd=into, follow_symlinks=False)
                size += status.st_size if stat.S_ISREG(status.st_mode) else 0
    return list(folders.values()), len(folders.keys() | finished), size


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
