"""Fuzz the host's decoder with coverage guidance: `python tests/fuzz/guest_protocol.py -runs=100000`.

Needs atheris (`pip install atheris`). `one_input` holds what must be true of any bytes; the ordinary
tests call it too, with hypothesis instead of a fuzzer.
"""

from __future__ import annotations

import sys

from tartarus.guest.protocol import DATA, HEADER, MAX_CONTROL, MAX_DATA, BadFrame, Decoder, Piece, Reader, ToHost

DEFAULT_RUNS = 200_000


def decode(parts: list[bytes]) -> tuple[list[Piece], bool]:
    """(pieces, whether the bytes were refused)."""
    decoder = Decoder()
    pieces: list[Piece] = []
    for part in parts:
        try:
            pieces += decoder.feed(memoryview(part))
        except BadFrame:
            return pieces, True
        assert len(decoder._held) <= HEADER.size + MAX_CONTROL
    return pieces, False


def joined(pieces: list[Piece]) -> list[Piece]:
    """Pieces as if no data frame had been cut: neighbours of one stream and type are put together."""
    out: list[Piece] = []
    for kind, flags, stream, payload in pieces:
        if kind in DATA and out and out[-1][:3] == (kind, flags, stream):
            out[-1] = (kind, flags, stream, out[-1][3] + payload)
        elif kind not in DATA or payload:
            out.append((kind, flags, stream, payload))
    return out


def check_reader(data: bytes) -> None:
    """Reading strings off any payload ends with all of it read, or with BadFrame."""
    reader = Reader(data)
    try:
        while not reader.at_end:
            reader.text().encode("utf-8")
        reader.done()
    except BadFrame:
        return


def one_input(data: bytes, cut: int) -> None:
    """Whatever the bytes: pieces or BadFrame; no other error, no more held than a frame; cuts make no difference."""
    pieces, refused = decode([data])
    for kind, _, stream, payload in pieces:
        assert kind in ToHost._value2member_map_
        assert len(payload) <= (MAX_DATA if kind in DATA else MAX_CONTROL)
        assert (stream == 0) == (
            kind in {ToHost.READY, ToHost.BOOT_FAILED, ToHost.PONG, ToHost.QUIESCED, ToHost.STOPPED, ToHost.FROZEN}
        )
        check_reader(payload)
    cut %= len(data) + 1
    again, refused_again = decode([data[:cut], data[cut:]])
    assert refused == refused_again
    if not refused:
        assert joined(again) == joined(pieces)


def main() -> None:
    """Run under atheris, bounded unless told otherwise."""
    import atheris  # type: ignore[import-not-found,import-untyped,unused-ignore]

    def run(data: bytes) -> None:
        one_input(data[2:], int.from_bytes(data[:2], "little"))

    if not any(argument.startswith(("-runs", "-max_total_time")) for argument in sys.argv):
        sys.argv.append(f"-runs={DEFAULT_RUNS}")
    atheris.instrument_all()
    atheris.Setup(sys.argv, run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
