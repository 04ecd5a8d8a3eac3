"""A real node on real sandboxes; its state directory lets other users through, as process-level guests need."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from tartarus.model.sandbox import ExecSpec, Isolation, Reason, SandboxRecord, SandboxSpec
from tartarus.model.settings import Settings
from tartarus.node.sandbox import Sandbox
from tartarus.node.service import Node
from tartarus.store.sandboxes import SandboxStore

from .images import guest_images
from .making import Maker

TENANT = f"uid-{os.getuid()}"


class Ran(msgspec.Struct):
    """What one command gave."""

    out: bytes
    err: bytes
    record: SandboxRecord


Run = Callable[..., Awaitable[Ran]]


@pytest.fixture(scope="session")
def state_dir() -> Iterator[Path]:
    """Shared by all tests of the session, so that templates are built once."""
    path = Path(tempfile.mkdtemp(prefix="tartarus-node-", dir="/var/tmp"))
    path.chmod(0o711)
    with guest_images(path):
        yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
async def store(state_dir: Path) -> AsyncIterator[SandboxStore]:
    """The node's store."""
    opened = await SandboxStore.open(state_dir / "state.db")
    yield opened
    await opened.close()


@pytest.fixture
async def node(state_dir: Path, store: SandboxStore) -> AsyncIterator[Node]:
    """A started node; at its end nothing of it may be left on the host."""
    settings = Settings.at(state_dir)
    started = Node(settings, store)
    await started.start()
    yield started
    await started.stop(Reason.NODE_DRAIN)
    assert leftovers(state_dir) == []
    assert await store.alive() == []


def leftovers(state_dir: Path) -> list[str]:
    """Groups and working directories of this state directory's sandboxes that are still there."""
    from tartarus.runtimes.cgroups import open_hierarchy

    groups = open_hierarchy(state_dir).existing() if os.geteuid() == 0 else []
    homes = [path.name for path in (state_dir / "process").iterdir()] if (state_dir / "process").is_dir() else []
    return [*groups, *homes]


async def finish(sandbox: Sandbox) -> Ran:
    """Read a sandbox's main command to its end."""
    out, err = b"", b""
    assert sandbox.main is not None
    while (piece := await sandbox.main.read()) is not None:
        if piece[0] == 1:
            out += piece[1]
        else:
            err += piece[1]
    return Ran(out, err, await sandbox.wait())


@pytest.fixture
def run(node: Node) -> Run:
    """A function that runs one command to its end."""

    async def run_one(isolation: Isolation, *argv: str, stdin: bytes | None = None, **spec: object) -> Ran:
        command = ExecSpec(argv=argv, stdin=stdin is not None)
        sandbox = await node.create(TENANT, SandboxSpec(isolation=isolation, command=command, **spec))  # type: ignore[arg-type]
        if stdin is not None and sandbox.main is not None:
            await sandbox.main.write_stdin(stdin)
            sandbox.main.close_stdin()
        return await finish(sandbox)

    return run_one


@pytest.fixture
async def maker(node: Node) -> AsyncIterator[Maker]:
    made = Maker(node, TENANT)
    yield made
    for info in await node.library.templates.list(TENANT):
        if not info.builtin:
            await node.library.templates.remove(TENANT, info.name)
    for snapshot in await node.library.snapshots.list(TENANT):
        await node.library.snapshots.delete(TENANT, snapshot.id)


both_levels = pytest.mark.parametrize(
    "isolation",
    [
        Isolation.CONTAINER,
        Isolation.PROCESS,
        pytest.param(Isolation.GVISOR, marks=pytest.mark.needs("runsc")),
        pytest.param(Isolation.MICROVM, marks=pytest.mark.needs("microvm")),
    ],
    ids=lambda level: level.value,
)
