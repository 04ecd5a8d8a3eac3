"""What travels on the run, exec and attach streams, without any I/O.

A stream is one WebSocket: our first message says what to run, then both sides send binary messages
whose first byte is their kind. `StreamProtocol` takes the daemon's bytes and yields output and events;
it holds no socket, so the blocking, the async and the command line's loop use the same one.
"""

from __future__ import annotations

from collections import deque

from tartarus import __version__
from tartarus.model.errors import VersionMismatch
from tartarus.sdk import websocket

STDOUT, STDERR, EVENT = 1, 2, 16
VERSION_HEADER = "tartarus-version"
_STDIN, _STDIN_EOF, _SIGNAL, _RESIZE = 0, 1, 2, 3
_GOING_AWAY = (1000).to_bytes(2, "big")


def check_version(daemon: str | None) -> None:
    """Raise VersionMismatch unless the daemon's version, from the header of its answer, is ours."""
    if daemon != __version__:
        raise VersionMismatch(
            f"the daemon is {f'version {daemon}' if daemon else 'of another version'} and this client is {__version__}",
            fix="stop the old one with: tartarus down (the next command starts the new one)",
        )


class Refused(Exception):
    """The daemon answered the handshake with an ordinary response; `body` may hold a problem document."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(f"HTTP status {status}")
        self.status = status
        self.body = body


class StreamProtocol:
    """One stream. Send `outgoing()` whenever it has bytes; feed what arrives to `receive`.

    `started` is true once the daemon has accepted the stream, `closed` once it has said goodbye.
    """

    def __init__(self, path: str, opening: bytes) -> None:
        self._key = websocket.new_key()
        self._opening = opening
        self._head = b""
        self._refusal: websocket.Head | None = None
        self._decoder = websocket.Decoder()
        # A deque, since its appends and pops are atomic: one thread may queue input while another answers a ping.
        self._out = deque([websocket.handshake(path, self._key)])
        self.started = False
        self.closed = False

    def outgoing(self) -> bytes:
        """Take the bytes that are to be sent now."""
        parts = []
        while self._out:
            parts.append(self._out.popleft())
        return b"".join(parts)

    def receive(self, data: bytes) -> list[tuple[int, memoryview]]:
        """Decode bytes from the daemon (empty: it closed) into (kind, payload) pairs.

        Kinds are STDOUT, STDERR and EVENT (UTF-8 JSON). Raises Refused, VersionMismatch, or
        DaemonUnavailable when the bytes break the protocol.
        """
        if not data:
            self.closed = True
            if self._refusal is not None:
                raise Refused(self._refusal.status, self._refusal.rest)
            return []
        if not self.started:
            data = self._open(data)
            if not self.started:
                return []
        found: list[tuple[int, memoryview]] = []
        for opcode, payload in self._decoder.receive(data):
            if opcode == websocket.BINARY:
                if not payload:
                    raise websocket.broken("a message has no kind")
                found.append((payload[0], payload[1:]))
            elif opcode == websocket.TEXT:
                found.append((EVENT, payload))
            elif opcode == websocket.PING:
                self._out.append(websocket.encode(websocket.PONG, payload))
            elif opcode == websocket.CLOSE:
                if not self.closed:
                    self._out.append(websocket.encode(websocket.CLOSE, payload[:2]))
                self.closed = True
        return found

    def _open(self, data: bytes) -> bytes:
        """Read the handshake's answer; returns the bytes behind it."""
        if self._refusal is not None:
            self._refusal.rest += data
        else:
            self._head += data
            head = websocket.Head.parse(self._head)
            if head is None:
                return b""
            if head.status == 101:
                check_version(head.headers.get(VERSION_HEADER))
                websocket.check_upgrade(head, self._key)
                self._out.append(websocket.encode(websocket.TEXT, self._opening))
                self.started = True
                return head.rest
            self._refusal = head
        length = self._refusal.headers.get("content-length", "")
        wanted = int(length) if length.isascii() and length.isdigit() else websocket.MAX_HEAD_BYTES
        if len(self._refusal.rest) >= min(wanted, websocket.MAX_HEAD_BYTES):
            raise Refused(self._refusal.status, self._refusal.rest)
        return b""

    def send_stdin(self, data: bytes | memoryview) -> None:
        """Queue bytes for the process's standard input."""
        self._out.append(websocket.encode(websocket.BINARY, b"\0" + data))

    def send_stdin_eof(self) -> None:
        """Queue the end of standard input."""
        self._out.append(websocket.encode(websocket.BINARY, bytes((_STDIN_EOF,))))

    def send_signal(self, signal: int) -> None:
        """Queue a signal for the process."""
        self._out.append(websocket.encode(websocket.BINARY, bytes((_SIGNAL, signal))))

    def send_resize(self, rows: int, cols: int) -> None:
        """Queue a new terminal size."""
        size = rows.to_bytes(2, "little") + cols.to_bytes(2, "little")
        self._out.append(websocket.encode(websocket.BINARY, bytes((_RESIZE,)) + size))

    def send_close(self) -> None:
        """Queue the goodbye; the daemon then ends what the stream holds."""
        if not self.closed:
            self._out.append(websocket.encode(websocket.CLOSE, _GOING_AWAY))
