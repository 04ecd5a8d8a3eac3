"""The egress proxy itself, as it runs in its own process: takes connections, asks about them, and carries them."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import ssl
import struct
from collections import defaultdict

import msgspec

from tartarus.network.egress import hello
from tartarus.network.egress.connection import HEAD_S, Broken, Connection
from tartarus.network.egress.messages import Ask, Forget, FromDaemon, Link, Review, Settled, Verdict
from tartarus.network.egress.refusal import Refusal
from tartarus.network.egress.tunnels import carry_tls, is_http
from tartarus.network.egress.web import Web

_SO_ORIGINAL_DST = 80
_SOCKADDR_IN = struct.Struct(">HH4s8x")
_MOST_OF_A_SLOT = 512
_MOST = 8192
_AT_ONCE = 32
_ANSWER_S = 15.0


class Server:
    """Serves until the daemon's end of `control` closes. `asked`, `led`: listening sockets."""

    def __init__(
        self, control: socket.socket, asked: socket.socket, led: socket.socket, context: ssl.SSLContext
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._context = context
        self._led = led
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Verdict]] = {}
        self._connections: defaultdict[str, set[Connection]] = defaultdict(set)
        self._count = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self.ended = self._loop.create_future()
        self._link: Link[FromDaemon] = Link(control, FromDaemon, self._heard, lambda: self.ended.set_result(None))  # type: ignore[arg-type]
        self._listeners = (asked, led)
        for listener in self._listeners:
            listener.setblocking(False)
            self._loop.add_reader(listener, self._accept, listener)

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(_AT_ONCE):
            try:
                sock, (slot, _port) = listener.accept()
            except BlockingIOError:
                return
            except OSError:
                continue  # it went while it waited
            self._take(sock, slot, led=listener is self._led)

    def _take(self, sock: socket.socket, slot: str, *, led: bool) -> None:
        sock.setblocking(False)
        address, port = "", None
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if led:
                _, port, packed = _SOCKADDR_IN.unpack(sock.getsockopt(socket.SOL_IP, _SO_ORIGINAL_DST, 16))
                address = socket.inet_ntoa(packed)
        except OSError:
            sock.close()  # of a slot that was given back: nobody knows any more where it was to go
            return
        connection = Connection(sock, slot, address, port, self._ask, self._link.tell)
        if self._count >= _MOST or len(self._connections[slot]) >= _MOST_OF_A_SLOT:
            connection.said_all("limit")
            sock.close()
            return
        self._count += 1
        self._connections[slot].add(connection)
        connection.task = self._loop.create_task(self._serve(connection))
        self._tasks.add(connection.task)
        connection.task.add_done_callback(self._tasks.discard)

    async def _serve(self, connection: Connection) -> None:
        refused, at_once = "", True
        try:
            async with asyncio.timeout(HEAD_S):
                first = await connection.receive()
            if first[:1] == bytes([hello.HANDSHAKE]) and connection.port is not None:
                await carry_tls(connection, first)
            elif is_http(first) is False:
                raise Refusal("protocol")
            elif first:
                await Web(connection, self._context).carry(first)
            at_once = False
        except Refusal as error:
            refused, at_once = error.reason, False
        except TimeoutError:
            refused = "" if connection.asked is not None else "limit"
        except Broken:
            pass
        finally:
            connection.said_all(refused)
            self._count -= 1
            of_slot = self._connections[connection.slot]
            of_slot.discard(connection)
            if not of_slot:
                del self._connections[connection.slot]
            await connection.close(at_once=at_once)

    async def _ask(self, ask: Ask) -> Verdict:
        number = next(self._numbers)
        answer: asyncio.Future[Verdict]
        answer = self._waiting[number] = self._loop.create_future()
        self._link.tell(msgspec.structs.replace(ask, number=number))
        try:
            async with asyncio.timeout(_ANSWER_S):
                return await answer
        except TimeoutError:
            raise Refusal("unresolved") from None
        finally:
            del self._waiting[number]

    def _heard(self, message: FromDaemon) -> None:
        if isinstance(message, Verdict):
            answer = self._waiting.get(message.number)
            if answer is not None and not answer.done():
                answer.set_result(message)
            return
        # What the slot has begun so far is meant, also what still waits to be taken.
        for listener in self._listeners:
            self._accept(listener)
        task = self._loop.create_task(self._settle(message))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _settle(self, message: Forget | Review) -> None:
        those = list(self._connections.get(message.slot, ()))
        if isinstance(message, Review):
            refused = await asyncio.gather(*(self._is_refused(each) for each in those))
            those = [each for each, is_refused in zip(those, refused, strict=True) if is_refused]
        ending = [each.task for each in those if each.task is not None and each.task.cancel()]
        if ending:
            await asyncio.wait(ending)
        self._link.tell(Settled(message.number))

    async def _is_refused(self, connection: Connection) -> bool:
        """Whether what it reached is not allowed any more."""
        asked = connection.asked
        if asked is None:
            return False
        live = [msgspec.structs.replace(asked, live=True, address=one) for one in connection.reaches or ("",)]
        with contextlib.suppress(Refusal):
            if not any([(await self._ask(one)).refused for one in live]):
                return False
        connection.said_all("name")
        return True
