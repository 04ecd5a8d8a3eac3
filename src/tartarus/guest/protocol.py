"""The guest protocol as bytes: frames in, frames out, no sockets (docs/guest-protocol.md is normative).

Everything decoded here was written by a guest and is believed only after its type, length and form
were checked; `BadFrame` says what was wrong. Data frames are handed over in pieces as they arrive, so
no guest can make the host hold a large frame together.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from enum import IntEnum, IntFlag

VERSION = 1
HEADER = struct.Struct("<IBBHI")
MAX_TO_GUEST = 2 * 1024 * 1024
"""Bytes of a control frame to the guest: as much as execve(2) takes."""
MAX_CONTROL = 1024 * 1024
MAX_DATA = 256 * 1024
MAX_TEXT = 16 * 1024
INPUT_WINDOW = 256 * 1024
"""Bytes of stdin, or of forwarded data, that may be sent before the guest grants more."""
MORE = 1
"""Flag of RESULT: another RESULT of the same answer follows."""
MAX_STREAMS = 1024
"""Streams that a guest serves at once."""
RESUME = 1
"""Flag of HELLO: the guest goes on with the streams that were open when it was saved."""


class BadFrame(ValueError):
    """The guest sent something that is not the protocol."""


class ToGuest(IntEnum):
    """Frame types that the host sends."""

    HELLO = 0x01
    EXEC = 0x10
    STDIN = 0x11
    STDIN_EOF = 0x12
    SIGNAL = 0x13
    RESIZE = 0x14
    CREDIT = 0x15
    STAT = 0x20
    LIST = 0x21
    READ = 0x22
    WRITE = 0x23
    WRITE_DATA = 0x24
    WRITE_END = 0x25
    MKDIR = 0x26
    MOVE = 0x27
    REMOVE = 0x28
    WATCH = 0x29
    CANCEL = 0x2A
    CONNECT = 0x30
    FORWARD_DATA = 0x31
    FORWARD_EOF = 0x32
    FIXUP = 0x40
    SHUTDOWN = 0x42
    PING = 0x43
    QUIESCE = 0x44
    GO_ON = 0x45
    STOP = 0x46
    FREEZE = 0x4E


class ToHost(IntEnum):
    """Frame types that the guest sends."""

    READY = 0x81
    BOOT_FAILED = 0x82
    PONG = 0x83
    QUIESCED = 0x84
    STOPPED = 0x86
    FROZEN = 0x8E
    STARTED = 0x90
    STDOUT = 0x91
    STDERR = 0x92
    EXIT = 0x93
    STDIN_CREDIT = 0x94
    FILE_DATA = 0xA0
    RESULT = 0xA1
    ERROR = 0xA2
    EVENT = 0xA3
    FORWARD_DATA = 0xB1
    FORWARD_EOF = 0xB2


class ExecFlag(IntFlag):
    """How an EXEC runs."""

    TTY = 1
    STDIN = 2
    WARM = 4
    ONCE = 8


class WriteFlag(IntFlag):
    """How a WRITE treats what is there."""

    APPEND = 1
    PARENTS = 2
    EXCLUSIVE = 4
    IN_MEMORY = 8


DATA = frozenset({ToHost.STDOUT, ToHost.STDERR, ToHost.FILE_DATA, ToHost.FORWARD_DATA})
_LENGTHS: dict[int, tuple[int, int]] = {
    ToHost.READY: (12, 12),
    ToHost.BOOT_FAILED: (8, 8),
    ToHost.PONG: (0, MAX_TEXT),
    ToHost.QUIESCED: (8, 8 + 16 * MAX_STREAMS),
    ToHost.STOPPED: (4, 4),
    ToHost.FROZEN: (4, 4),
    ToHost.STARTED: (8, 8),
    ToHost.STDOUT: (0, MAX_DATA),
    ToHost.STDERR: (0, MAX_DATA),
    ToHost.EXIT: (32, 36),
    ToHost.STDIN_CREDIT: (4, 4),
    ToHost.FILE_DATA: (0, MAX_DATA),
    ToHost.RESULT: (0, MAX_CONTROL),
    ToHost.ERROR: (8, MAX_TEXT),
    ToHost.EVENT: (8, MAX_TEXT),
    ToHost.FORWARD_DATA: (0, MAX_DATA),
    ToHost.FORWARD_EOF: (0, 0),
}
_SESSION_ONLY = frozenset(
    {ToHost.READY, ToHost.BOOT_FAILED, ToHost.PONG, ToHost.QUIESCED, ToHost.STOPPED, ToHost.FROZEN}
)

Piece = tuple[int, int, int, bytes]
"""(type, flags, stream, payload); of a data frame, the payload's next part."""


