"""The output log: bounded, readable while it grows, honest about a full disk."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from tartarus.model.errors import NoSpace
from tartarus.node import outputlog
from tartarus.node.outputlog import OutputLog, finished

pytestmark = pytest.mark.anyio


async def _all(log: OutputLog, *, follow: bool = False) -> list[tuple[int, bytes]]:
    return [(entry.stream, entry.data) async for entry in log.read(follow=follow)]


async def test_entries_come_back_in_order(tmp_path: Path) -> None:
    log = OutputLog(tmp_path / "a.log")
    log.append(1, b"one")
    log.append(2, b"\x00\xff")
    assert await _all(log) == [(1, b"one"), (2, b"\x00\xff")]


async def test_a_log_without_output_is_empty_and_makes_no_file(tmp_path: Path) -> None:
    log = OutputLog(tmp_path / "a.log")
    log.end()
    assert await _all(log, follow=True) == []
    assert list(tmp_path.iterdir()) == []


async def test_followers_see_what_comes_and_then_the_end(tmp_path: Path) -> None:
    log = OutputLog(tmp_path / "a.log")
    follower = asyncio.create_task(_all(log, follow=True))
    await asyncio.sleep(0)
    log.append(1, b"a")
    await asyncio.sleep(0.01)
    log.append(1, b"b")
    log.end()
    assert await follower == [(1, b"a"), (1, b"b")]


async def test_size_is_bounded_and_the_newest_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputlog, "SEGMENT_BYTES", 1000)
    log = OutputLog(tmp_path / "a.log")
    for number in range(100):
        log.append(1, b"%050d" % number)
    log.end()
    kept = await _all(finished(tmp_path / "a.log"))
    assert kept[-1] == (1, b"%050d" % 99)
    assert len(kept) < 40
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 2200


async def test_a_follower_goes_on_across_segments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputlog, "SEGMENT_BYTES", 200)
    log = OutputLog(tmp_path / "a.log")
    follower = asyncio.create_task(_all(log, follow=True))
    for number in range(50):
        log.append(1, b"%020d" % number)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    log.end()
    assert (await follower)[-1] == (1, b"%020d" % 49)


async def test_a_log_that_cant_be_written_is_reported_once(tmp_path: Path) -> None:
    log = OutputLog(tmp_path / "file" / "a.log")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(NoSpace):
        log.append(1, b"x")
    log.append(1, b"y")


async def test_a_daemon_goes_on_with_the_log_of_one_that_was_killed(tmp_path: Path) -> None:
    path = tmp_path / "log"
    first = OutputLog(path)
    first.append(1, b"whole")
    first.append(2, b"torn")
    first.sync()
    first.end()
    os.truncate(path, path.stat().st_size - 2)
    again = OutputLog(path)
    again.sync()
    again.append(1, b"more")
    again.end()
    assert [entry.data async for entry in again.read()] == [b"whole", b"more"]
