"""The host's decoder: frames in any pieces, and bytes that are no frames."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fuzz.guest_protocol import decode, joined, one_input

from tartarus.guest.protocol import (
    DATA,
    EXIT,
    HEADER,
    MAX_CONTROL,
    MAX_DATA,
    READY,
    BadFrame,
    Decoder,
    Reader,
    ToGuest,
    ToHost,
    exec_payload,
    frame,
    text,
    texts,
)

SESSION = {ToHost.READY, ToHost.BOOT_FAILED, ToHost.PONG, ToHost.QUIESCED, ToHost.STOPPED, ToHost.FROZEN}
SIZES = {
    ToHost.READY: 12, ToHost.BOOT_FAILED: 8, ToHost.STARTED: 8, ToHost.EXIT: 32, ToHost.STDIN_CREDIT: 4,
    ToHost.FORWARD_EOF: 0, ToHost.STOPPED: 4, ToHost.FROZEN: 4,
}  # fmt: skip


def raw(kind: int, stream: int, payload: bytes = b"", *, flags: int = 0, zero: int = 0, length: int = -1) -> bytes:
    return HEADER.pack(len(payload) if length < 0 else length, kind, flags, zero, stream) + payload


@st.composite
def frames(draw: st.DrawFn) -> bytes:
    """A frame as a well-behaved guest would send it."""
    kind = draw(st.sampled_from(ToHost))
    size = SIZES.get(kind)
    low = 8 if kind in {ToHost.ERROR, ToHost.EVENT, ToHost.QUIESCED} else 0
    payload = draw(st.binary(min_size=low if size is None else size, max_size=100 if size is None else size))
    return raw(kind, 0 if kind in SESSION else draw(st.integers(1, 2**32 - 1)), payload)


@settings(max_examples=300, deadline=None)
@given(st.lists(frames(), max_size=8), st.data())
def test_frames_survive_any_cut(wire: list[bytes], data: st.DataObject) -> None:
    whole = b"".join(wire)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=6)))
    parts = [whole[start:end] for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    pieces, refused = decode([part for part in parts if part])
    assert not refused
    expected = [(item[4], item[5], int.from_bytes(item[8:12], "little"), item[12:]) for item in wire]
    assert joined(pieces) == joined(expected)


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 1000))
def test_any_bytes(noise: bytes, cut: int) -> None:
    one_input(noise, cut)


@settings(max_examples=500, deadline=None)
@given(st.lists(frames(), min_size=1, max_size=4), st.integers(0, 10_000), st.integers(0, 255), st.integers(0, 1000))
def test_frames_with_one_byte_changed(wire: list[bytes], at: int, value: int, cut: int) -> None:
    whole = bytearray(b"".join(wire))
    whole[at % len(whole)] = value
    one_input(bytes(whole), cut)


@pytest.mark.parametrize(
    "bad",
    [
        raw(0x00, 1),
        raw(ToGuest.EXEC, 1),
        raw(0xFF, 1),
        raw(ToHost.STDOUT, 0, b"x"),
        raw(ToHost.READY, 1, READY.pack(1, 1, 0)),
        raw(ToHost.EXIT, 1, EXIT.pack(0, 0, 0, 0, 0) + b"kills"),
        raw(ToHost.STARTED, 1, b"short"),
        raw(ToHost.ERROR, 1),
        raw(ToHost.STDOUT, 1, b"x", flags=1),
        raw(ToHost.RESULT, 1, flags=2),
        raw(ToHost.RESULT, 1, zero=1),
        raw(ToHost.STDOUT, 1, length=MAX_DATA + 1),
        raw(ToHost.RESULT, 1, length=MAX_CONTROL + 1),
        raw(ToHost.RESULT, 1, length=2**32 - 1),
    ],
)
def test_what_is_no_frame_is_refused_by_its_header(bad: bytes) -> None:
    with pytest.raises(BadFrame):
        Decoder().feed(memoryview(bad))


def test_a_large_data_frame_is_never_held_together() -> None:
    decoder = Decoder()
    pieces = decoder.feed(memoryview(raw(ToHost.STDOUT, 7, b"x" * 10, length=MAX_DATA)))
    for _ in range(10):
        pieces += decoder.feed(memoryview(b"y" * 1000))
        assert not decoder._held
    assert {piece[:3] for piece in pieces} == {(ToHost.STDOUT, 0, 7)}
    assert sum(len(piece[3]) for piece in pieces) == 10_010
    assert ToHost.STDOUT in DATA


def test_strings_of_a_payload() -> None:
    reader = Reader(text("päth") + texts(["a", ""])[4:])
    assert [reader.text(), reader.text(), reader.text()] == ["päth", "a", ""]
    reader.done()
    with pytest.raises(BadFrame):
        reader.text()
    with pytest.raises(BadFrame):
        Reader(b"\x05\0\0\0abc").text()
    with pytest.raises(BadFrame):
        Reader(b"\xff\xff\xff\xffabc").text()
    with pytest.raises(BadFrame):
        Reader(b"x").done()
    assert Reader(b"\x02\0\0\0\xff/").text() == "\\xff/"


def test_frames_to_the_guest() -> None:
    payload = exec_payload(2, 24, 80, 1000, "/", ["a"], {"K": "V"})
    sent = frame(ToGuest.EXEC, 3, payload)
    assert sent[:12] == HEADER.pack(len(payload), 0x10, 0, 0, 3)
    assert sent.endswith(b"\x01\0\0\0\x03\0\0\0K=V")
    assert text("\udcff") == b"\x01\0\0\0\xff"
