"""COPY, ADD and WORKDIR: files of a tree become a layer, placed, owned and given modes as Docker does."""

from __future__ import annotations

import errno
import posixpath
import re
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Final

import msgspec

from tartarus.images.accounts import MAX_ID, find_group, find_user
from tartarus.images.dockerfile.archives import is_archive, unpack
from tartarus.images.dockerfile.context import FileTree, Item, Picked, Watch, file_mode
from tartarus.images.dockerfile.layer import ROOT, LayerWriter, Owner
from tartarus.images.stackview import StackView
from tartarus.model.errors import InvalidRequest

_THEIRS: Final = {errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP, errno.EMLINK, errno.ENOTDIR, errno.ESTALE}
"""What goes wrong because of a name, a link or a change in the tree, and not because of this host."""
_MODE: Final = re.compile(r"[0-7]{3,4}")
_NUMBER: Final = re.compile(r"[0-9]{1,10}")


class InlineFile(msgspec.Struct, frozen=True):
    """A file out of the Dockerfile, its variables put in."""

    name: str
    content: str


class Placement(msgspec.Struct, frozen=True):
    """Where copies go and what they become. `destination` is absolute; a slash at its end says directory.

    `chown` is ``user``, ``user:group`` or empty; `mode` None keeps the source's. `keep_owner`: without a `chown`,
    the source's owner stays, as with a stage's files; otherwise it is root. `unpack`: tar archives are taken apart.
    """

    destination: str
    chown: str = ""
    mode: int | None = None
    keep_owner: bool = False
    unpack: bool = False


class CopyJob:
    """One COPY or ADD. Its methods block: one after the other, in threads.

    `layers` is the stack that it is for; `source` what it takes from, top first, or nothing when all is inline.
    A source that is the build context is known by its content, any other by the `key` it comes with.
    """

    def __init__(
        self,
        layers: Sequence[Path],
        uid_base: int | None,
        source: Sequence[Path],
        what: str,
        key: str,
        patterns: Sequence[str],
        inline: Sequence[InlineFile],
        placement: Placement,
        watch: Watch,
    ) -> None:
        """Nothing is opened yet. An empty `key` says that `source` is the build context; `what` names it."""
        self._layers = layers
        self._uid_base = uid_base
        self._source = source
        self._what = what
        self._key = key
        self._patterns = patterns
        self._inline = inline
        self._placement = placement
        self._watch = watch
        self._tree: FileTree | None = None
        self._picked: list[Picked] | None = None

    def identity(self) -> tuple[object, ...]:
        """What the layer depends on, beside the stack below it. Raises InvalidRequest when that can't be read."""
        if not self._source:
            known: object = ""
        elif self._key:
            known = (self._key, self._patterns)
        else:
            try:
                known = self._open().digest(self._pick(), self._watch)
            except InterruptedError:
                raise
            except OSError as error:
                raise InvalidRequest(f"{self._what} can't be read", why=str(error)) from error
        return known, self._inline, self._placement

    def write(self, tree: Path) -> None:
        """Make the layer in the empty directory `tree`. Raises InvalidRequest, and OSError from the disk."""
        try:
            picked = self._pick() if self._source else []
            with _view(self._layers, self._uid_base) as below, LayerWriter(tree, below, self._uid_base) as writer:
                _copy_files(writer, below, self._tree, picked, self._inline, self._placement, self._watch)
        except OSError as error:
            if error.errno not in _THEIRS:
                raise
            raise InvalidRequest(f"{str(error.filename)[:200]!r}: {error.strerror}") from error

    def close(self) -> None:
        """Let go of the source."""
        if self._tree is not None:
            self._tree.close()
            self._tree = None

    def _open(self) -> FileTree:
        if self._tree is None:
            is_context = not self._key
            uid_base = None if is_context else self._uid_base
            self._tree = FileTree(self._source, uid_base, is_context=is_context, what=self._what)
        return self._tree

    def _pick(self) -> list[Picked]:
        if self._picked is None:
            tree = self._open()
            self._picked = [picked for pattern in self._patterns for picked in tree.pick(pattern, self._watch)]
        return self._picked


def parse_mode(text: str) -> int | None:
    """The octal mode of --chmod; None for none. Raises InvalidRequest."""
    if not text:
        return None
    if not _MODE.fullmatch(text):
        raise InvalidRequest(f"--chmod={text[:40]} is not supported", fix="write an octal mode, such as --chmod=755")
    return int(text, 8)


