"""The layer above an image's own: mount points, the runners, name resolution, a place to work.

It lies on top, so that nothing in an image can stand where the sandbox's own mounts go (`/proc` as a link, say).
Directories that the image has too keep the image's owner and mode.
"""

from __future__ import annotations

import os
from importlib import resources

import msgspec

from tartarus.images.entries import Entry, directory, text
from tartarus.images.paths import CA_BUNDLE, OWN, RUNNER, WARM_UP_SCRIPT
from tartarus.images.skeleton import HOSTS
from tartarus.images.stackview import StackView
from tartarus.model.errors import ImageRefused
from tartarus.model.template import Template

_OWN_FILES = ("/etc/hosts", "/etc/hostname", "/etc/resolv.conf", RUNNER, CA_BUNDLE, WARM_UP_SCRIPT)
_MOUNT_POINTS = ("/.tartarus", "/dev", "/proc", "/sys")


def system_entries(template: Template, view: StackView) -> list[Entry]:
    """The entries of the layer for a template whose image shows as `view`. Raises ImageRefused."""
    runner = resources.files("tartarus").joinpath("guest", "runner.py").read_bytes()
    entries = [
        *(directory(path) for path in _MOUNT_POINTS),
        directory("/etc"),
        text("/etc/hosts", HOSTS),
        text("/etc/hostname", "sandbox\n"),
        text("/etc/resolv.conf", ""),
        directory("/tmp", 0o1777),  # noqa: S108 - the sandbox's
        directory(OWN),
        Entry(RUNNER, "file", 0o644, content=runner),
        text(CA_BUNDLE, ""),
        *_places(template, view),
    ]
    if template.warm_up is not None and template.warm_up.script:
        entries.append(text(WARM_UP_SCRIPT, template.warm_up.script))
    return [_as_in_image(entry, view) for entry in _with_parents(entries)]


def _places(template: Template, view: StackView) -> list[Entry]:
    """The working directory and home, where the image has none: the user's own. Never in the place of our own files."""
    missing = []
    for said in (template.workdir, template.user.home):
        path = os.path.normpath(f"/{said.lstrip('/')}")
        if any(f"{path}/".startswith(f"{own}/") for own in _OWN_FILES):
            raise ImageRefused(
                f"{path[:100]} can't be a directory", why="a file of the sandbox's own stands there",
                fix="set another workdir, or another home",
            )  # fmt: skip
        found = view.resolve(path)
        if found is None and not _below_a_link(path, view):
            missing.append(Entry(path, "dir", uid=template.user.uid, gid=template.user.gid))
        elif found is not None and found.kind != "dir":
            raise ImageRefused(
                f"{path} is no directory in the image", why=f"it is a {found.kind}", fix="set another workdir"
            )
    return missing


def _below_a_link(path: str, view: StackView) -> bool:
    """Whether a parent of `path` is a symbolic link in the image: then a directory of ours would hide it."""
    while (path := os.path.dirname(path)) not in {"/", ""}:
        found = view.resolve(path, follow=False)
        if found is not None:
            return found.path != os.path.normpath(path) or found.kind != "dir"
    return False


def _with_parents(entries: list[Entry]) -> list[Entry]:
    found = {entry.path: entry for entry in entries}
    for path in list(found):
        parent = os.path.dirname(path)
        while parent != "/":
            found.setdefault(parent, directory(parent))
            parent = os.path.dirname(parent)
    return sorted(found.values())


def _as_in_image(entry: Entry, view: StackView) -> Entry:
    if entry.kind != "dir":
        return entry
    found = view.resolve(entry.path, follow=False)
    if found is None or found.kind != "dir":
        return entry
    return msgspec.structs.replace(entry, mode=found.mode & 0o1777, uid=found.uid, gid=found.gid)
