"""The guest's end of a monitor's vsock, as documented: CONNECT, OK, then the bytes of whoever listens in the guest.

Who listens is the real agent, as an ordinary process with a Unix socket in place of vsock.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .server import ContractServer


class Guest:
    """`port`: where its agent listens. `delay_s`: how long it takes to boot until it does."""

    def __init__(self, agent: Path, place: Path, port: int = 1024) -> None:
        self.port = port
        self.refusals = 0
        self.handshake = b"OK 1073741824\n"
        self._running = asyncio.Event()
        self._running.set()
        self._path = place / "guest.sock"
        self._links: set[asyncio.StreamWriter] = set()
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(self._path))
            listening.listen()
            listening.setblocking(False)
            self.process = subprocess.Popen(
                [agent, "agent", f"--listen={listening.fileno()}", "--shared-pids"],
                pass_fds=(listening.fileno(),), env={},
            )  # fmt: skip

    def run(self, running: bool) -> None:
        """Its processors run, or stand still: then it takes no connection and no bytes move."""
        if running:
            self._running.set()
        else:
            self._running.clear()

    def reset(self) -> None:
        """Every connection breaks."""
        for link in list(self._links):
            link.close()

    def end(self) -> None:
        """It is switched off."""
        self.process.kill()
        self.process.wait()
        self._path.unlink(missing_ok=True)

    async def listen(self, server: ContractServer, name: str, uid: int) -> None:
        """Offer vsock on a Unix socket in the home."""
        await server.listen(name, self._serve, uid)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line = await reader.readline()
        match = re.fullmatch(rb"CONNECT (\d+)\n", line)
        await self._running.wait()
        if match is None or int(match[1]) != self.port or self.refusals:
            self.refusals = max(0, self.refusals - 1)
            return
        inner_reader, inner_writer = await asyncio.open_unix_connection(str(self._path))
        writer.write(self.handshake)
        self._links |= {writer, inner_writer}
        try:
            await asyncio.gather(self._carry(reader, inner_writer), self._carry(inner_reader, writer))
        finally:
            self._links -= {writer, inner_writer}
            inner_writer.close()

    async def _carry(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, RuntimeError):
            while piece := await source.read(65536):
                await self._running.wait()
                target.write(piece)
                await target.drain()
        target.close()


def descriptors() -> int:
    """How many this process holds."""
    return len(os.listdir("/proc/self/fd"))
