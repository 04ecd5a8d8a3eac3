"""A Unix socket for async callers: the kernel's calls, with anyio only for waiting.

Not `anyio.connect_unix`: its stream resolves a future straight from the event loop's reader, which fails with
`InvalidStateError` when the wait is cancelled in the very turn in which data arrives (anyio 4.16).
Its `wait_readable` is right.
"""

from __future__ import annotations

import contextlib
import socket
from types import TracebackType
from typing import Self

import anyio
import anyio.lowlevel
import anyio.to_thread


class AsyncSocket:
    """A connected stream socket. One task may receive while another sends; leaving the context closes it."""

    def __init__(self, connected: socket.socket) -> None:
        connected.setblocking(False)
        self._socket = connected

    @classmethod
    async def connect(cls, path: str) -> AsyncSocket:
        """Connect to the Unix socket at `path`. Raises OSError."""
        unconnected = socket.socket(socket.AF_UNIX)
        try:
            unconnected.setblocking(False)
            try:
                unconnected.connect(path)
            except BlockingIOError:  # its queue is full: wait for a place, off the loop
                unconnected.setblocking(True)
                await anyio.to_thread.run_sync(unconnected.connect, path)
            return cls(unconnected)
        except BaseException:
            unconnected.close()
            raise

    async def receive(self, size: int) -> bytes:
        """Up to `size` bytes; none once the peer has hung up."""
        await anyio.lowlevel.checkpoint()
        while True:
            try:
                return self._socket.recv(size)
            except BlockingIOError:
                with contextlib.suppress(anyio.ClosedResourceError):  # the next recv says so
                    await anyio.wait_readable(self._socket)
            except OSError:
                return b""

    async def send(self, data: bytes) -> None:
        """Send all of it. Raises OSError when the peer has hung up."""
        await anyio.lowlevel.checkpoint()
        view = memoryview(data)
        while view:
            try:
                view = view[self._socket.send(view) :]
            except BlockingIOError:
                with contextlib.suppress(anyio.ClosedResourceError):
                    await anyio.wait_writable(self._socket)

    def close(self) -> None:
        """Hang up, and wake whoever waits; idempotent."""
        if self._socket.fileno() >= 0:
            anyio.notify_closing(self._socket)
            self._socket.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close()