class Decoder:
    """Turns bytes from a guest into checked pieces. After BadFrame it must not be used again."""

    __slots__ = ("_flags", "_held", "_left", "_stream", "_type")

    def __init__(self) -> None:
        self._held = bytearray()
        self._left = 0
        self._type = self._flags = self._stream = 0

    def feed(self, data: memoryview) -> list[Piece]:
        """Decode the next bytes, as many as there are. Raises BadFrame."""
        pieces: list[Piece] = []
        at = 0
        end = len(data)
        if self._left:
            at = min(self._left, end)
            self._left -= at
            pieces.append((self._type, self._flags, self._stream, bytes(data[:at])))
        elif self._held:
            self._held += data
            data, at, end = memoryview(bytes(self._held)), 0, len(self._held)
            self._held = bytearray()
        while end - at >= HEADER.size:
            length, kind, flags, zero, stream = HEADER.unpack_from(data, at)
            self._check(length, kind, flags, zero, stream)
            start = at + HEADER.size
            if end - start >= length:
                at = start + length
                pieces.append((kind, flags, stream, bytes(data[start:at])))
            elif kind in DATA:
                pieces.append((kind, flags, stream, bytes(data[start:end])))
                self._type, self._flags, self._stream = kind, flags, stream
                self._left = length - (end - start)
                return pieces
            else:
                break
        if at < end:
            self._held += data[at:end]
        return pieces

    def _check(self, length: int, kind: int, flags: int, zero: int, stream: int) -> None:
        low, high = _LENGTHS.get(kind, (1, 0))
        if not low <= length <= high:
            raise BadFrame(f"frame type {kind:#x} with {length} bytes")
        if zero or (flags and not (kind == ToHost.RESULT and flags == MORE)):
            raise BadFrame(f"frame type {kind:#x} with flags {flags:#x}, {zero:#x}")
        if (stream == 0) != (kind in _SESSION_ONLY):
            raise BadFrame(f"frame type {kind:#x} on stream {stream}")


class Reader:
    """Reads one payload front to back; raises BadFrame where it is short."""

    __slots__ = ("_at", "_data")

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, form: struct.Struct) -> tuple[int, ...]:
        """The next fixed-size values."""
        if len(self._data) - self._at < form.size:
            raise BadFrame("a payload ends too early")
        values = form.unpack_from(self._data, self._at)
        self._at += form.size
        return values

    def text(self) -> str:
        r"""The next string. Bytes that are no UTF-8 are shown as ``\xNN``: JSON can't carry them."""
        (size,) = self.take(U32)
        if len(self._data) - self._at < size:
            raise BadFrame("a payload ends too early")
        self._at += size
        return self._data[self._at - size : self._at].decode("utf-8", "backslashreplace")

    @property
    def at_end(self) -> bool:
        """Whether all was read."""
        return self._at == len(self._data)

    def done(self) -> None:
        """Raise BadFrame when something is left."""
        if not self.at_end:
            raise BadFrame("a payload has bytes left over")


U16_U16 = struct.Struct("<HH")
U32 = struct.Struct("<I")
U32_U32 = struct.Struct("<II")
U32_U32_U32 = struct.Struct("<III")
OPEN_STREAM = struct.Struct("<IIII")
READY = struct.Struct("<III")
EXIT = struct.Struct("<IIQQQ")
ENTRY = struct.Struct("<IIIQq")
U64 = struct.Struct("<Q")
_EXEC = struct.Struct("<IHHI")
_READ = struct.Struct("<QQI")
_PORT = struct.Struct("<H")


def frame(kind: ToGuest, stream: int, payload: bytes = b"") -> bytes:
    """One frame to the guest."""
    return HEADER.pack(len(payload), kind, 0, 0, stream) + payload


def text(value: str) -> bytes:
    """A string of a payload."""
    raw = value.encode("utf-8", "surrogateescape")
    return U32.pack(len(raw)) + raw


def texts(values: Iterable[str]) -> bytes:
    """A list of strings of a payload."""
    parts = [text(value) for value in values]
    return U32.pack(len(parts)) + b"".join(parts)


def hello() -> bytes:
    """The first frame."""
    return frame(ToGuest.HELLO, 0, U32.pack(VERSION))


def exec_payload(
    flags: int, rows: int, cols: int, window: int, cwd: str, argv: Sequence[str], env: dict[str, str]
) -> bytes:
    """The payload of EXEC."""
    head = _EXEC.pack(flags, rows, cols, window)
    return head + text(cwd) + texts(argv) + texts(f"{name}={value}" for name, value in env.items())


def read_payload(path: str, offset: int, limit: int, window: int) -> bytes:
    """The payload of READ."""
    return text(path) + _READ.pack(offset, limit, window)


def write_payload(path: str, mode: int, flags: int) -> bytes:
    """The payload of WRITE."""
    return text(path) + U32_U32.pack(mode, flags)


def join_payload(address: bytes, gateway: bytes, mtu: int) -> bytes:
    """What follows a machine's FIXUP, names and limits included: its network card's address, its gateway, its MTU.

    Both are IPv4's four bytes, and IPv6's sixteen after them where it has that.
    """
    return b"".join(U32.pack(len(part)) + part for part in (address, gateway)) + U32.pack(mtu)


def connect_payload(port: int) -> bytes:
    """The payload of CONNECT."""
    return _PORT.pack(port)


class FixedUp(IntFlag):
    """What a guest did of a FIXUP. Only RESEEDED makes sure that it draws no random number that its twin draws."""

    CLOCK = 1
    RESEEDED = 2
    MIXED = 4
    NAMED = 8
    MACHINE_ID = 16
    LIMITED = 32
    JOINED = 64


ALL_FIXED_UP = 127


def fixup_payload(
    unix_ns: int, entropy: bytes, hostname: str = "", machine_id: str = "", limits: tuple[int, int] | None = None
) -> bytes:
    """The payload of FIXUP. Without names and limits (tasks, bytes of memory) it is the form that every agent knows."""
    payload = U64.pack(unix_ns) + U32.pack(len(entropy)) + entropy
    for text in (hostname, machine_id) if hostname or machine_id or limits else ():
        encoded = text.encode("ascii")
        payload += U32.pack(len(encoded)) + encoded
    if limits is not None:
        payload += U32.pack(limits[0]) + U64.pack(limits[1])
    return payload
