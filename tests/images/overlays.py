"""What real overlays show: the reference for what is made of layers here. As root, in mount namespaces of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

View = dict[str, list[object]]

_LOOK = """
import hashlib, json, os, stat, subprocess, sys
def view(root):
    found = {}
    for folder, folders, files in os.walk(root):
        for name in [*folders, *files, *(["."] if folder == root else [])]:
            path = os.path.join(folder, name)
            try:
                status = os.lstat(path)
            except FileNotFoundError:
                continue  # the name of a deletion in a directory that is not merged; listed, but not there
            content = ""
            if stat.S_ISREG(status.st_mode):
                with open(path, "rb") as file:
                    content = hashlib.sha256(file.read()).hexdigest()
            elif stat.S_ISLNK(status.st_mode):
                content = os.readlink(path)
            names = [n for n in os.listxattr(path, follow_symlinks=False) if n.startswith("user.")]
            xattrs = {n: os.getxattr(path, n).hex() for n in names}
            found[os.path.relpath(path, root)] = [oct(status.st_mode), status.st_uid, content, xattrs]
    return found
mount, views = sys.argv[1], []
for stack in json.load(sys.stdin):
    options = "ro,userxattr,lowerdir=" + ":".join(stack)
    # The directories are short names here, so that many fit in mount's page of options.
    subprocess.run(["mount", "-i", "-t", "overlay", "-o", options, "overlay", mount], check=True)
    views.append(view(mount))
    subprocess.run(["umount", mount], check=True)
json.dump(views, sys.stdout)
"""


def views(folder: Path, stacks: Sequence[Sequence[Path]]) -> list[View]:
    """What each stack (top first) shows, by path: mode, owner, content, attributes."""
    mount, empty = folder / "mount", folder / "empty"
    for place in (mount, empty):
        place.mkdir(exist_ok=True)
        place.chmod(0o755)
    links = folder / "l"
    links.mkdir(exist_ok=True)
    short: list[list[str]] = []
    for stack in stacks:
        names = []
        # An overlay without an upper directory takes two lower ones at least.
        for path in (*stack, empty):
            link = links / str(len(list(links.iterdir())))
            link.symlink_to(path)
            names.append(str(link))
        short.append(names)
    done = subprocess.run(
        ["unshare", "-m", sys.executable, "-c", _LOOK, str(mount)],
        input=json.dumps(short), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: list[View] = json.loads(done.stdout)
    return found
