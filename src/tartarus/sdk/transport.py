"""The blocking transport: calls, byte streams and process streams over the daemon's socket."""

from __future__ import annotations

import contextlib
import itertools
import select
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from tartarus.model.errors import DaemonUnavailable
from tartarus.sdk import daemon
from tartarus.sdk.http import Call, Exchange
from tartarus.sdk.places import Places
from tartarus.sdk.progress import opening_error
from tartarus.sdk.streams import Refused, StreamProtocol

T = TypeVar("T")
Sink = Callable[[int, memoryview], None]
_CHUNK = 256 * 1024
# While we wait to send, this much output is taken in; then the process must be read before it gets more input.
_AHEAD_BYTES = 8 * 1024**2


class Transport:
    """Talks to one daemon; safe to share between threads and to keep over a fork."""

    def __init__(self, places: Places, *, start: bool = True, any_version: bool = False) -> None:
        self.places = places
        self._start = start
        self._any_version = any_version

    def connect(self) -> socket.socket:
        """A connection to the daemon, started if need be."""
        return daemon.connect(self.places, start=self._start)

    def call(self, call: Call[T], body: Iterable[bytes] | None = None) -> T:
        """Make a call; `body` is sent as it is produced."""
        with self.stream(call, body) as answer:
            return call.read(b"".join(answer))

    @contextlib.contextmanager
    def stream(self, call: Call[Any], body: Iterable[bytes] | None = None) -> Iterator[Iterator[bytes]]:
        """Make a call and read its answer's body as it comes; a refusal is raised at once. Leaving hangs up."""
        with self.connect() as connection:
            connection.settimeout(call.patience_s)
            exchange = Exchange(any_version=self._any_version)
            # A daemon that refuses a body hangs up before it has read all: its answer says why.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.sendall(exchange.request(call, streamed=body is not None))
                if body is not None:
                    for part in body:
                        connection.sendall(exchange.body_part(part))
                    connection.sendall(exchange.body_end())
            first: list[bytes] = []
            while not exchange.accepted:
                first += exchange.receive(_receive(connection, call))
            yield itertools.chain(first, _rest(connection, exchange, call))

    def open(self, path: str, opening: bytes) -> StreamConnection:
        """Open a process stream."""
        return StreamConnection(self.connect(), StreamProtocol(path, opening))


def _rest(connection: socket.socket, exchange: Exchange, call: Call[Any]) -> Iterator[bytes]:
    while not exchange.done:
        yield from exchange.receive(_receive(connection, call))


def _receive(connection: socket.socket, call: Call[Any]) -> bytes:
    try:
        return connection.recv(_CHUNK)
    except TimeoutError as error:
        raise DaemonUnavailable(
            f"the daemon did not answer within {call.patience_s:g} s", fix="see its log, daemon.log"
        ) from error
    except ConnectionResetError:
        return b""


class StreamConnection:
    """A process stream on a blocking socket. One thread may receive while another sends."""

    def __init__(self, connection: socket.socket, protocol: StreamProtocol) -> None:
        self._socket = connection
        self._socket.setblocking(False)
        self._protocol = protocol
        self._received: deque[tuple[int, memoryview]] = deque()
        self._received_bytes = 0
        self._receiving = threading.Lock()
        self._sending = threading.Lock()
        self._closed = False

    @property
    def protocol(self) -> StreamProtocol:
        """What queues messages; `flush` sends them."""
        return self._protocol

    def next(self) -> tuple[int, memoryview] | None:
        """The next message, or None after the goodbye."""
        while True:
            with self._receiving:
                if self._closed:
                    return None
                if self._received:
                    message = self._received.popleft()
                    self._received_bytes -= len(message[1])
                    return message
                if self._protocol.closed:
                    return None
                self._poll(select.POLLIN)
                self._take()
            # Whoever is sending now takes our answers along; to wait for it would be to stop reading.
            if not self._sending.locked():
                self.flush()

    def flush(self, sink: Sink | None = None) -> None:
        """Send what is queued, so that neither side waits for the other for ever.

        Output that arrives meanwhile goes to `sink`, or is kept for `next`, up to a cap.
        """
        with self._sending:
            while data := memoryview(self._protocol.outgoing()):
                while data and not self._closed:
                    try:
                        data = data[self._socket.send(data) :]
                    except BlockingIOError:
                        self._wait_to_send(sink)
                    except (BrokenPipeError, ConnectionResetError):
                        return  # it hung up: what it said last is still to be read

    def close(self) -> None:
        """Hang up; idempotent."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes a thread that is receiving
        with self._receiving, self._sending:
            self._socket.close()

    def _wait_to_send(self, sink: Sink | None) -> None:
        # Another thread that receives does the same for us.
        if not (self._received_bytes < _AHEAD_BYTES and self._receiving.acquire(blocking=False)):
            self._poll(select.POLLOUT)
            return
        try:
            if self._poll(select.POLLOUT | select.POLLIN) & select.POLLIN:
                self._take()
            while sink is not None and self._received:
                kind, payload = self._received.popleft()
                self._received_bytes -= len(payload)
                sink(kind, payload)
        finally:
            self._receiving.release()

    def _poll(self, events: int) -> int:
        poller = select.poll()
        poller.register(self._socket, events)
        return poller.poll()[0][1]

    def _take(self) -> None:
        try:
            data = self._socket.recv(_CHUNK)
        except BlockingIOError:
            return
        except ConnectionResetError:
            data = b""
        try:
            messages = self._protocol.receive(data)
        except Refused as refused:
            raise opening_error(refused) from None
        self._received.extend(messages)
        self._received_bytes += sum(len(payload) for _, payload in messages)
