"""One saved machine for all tests of a module: its first boot takes seconds without hardware virtualisation."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from tests.needs import kernel_package

from tartarus.guest.channel import GuestExec
from tartarus.model.errors import IsolationUnavailable
from tartarus.model.sandbox import Resources
from tartarus.model.template import Template
from tartarus.runtimes.base import GuestRequest, RootFs
from tartarus.runtimes.cgroups import open_hierarchy
from tartarus.runtimes.idmap import PRIVILEGED_BASE, host_id_map
from tartarus.runtimes.microvm import kernel
from tartarus.runtimes.microvm.guest import MachineGuest
from tartarus.runtimes.microvm.runtime import MicrovmRuntime
from tartarus.runtimes.microvm.snapshot import MachineSnapshot

RESOURCES = Resources(memory_bytes=128 * 1024**2, disk_bytes=64 * 1024**2)
APPLETS = [
    "sh",
    "echo",
    "cat",
    "hostname",
    "dd",
    "id",
    "stty",
    "sleep",
    "mount",
    "ls",
    "od",
    "head",
    "mkdir",
    "wc",
    "md5sum",
    "mv",
    "rm",
    "sync",
    "kill",
    "ps",
    "reboot",
    "halt",
    "poweroff",
    "touch",
    "date",
    "cut",
    "seq",
    "true",
    "tail",
    "ln",
    "uname",
]


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    """Module-wide fixtures need a module-wide loop."""
    return "asyncio"


@pytest.fixture(scope="session")
def state_dir() -> Iterator[Path]:
    """A daemon's directory, with an installed kernel."""
    path = Path(tempfile.mkdtemp(prefix="tartarus-microvm-", dir="/var/tmp"))
    package = kernel_package()
    if package is not None:
        kernel.install(package, path / "kernels")
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def rootfs(state_dir: Path) -> RootFs:
    """Two layers: busybox below, one file above; their files belong to the sandboxes' ids."""
    lower, upper = state_dir / "lower", state_dir / "upper"
    for name in ("bin", "etc", "root", "work"):
        (lower / name).mkdir(parents=True)
    shutil.copy(shutil.which("busybox") or "/bin/busybox", lower / "bin" / "busybox")
    for name in APPLETS:
        (lower / "bin" / name).symlink_to("busybox")
    (lower / "etc" / "motd").write_text("below")
    (upper / "etc").mkdir(parents=True)
    (upper / "etc" / "motd").write_text("above")
    for top in (lower, upper):
        for directory, names, files in os.walk(top):
            for path in [directory, *(os.path.join(directory, name) for name in [*names, *files])]:
                os.lchown(path, PRIVILEGED_BASE, PRIVILEGED_BASE)
    return RootFs(Template(id="busybox", name="busybox"), (upper, lower), (), "sha256:busybox")


@pytest.fixture(scope="module")
async def runtime(state_dir: Path, anyio_backend: str) -> AsyncIterator[MicrovmRuntime]:
    """The level's runtime; at its end no monitor may be left."""
    hierarchy = None
    with contextlib.suppress(IsolationUnavailable):
        hierarchy = open_hierarchy(state_dir)
    made = MicrovmRuntime(state_dir, state_dir / "kernels", hierarchy, host_id_map())
    yield made
    await made.close()
    if hierarchy is not None:
        assert hierarchy.existing() == []
        hierarchy.close()


@pytest.fixture(scope="module")
async def snapshot(runtime: MicrovmRuntime, rootfs: RootFs) -> MachineSnapshot:
    """The template, packed."""
    made = await runtime.snapshot(rootfs)
    assert isinstance(made, MachineSnapshot)
    return made


async def start(runtime: MicrovmRuntime, snapshot: MachineSnapshot, name: str) -> MachineGuest:
    """A ready guest."""
    guest = await runtime.clone(snapshot, GuestRequest(name, name, RESOURCES), warm=False)
    assert isinstance(guest, MachineGuest)
    await guest.ready()
    return guest


async def sh(guest: MachineGuest, script: str) -> str:
    """What a script prints."""
    process = guest.channel.exec(GuestExec(argv=("/bin/sh", "-c", script), env={"PATH": "/bin"}))
    said = b""
    while (piece := await process.read()) is not None:
        said += piece[1]
    await process.wait()
    return said.decode()
