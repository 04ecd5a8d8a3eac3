"""Log frames and event lines, however they are cut; and limits on what a guest may make us keep."""

from __future__ import annotations

import struct
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tartarus.model.errors import DaemonUnavailable, FileFailed, GuestFailed
from tartarus.sdk.decoding import CellCollector, Collector, LineDecoder, LogDecoder

entries = st.lists(st.tuples(st.integers(0, 2**63), st.sampled_from([1, 2]), st.binary(max_size=50)), max_size=10)


def pieces(data: bytes, size: int) -> list[bytes]:
    return [data[start : start + size] for start in range(0, len(data), size)]


@given(entries, st.integers(1, 40))
def test_log_frames(sent, size):
    data = b"".join(struct.pack("<QBI", time, stream, len(text)) + text for time, stream, text in sent)
    decoder = LogDecoder()
    received = [entry for part in pieces(data, size) for entry in decoder.receive(part)]
    assert [(entry.time_ns, {"stdout": 1, "stderr": 2}[entry.stream], entry.data) for entry in received] == sent


def test_a_log_that_makes_no_sense():
    with pytest.raises(DaemonUnavailable):
        LogDecoder().receive(struct.pack("<QBI", 0, 7, 1))
    with pytest.raises(DaemonUnavailable):
        LogDecoder().receive(struct.pack("<QBI", 0, 1, 2**31))


@given(st.lists(st.dictionaries(st.sampled_from("abc"), st.text(max_size=20)), max_size=8), st.integers(1, 30))
def test_lines(sent, size):
    data = b"".join(msgspec.json.encode(item) + b"\n" for item in sent)
    decoder = LineDecoder()
    assert [item for part in pieces(data, size) for item in decoder.receive(part)] == sent


def test_a_problem_in_a_line_is_raised():
    problem = {"type": "problem", "problem": {"code": "file_failed", "detail": "can't watch /x", "why": "gone"}}
    with pytest.raises(FileFailed, match="can't watch /x: gone"):
        LineDecoder().receive(msgspec.json.encode(problem) + b"\n")
    with pytest.raises(DaemonUnavailable):
        LineDecoder().receive(b"[1]\n")


@given(st.lists(st.tuples(st.sampled_from([1, 2]), st.binary(max_size=20))), st.integers(0, 60))
def test_output_is_kept_up_to_its_limit(chunks, limit):
    collector = Collector(limit)
    for stream, data in chunks:
        collector.add(stream, data)
    total = sum(len(data) for _, data in chunks)
    assert len(collector.take(1)) + len(collector.take(2)) == min(total, limit)
    assert collector.truncated == (total > limit)
    whole = b"".join(data for stream, data in chunks if stream == 1)
    assert whole.startswith(collector.take(1))


def test_a_cell():
    cell = CellCollector(1000)
    events: list[dict[str, Any]] = [
        {"type": "stdout", "text": "a"},
        {"type": "stderr", "text": "b"},
        {"type": "result", "data": {"image/png": "aGk="}, "is_main": False},
        {"type": "result", "data": {"text/plain": "42", "text/html": "<b>"}, "is_main": True},
        {"type": "error", "name": "ValueError", "value": "no", "traceback": ["x", "y"]},
        {"type": "new in a later version"},
        {"type": "done", "execution_count": 3},
    ]
    for event in events:
        cell.add(event)
    result = cell.result()
    assert (result.stdout, result.stderr, result.text, result.html, result.png) == ("a", "b", "42", "<b>", b"hi")
    assert result.error is not None
    assert result.error.traceback == "x\ny"
    assert (result.execution_count, result.ok, result.truncated) == (3, False, False)


def test_a_cell_can_not_fill_our_memory():
    cell = CellCollector(10)
    for _ in range(100):
        cell.add({"type": "stdout", "text": "abc"})
        cell.add({"type": "result", "data": {"image/png": "A" * 50}})
    result = cell.result()
    assert result.stdout == "abcabcabca"
    assert result.results == []
    assert result.truncated


def test_a_result_that_makes_no_sense():
    with pytest.raises(GuestFailed):
        CellCollector(10).add({"type": "result", "data": "not a mapping"})
