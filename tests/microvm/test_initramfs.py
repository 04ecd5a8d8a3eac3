"""The archive that a machine starts from, read by another implementation of the format."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tartarus.model.template import RunAs, Template, WarmUp
from tartarus.runtimes.base import RootFs
from tartarus.runtimes.microvm.initramfs import archive, initramfs
from tartarus.runtimes.microvm.runtime import sandbox_files


@pytest.mark.needs("busybox", "root")
def test_it_is_what_cpio_reads(tmp_path: Path) -> None:
    """Content, directories and the console's device; a second archive behind the first adds to it."""
    whole = initramfs(b"agent", [("a.ko", b"module a"), ("b.ko", b"xy")])
    subprocess.run(["busybox", "cpio", "-idm"], cwd=tmp_path, input=whole, check=True, capture_output=True)
    assert (tmp_path / "init").read_bytes() == b"agent"
    assert (tmp_path / "init").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "modules.list").read_text() == "/lib/a.ko\n/lib/b.ko\n"
    assert (tmp_path / "lib/b.ko").read_bytes() == b"xy"
    assert (tmp_path / "dev/console").is_char_device()
    assert len(whole) % 4 == 0
    extra = archive({"sandbox/user": b"1 2"})
    subprocess.run(["busybox", "cpio", "-idmu"], cwd=tmp_path, input=extra, check=True, capture_output=True)
    assert (tmp_path / "sandbox/user").read_bytes() == b"1 2"


def test_what_init_is_told_of_a_sandbox() -> None:
    """Whose programs run, what is shown where, and what is parked; words are separated by NULs."""
    warm_up = WarmUp(interpreter="/usr/bin/python3", imports=("a", "b"))
    template = Template(id="t", name="t", user=RunAs(uid=5, gid=6, groups=(7, 8)), warm_up=warm_up, env={"X": "y z"})
    rootfs = RootFs(template, (), (), "")
    cold = sandbox_files(rootfs, ("/usr",), warm=False)
    assert cold == {"user": b"5 6 7 8", "binds": b"tartarus-bind-0 /usr\n"}
    warm = sandbox_files(rootfs, (), warm=True)
    assert warm["argv"].split(b"\0")[:4] == [b"/usr/bin/python3", b"/opt/tartarus/runner.py", b"companion", b"--link=3"]
    assert b"X=y z" in warm["env"].split(b"\0")