def find_owner(below: StackView | None, spec: str) -> Owner:
    """The ids of ``user`` or ``user:group`` in the stack. A number without a group is its own group, as in Docker.

    Raises InvalidRequest for a name that the stack's files don't have, and for ids out of range.
    """
    if not spec:
        return ROOT
    user, _, group = spec.partition(":")
    if not user or (":" in spec and not group):
        raise InvalidRequest(f"--chown={spec[:100]} is incomplete", fix="write user, or user:group")
    numeric = _NUMBER.fullmatch(user) is not None
    if numeric and int(user) > MAX_ID:
        raise InvalidRequest(f"user {user}", why=f"sandboxes have ids 0 to {MAX_ID}")
    if below is None:
        if not numeric or (group and not _NUMBER.fullmatch(group)):
            raise InvalidRequest(f"--chown={spec[:100]}: an empty image has no names", fix="use numbers")
        owner = Owner(int(user), int(group or user))
        if owner.gid > MAX_ID:
            raise InvalidRequest(f"group {group}", why=f"sandboxes have ids 0 to {MAX_ID}")
        return owner
    if numeric:
        return Owner(int(user), find_group(below, group) if group else int(user))
    account = find_user(below, spec)
    return Owner(account.uid, account.gid)


def _copy_files(
    writer: LayerWriter,
    below: StackView | None,
    source: FileTree | None,
    picked: Sequence[Picked],
    inline: Sequence[InlineFile],
    placement: Placement,
    watch: Watch,
) -> None:
    """Write what a COPY or ADD picked. Raises InvalidRequest for what can't be done, OSError from the disk."""
    owner = find_owner(below, placement.chown) if placement.chown or not placement.keep_owner else None
    several = len(picked) + len(inline) > 1
    into = placement.destination.endswith("/")
    if several and not into:
        raise InvalidRequest("with more than one source the destination must be a directory", fix="end it with a slash")
    for file in inline:
        target = _target(writer, placement, file.name, ROOT if owner is None else owner)
        mode = 0o644 if placement.mode is None else placement.mode
        writer.file(target, [file.content.encode(errors="surrogateescape")], mode, owner or ROOT, time.time_ns())
    for pick in picked:
        assert source is not None
        _copy_one(writer, source, pick, owner, placement, watch)
    writer.finish()


def make_directory(tree: Path, layers: Sequence[Path], uid_base: int | None, path: str, user: str) -> None:
    """WORKDIR: a layer with the directory and its parents, where missing, for the image's user."""
    with _view(layers, uid_base) as below, LayerWriter(tree, below, uid_base) as writer:
        writer.resolve(path, create=find_owner(below, user))
        writer.finish()


def has_directory(layers: Sequence[Path], uid_base: int | None, path: str) -> bool:
    """Whether the stack has a directory at `path`. Raises InvalidRequest when something else is there."""
    if not layers:
        return False
    with StackView(layers, uid_base) as view:
        entry = view.resolve(path)
    if entry is not None and entry.kind != "dir":
        raise InvalidRequest(f"{path[:200]!r} is no directory", why=f"it is a {entry.kind}")
    return entry is not None


def _view(layers: Sequence[Path], uid_base: int | None) -> StackView | nullcontext[None]:
    return StackView(layers, uid_base) if layers else nullcontext()


def _copy_one(
    writer: LayerWriter, source: FileTree, pick: Picked, owner: Owner | None, placement: Placement, watch: Watch
) -> None:
    top = pick.top
    parents = ROOT if owner is None else owner
    if top.kind == "dir":
        place = writer.resolve(placement.destination, create=parents)
        assert place is not None
        for item in pick.items[1:]:
            _place(writer, source, item, posixpath.join(place, item.below), owner, placement, watch)
        return
    if placement.unpack and is_archive(source, top, watch):
        place = writer.resolve(placement.destination, create=parents)
        assert place is not None
        unpack(writer, source, top, place, owner if placement.chown else None, watch)
        return
    target = _target(writer, placement, pick.name, parents)
    _place(writer, source, Item("", top), target, owner, placement, watch)


def _target(writer: LayerWriter, placement: Placement, name: str, parents: Owner) -> str:
    """The canonical path for a file: below the destination if that is a directory, else the destination itself."""
    if placement.destination.endswith("/") or writer.is_directory(placement.destination):
        place = writer.resolve(placement.destination, create=parents)
    else:
        # A link at its end is followed when it leads somewhere, and replaced when it does not.
        found = writer.resolve(placement.destination)
        if found is not None:
            return found
        folder, name = posixpath.split(placement.destination)
        place = writer.resolve(folder, create=parents)
    assert place is not None
    return posixpath.join(place, name)


def _place(
    writer: LayerWriter,
    source: FileTree,
    item: Item,
    target: str,
    owner: Owner | None,
    placement: Placement,
    watch: Watch,
) -> None:
    entry = item.entry
    whose = Owner(entry.uid, entry.gid) if owner is None else owner
    mode = file_mode(entry) if placement.mode is None else placement.mode
    parent, name = posixpath.split(target)
    found = writer.resolve(parent, create=ROOT if owner is None else owner)
    assert found is not None
    target = posixpath.join(found, name)
    watch.check()
    if entry.kind == "dir":
        if writer.is_directory(target):
            # Perhaps through a link, as /lib leads to /usr/lib: what is in it then goes there.
            target = writer.resolve(target) or target
        writer.directory(target, mode, whose, entry.mtime_ns)
    elif entry.kind == "symlink":
        writer.symlink(target, entry.target, whose, entry.mtime_ns)
    else:
        writer.file(target, source.chunks(entry, watch), mode, whose, entry.mtime_ns)
