"""Build steps on the host template: what they may do, and what is kept of them."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tartarus.images import catalogue, prepare
from tartarus.model.errors import CommandNotFound, NoSpace, TimeLimit
from tartarus.model.sandbox import Isolation, Resources
from tartarus.model.settings import Settings
from tartarus.node.levels import Levels
from tartarus.node.steps import Step, run_step
from tartarus.runtimes.base import RootFs, base_environment
from tartarus.runtimes.trees import remove_tree

pytestmark = [pytest.mark.anyio, pytest.mark.needs("user-namespaces")]


class Builder:
    def __init__(self, levels: Levels, rootfs: RootFs, place: Path) -> None:
        self.levels = levels
        self.rootfs = rootfs
        self.place = place
        self.owner = levels.id_map.base if levels.id_map.privileged else None
        self.out = bytearray()

    async def run(self, *argv: str, timeout_s: float = 60.0) -> tuple[int, Path]:
        tree = self.place / f"step-{len(list(self.place.iterdir()))}" / "tree"
        tree.mkdir(parents=True)
        step = Step(argv=argv, env=base_environment("/root"), timeout_s=timeout_s)
        status = await run_step(
            self.levels.runtimes[Isolation.CONTAINER], self.rootfs, step, tree, Resources(),
            lambda _stream, data: self.out.extend(data), owner=self.owner,
        )  # fmt: skip
        assert [path.name for path in tree.parent.iterdir()] == ["tree"]
        return status.shell_status, tree


@pytest.fixture
async def builder(state_dir: Path) -> AsyncIterator[Builder]:
    levels = Levels(Settings.at(state_dir))
    levels.open()
    owner = levels.id_map.base if levels.id_map.privileged else None
    prepared = await prepare(catalogue()["host"], Settings.at(state_dir), owner, lambda _line: None)
    rootfs = RootFs(prepared.template, prepared.layers, prepared.binds, prepared.digest)
    place = state_dir / "steps"
    place.mkdir(exist_ok=True)
    yield Builder(levels, rootfs, place)
    await levels.close()
    assert remove_tree(place)


@pytest.mark.needs("root")
async def test_what_a_step_changes_becomes_a_layer(builder):
    script = """
    set -e
    echo new >/etc/new && chown 33:34 /etc/new && chmod 4755 /etc/new
    rm /etc/hosts && rm -r /var/log && mkdir /var/log
    setpriv --reuid=33 --regid=33 --clear-groups sh -c 'id -u; : >/tmp/by-33'
    """
    status, tree = await builder.run("sh", "-c", script)
    assert (status, bytes(builder.out)) == (0, b"33\n")
    found = os.stat(tree / "etc/new")
    base = builder.owner
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (base + 33, base + 34, 0o4755)
    assert os.stat(tree / "tmp/by-33").st_uid == base + 33
    gone = os.lstat(tree / "etc/hosts")
    assert (stat.S_ISCHR(gone.st_mode), gone.st_rdev) == (True, 0)
    assert os.getxattr(tree / "var/log", "user.overlay.opaque") == b"y"
    assert (os.stat(tree).st_uid, stat.S_IMODE(os.stat(tree).st_mode)) == (base, 0o755)


async def test_what_a_step_may_not(builder):
    tries = {
        "mount": "mount -t tmpfs none /mnt",
        "device": "mknod /tmp/null c 1 3",
        "network": "ip link add dummy0 type dummy",
        "time": "date -s 2020-01-01",
        "namespace": "unshare --mount true",
        "host name": "hostname other",
        "trace": "python3 -c 'import ctypes, sys; sys.exit(ctypes.CDLL(None).ptrace(16, 1, 0, 0) != 0)'",
    }
    script = "; ".join(f"({command}) >/dev/null 2>&1 && echo '{name}'" for name, command in tries.items())
    status, _ = await builder.run("sh", "-c", f"{script}; true")
    assert (status, bytes(builder.out)) == (0, b"")


@pytest.mark.needs("root")
@pytest.mark.parametrize("what", ["bytes", "files"])
async def test_a_step_that_fills_the_disk_is_ended(builder, what):
    """In time to clean up, however it is filled."""
    options = {"bytes": "size=64m", "files": "size=640m,nr_inodes=4000"}[what]
    fill = {"bytes": "fallocate -l 63M /srv/all", "files": "mkdir /srv/d; for i in $(seq 3950); do : >/srv/d/$i; done"}
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", builder.place], check=True)
    try:
        with pytest.raises(NoSpace):
            await builder.run("sh", "-c", f"{fill[what]}; sleep 600", timeout_s=30)
        assert [list(tree.iterdir()) for tree in builder.place.glob("*/tree")] == [[]]
    finally:
        subprocess.run(["umount", builder.place], check=True)


async def test_where_the_host_keeps_it_is_not_shown(builder):
    status, _ = await builder.run("sh", "-c", "cat /proc/self/mountinfo /proc/self/mounts; echo shared >/dev/shm/x")
    assert status == 0
    assert str(builder.place).encode() not in bytes(builder.out)
    assert b"storage" not in bytes(builder.out)


async def test_nothing_is_kept_of_a_step_that_fails(builder):
    status, tree = await builder.run("sh", "-c", "echo x >/etc/x; echo no >&2; exit 7")
    assert (status, bytes(builder.out), list(tree.iterdir())) == (7, b"no\n", [])


async def test_a_step_that_can_not_start_or_end(builder):
    with pytest.raises(CommandNotFound):
        await builder.run("no-such-command")
    with pytest.raises(TimeLimit):
        await builder.run("sleep", "600", timeout_s=0.2)


async def test_what_a_step_leaves_is_removed_however_much_it_is(builder):
    """Wide, deep, closed to everybody, and with processes that try to outlive it."""
    script = """
    (setsid sh -c 'while :; do echo more >>/srv/more; done' &) >/dev/null 2>&1
    mkdir -p /srv/wide /srv/deep && cd /srv/wide && seq 6000 | xargs mkdir && seq 6001 12000 | xargs touch
    cd /srv/deep && for i in $(seq 600); do mkdir d && cd d; done
    chmod 0 /srv /srv/wide /dev/shm / 2>/dev/null; mkdir -p /dev/shm/left/over; exit 3
    """
    status, tree = await builder.run("sh", "-c", script)
    assert (status, list(tree.iterdir())) == (3, [])


@pytest.mark.needs("root")
async def test_marks_that_only_overlayfs_may_set(builder):
    """A step that calls its directory opaque, or its file a link to elsewhere, has not changed what lies below."""
    script = """
import os
os.mkdir("/srv/d")
for name in ("opaque", "redirect", "metacopy", "whiteout", "whiteouts"):
    for kind in ("user", "trusted"):
        try:
            os.setxattr("/srv/d", f"{kind}.overlay.{name}", b"y")
        except OSError:
            pass
for kind in (0o020000, 0o060000):
    try:
        os.mknod("/srv/d/node", kind | 0o600, os.makedev(0, 0))
    except OSError:
        pass
"""
    status, tree = await builder.run("python3", "-c", script)
    assert status == 0
    marks = {name for name in os.listxattr(tree / "srv/d") if "overlay" in name}
    # Since Linux 6.7 such a name is kept, marked as one that means nothing here.
    assert all(name.startswith("user.overlay.overlay.") for name in marks)
    assert not (tree / "srv/d/node").exists()
