"""The store of prepared directories: made once, whole or not at all, whoever asks and whatever is killed."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tartarus.images import LayerStore
from tartarus.model.errors import NoSpace, TemplateFailed

pytestmark = pytest.mark.anyio

# A builder that says when it is in the middle, and then never ends by itself.
STUCK_BUILDER = """
import asyncio, sys
from pathlib import Path
from tartarus.images import LayerStore

async def build(tree, lock):
    (tree / "half").write_text("x")
    child = None
    if sys.argv[2] == "with-child":
        child = await asyncio.create_subprocess_exec("sleep", "1000", pass_fds=(lock,))
    print(child.pid if child else 0, flush=True)
    await asyncio.Event().wait()

asyncio.run(LayerStore(Path(sys.argv[1])).get("rootfs-1", build))
"""


def start_stuck_builder(root: Path, kind: str) -> tuple[subprocess.Popen[str], int]:
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK_BUILDER, str(root), kind], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


async def fill(tree: Path, _lock: int) -> dict[str, Any]:
    (tree / "done").write_text("yes")
    return {"answer": 42}


def hidden(root: Path) -> list[str]:
    return [path.name for path in root.iterdir() if path.name.startswith(".")]


async def test_it_is_made_once_and_recorded(tmp_path: Path) -> None:
    store = LayerStore(tmp_path)
    assert store.find("rootfs-1") is None
    place = await store.get("rootfs-1", fill)
    assert (place / "done").read_text() == "yes"
    assert store.find("rootfs-1") == place
    assert store.manifest("rootfs-1") == {"answer": 42}
    assert hidden(tmp_path) == []


async def test_askers_at_the_same_moment_share_one_build(tmp_path: Path) -> None:
    store = LayerStore(tmp_path)
    built = []

    async def build(tree: Path, lock: int) -> dict[str, Any]:
        built.append(tree)
        await asyncio.sleep(0)
        return await fill(tree, lock)

    places = await asyncio.gather(*(store.get("rootfs-1", build) for _ in range(10)))
    assert len(built) == 1
    assert len(set(places)) == 1


async def test_processes_at_the_same_moment_share_one_build(tmp_path: Path) -> None:
    program = (
        "import asyncio, sys, os\nfrom pathlib import Path\nfrom tartarus.images import LayerStore\n"
        "async def build(tree, lock):\n"
        "    print('built', flush=True)\n    await asyncio.sleep(0.05)\n    return {}\n"
        "asyncio.run(LayerStore(Path(sys.argv[1])).get('rootfs-1', build))\n"
    )
    argv = [sys.executable, "-c", program, str(tmp_path)]
    running = [subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    said = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0, 0]
    assert "".join(said) == "built\n"
    assert hidden(tmp_path) == []


async def test_a_failed_build_leaves_nothing_and_can_be_tried_again(tmp_path: Path) -> None:
    store = LayerStore(tmp_path)

    async def fail(tree: Path, _lock: int) -> dict[str, Any]:
        (tree / "half").write_text("x")
        raise TemplateFailed("no")

    with pytest.raises(TemplateFailed):
        await store.get("rootfs-1", fail)
    assert list(tmp_path.iterdir()) == []
    assert (await store.get("rootfs-1", fill)).is_dir()


async def test_a_cancelled_build_leaves_nothing(tmp_path: Path) -> None:
    store = LayerStore(tmp_path)
    begun = asyncio.Event()

    async def wait(tree: Path, _lock: int) -> dict[str, Any]:
        (tree / "half").write_text("x")
        begun.set()
        await asyncio.Event().wait()
        return {}

    task = asyncio.create_task(store.get("rootfs-1", wait))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert list(tmp_path.iterdir()) == []


async def test_what_a_killed_build_left_is_removed_at_the_next_start(tmp_path: Path) -> None:
    process, _ = start_stuck_builder(tmp_path, "alone")
    kill(process)
    assert hidden(tmp_path) != []
    store = LayerStore(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert (await store.get("rootfs-1", fill) / "done").is_file()


async def test_a_build_in_progress_is_left_alone_by_another_start(tmp_path: Path) -> None:
    process, _ = start_stuck_builder(tmp_path, "alone")
    try:
        store = LayerStore(tmp_path)
        assert ".making-rootfs-1" in hidden(tmp_path)
        waiting = asyncio.create_task(store.get("rootfs-1", fill))
        await asyncio.sleep(0.1)
        assert not waiting.done()
    finally:
        kill(process)
    assert (await waiting / "done").is_file()
    assert not (await waiting / "half").exists()


async def test_nothing_is_removed_under_a_child_that_still_writes(tmp_path: Path) -> None:
    process, child = start_stuck_builder(tmp_path, "with-child")
    kill(process)
    try:
        LayerStore(tmp_path)
        assert ".making-rootfs-1" in hidden(tmp_path)
    finally:
        os.kill(child, signal.SIGKILL)
    LayerStore(tmp_path)
    while hidden(tmp_path):  # until the kernel has closed the dead child's files; the suite's time limit bounds it
        await asyncio.sleep(0.01)
        LayerStore(tmp_path)
    assert list(tmp_path.iterdir()) == []


async def test_only_what_nobody_uses_any_more_is_removed(tmp_path: Path) -> None:
    store = LayerStore(tmp_path)
    for name in ("rootfs-1", "rootfs-2", "rootfs-3"):
        await store.get(name, fill)
    long_ago = time.time() - 1000
    os.utime(tmp_path / "rootfs-1", (long_ago, long_ago))
    os.utime(tmp_path / "rootfs-2", (long_ago, long_ago))
    assert store.remove_unused({"rootfs-1"}, unused_s=500) == ["rootfs-2"]
    assert store.find("rootfs-2") is None
    assert store.find("rootfs-1") is not None
    assert store.find("rootfs-3") is not None
    # Being asked for counts as use.
    assert store.remove_unused((), unused_s=500) == []


@pytest.fixture
def small_disk(tmp_path: Path):
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)], check=True)
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.needs("root")
async def test_a_full_disk_is_said_to_be_one(small_disk: Path) -> None:
    store = LayerStore(small_disk / "templates")

    async def too_much(tree: Path, _lock: int) -> dict[str, Any]:
        (tree / "big").write_bytes(b"x" * 10**6)
        return {}

    with pytest.raises(NoSpace, match="no space left"):
        await store.get("rootfs-1", too_much)
    assert list((small_disk / "templates").iterdir()) == []
