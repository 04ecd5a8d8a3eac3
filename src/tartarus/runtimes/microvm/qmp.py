"""QEMU's control channel (QMP) over one end of a socket pair.

Our own: the client that is published (qemu.qmp) dials paths, and ours must never have one. The VMM holds the
other end, and a guest may have taken the VMM over: what it says is bounded and checked like a guest's words.
"""

from __future__ import annotations

import array
import asyncio
import json
import socket
from typing import Any

from tartarus.model.errors import GuestFailed

_LINE_MAX = 256 * 1024
_RECEIVE_BYTES = 64 * 1024


def _lost(why: str) -> GuestFailed:
    return GuestFailed("the virtual machine monitor is gone", why=why)


class Qmp:
    """One session. Commands are answered in order; events are dropped but for those somebody waits for."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._held = bytearray()
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._events: dict[str, list[asyncio.Future[Any]]] = {}
        self._greeting: asyncio.Future[Any] = self._loop.create_future()
        self._count = 0
        self._error: GuestFailed | None = None
        self._loop.add_reader(sock.fileno(), self._readable)

    async def open(self) -> dict[str, Any]:
        """Wait for the greeting and enter command mode; the answer names the VMM's version."""
        greeting: dict[str, Any] = await self._greeting
        await self.call("qmp_capabilities")
        return greeting

    async def call(self, command: str, *, fds: tuple[int, ...] = (), **arguments: object) -> Any:
        """Execute a command; `fds` travel with it. Raises GuestFailed with the VMM's own words."""
        if self._error is not None:
            raise self._error
        self._count += 1
        number = self._count
        answer: asyncio.Future[Any] = self._loop.create_future()
        self._answers[number] = answer
        message: dict[str, object] = {"execute": command, "id": number}
        if arguments:
            message["arguments"] = arguments
        data = json.dumps(message).encode() + b"\n"
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            # A command is far smaller than the socket's buffer, so this never has to wait.
            if self._sock.sendmsg([data], ancillary) != len(data):
                raise _lost(f"it does not take {command}")
        except OSError as error:
            raise _lost(error.strerror or str(error)) from error
        try:
            return await answer
        finally:
            self._answers.pop(number, None)

    def expect(self, event: str) -> asyncio.Future[Any]:
        """The next event of that name, from now on."""
        waiter: asyncio.Future[Any] = self._loop.create_future()
        if self._error is not None:
            waiter.set_exception(self._error)
            waiter.exception()
        else:
            self._events.setdefault(event, []).append(waiter)
        return waiter

    def close(self) -> None:
        """Let go of it; what still waits fails."""
        self._end("closed")

    def _readable(self) -> None:
        try:
            data = self._sock.recv(_RECEIVE_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if not data:
            self._end("it closed its control channel")
            return
        self._held += data
        while (end := self._held.find(b"\n")) >= 0:
            line = bytes(self._held[:end])
            del self._held[: end + 1]
            self._take(line)
        if len(self._held) > _LINE_MAX:
            self._end("it said more than it may")

    def _take(self, line: bytes) -> None:
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            self._end("it said what is not QMP")
            return
        if "QMP" in message:
            if not self._greeting.done():
                self._greeting.set_result(message["QMP"])
        elif "event" in message:
            for waiter in self._events.pop(str(message["event"]), []):
                if not waiter.done():
                    waiter.set_result(message.get("data"))
        else:
            self._answer(message)

    def _answer(self, message: dict[str, Any]) -> None:
        number = message.get("id")
        answer = self._answers.get(number) if isinstance(number, int) else None
        if answer is None or answer.done():
            return
        error = message.get("error")
        if error is None:
            answer.set_result(message.get("return"))
        else:
            words = error.get("desc") if isinstance(error, dict) else error
            answer.set_exception(GuestFailed("the virtual machine monitor refused a command", why=str(words)[:500]))

    def _end(self, why: str) -> None:
        if self._error is not None:
            return
        self._error = _lost(why)
        self._loop.remove_reader(self._sock.fileno())
        self._sock.close()
        waiting = [*self._answers.values(), *(w for many in self._events.values() for w in many), self._greeting]
        self._events.clear()
        for waiter in waiting:
            if not waiter.done():
                waiter.set_exception(self._error)
                waiter.exception()
