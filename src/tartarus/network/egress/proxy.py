"""The daemon's side of its egress proxy: starts it, answers it, counts what it refuses, and puts another in its place.

While there is none, whatever is led to it waits, and nothing gets out.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from ipaddress import IPv4Address
from typing import Any, Protocol

import structlog

from tartarus.model.errors import TartarusError
from tartarus.network.egress.judge import Judge, Refuses
from tartarus.network.egress.messages import Ask, Carried, Credential, Forget, FromProxy, Link, Review, Settled, Verdict
from tartarus.network.egress.refusal import REASONS, counter
from tartarus.network.resolver import Resolver

_log = structlog.get_logger("tartarus.network.egress")
_SETTLE_S = 2.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 5.0
_STABLE_S = 60.0
_MOST_QUESTIONS = 4096
"""Names that are being looked up at once; what needs no such question is answered all the same."""


class Client(Protocol):
    """A slot that is served: `told` of the end of each of its connections, asked for a domain's `credential`."""

    address: IPv4Address
    told: Callable[[Carried], None]
    credential: Callable[[str], Credential | None]


class Process(Protocol):
    """A running proxy."""

    def kill(self) -> None:
        """End it at once; safe to repeat."""

    async def gone(self) -> None:
        """Wait until it has ended."""


Launch = Callable[[socket.socket, list[socket.socket], int], Awaitable[Process]]
"""Starts one, with its end of the control socket, its listening sockets and the network namespace to be in."""


class EgressProxy:
    """`start` when the first contract needs it, `close` at the end."""

    def __init__(
        self, launch: Launch, listen: Callable[[], list[socket.socket]], namespace: int, resolver: Resolver,
        refuses: Refuses,
    ) -> None:  # fmt: skip
        self._launch = launch
        self._listen = listen
        self._namespace = namespace
        self._judge = Judge(resolver, refuses, self._credential)
        self._sockets: list[socket.socket] = []
        self._link: Link[FromProxy] | None = None
        self._process: Process | None = None
        self._starting = asyncio.Lock()
        self._restarting: asyncio.Task[None] | None = None
        self._pause_s = _FIRST_PAUSE_S
        self._started_at = 0.0
        self._numbers = itertools.count(1)
        self._unsettled: dict[int, asyncio.Future[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._counts: dict[str, Counter[str]] = {}
        self._clients: dict[str, Client] = {}
        self._closing = False

    async def start(self) -> None:
        """Have one run. Raises TartarusError, OSError."""
        async with self._starting:
            if self._process is not None or self._closing:
                return
            if not self._sockets:
                self._sockets = await asyncio.to_thread(self._listen)
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            try:
                self._process = await self._launch(theirs, self._sockets, self._namespace)
            except BaseException:
                ours.close()
                raise
            finally:
                theirs.close()
            self._started_at = asyncio.get_running_loop().time()
            self._link = Link(ours, FromProxy, self._heard, self._ended)  # type: ignore[arg-type]

    async def close(self) -> None:
        """End it, and all that it carries."""
        self._closing = True
        for task in (*self._tasks, *([self._restarting] if self._restarting is not None else [])):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._restarting is not None:
            await asyncio.gather(self._restarting, return_exceptions=True)
        process, self._process = self._process, None
        if self._link is not None:
            self._link.close()
        if process is not None:
            process.kill()
            await process.gone()
        for sock in self._sockets:
            sock.close()

    def opened(self, client: Client) -> None:
        """Serve that slot from now on."""
        self._counts[str(client.address)] = Counter()
        self._clients[str(client.address)] = client

    def _credential(self, slot: str, name: str) -> Credential | None:
        client = self._clients.get(slot)
        return None if client is None else client.credential(name)

    async def closed(self, slot: IPv4Address) -> dict[str, int]:
        """End what that slot has open, and count it no more; what was counted."""
        await self.forget(slot)
        self._clients.pop(str(slot), None)
        return dict(self._counts.pop(str(slot), {}))

    def counted(self, slot: IPv4Address) -> dict[str, int]:
        """What was counted for a slot so far."""
        return dict(self._counts.get(str(slot), {}))

    async def forget(self, slot: IPv4Address) -> None:
        """End what that slot has open."""
        await self._settled(Forget(next(self._numbers), str(slot)))

    async def review(self, slot: IPv4Address) -> None:
        """End what that slot has open and its present contract does not allow."""
        await self._settled(Review(next(self._numbers), str(slot)))

    async def _settled(self, message: Forget | Review) -> None:
        link, process = self._link, self._process
        if link is None or process is None:
            return  # one that is not there has nothing open
        done = self._unsettled[message.number] = asyncio.get_running_loop().create_future()
        try:
            link.tell(message)
            async with asyncio.timeout(_SETTLE_S):
                await done
        except TimeoutError:
            _log.error("egress_proxy_stuck")
            process.kill()
        finally:
            self._unsettled.pop(message.number, None)

    def _heard(self, message: FromProxy) -> None:
        if isinstance(message, Settled):
            self._settle(message.number)
        elif isinstance(message, Carried):
            counts = self._counts.get(message.slot)
            if counts is not None:
                if message.refused in REASONS:
                    counts[counter(message.refused)] += 1
                elif message.kind:
                    counts["proxied"] += 1
                self._clients[message.slot].told(message)
        else:
            self._decide(message)

    def _decide(self, ask: Ask) -> None:
        link = self._link
        if link is None:
            return
        try:
            verdict = self._judge.decide(ask)
        except ValueError as error:
            _log.warning("egress_question_refused", error=str(error))
            verdict = Verdict(ask.number, refused="malformed")
        if not isinstance(verdict, Verdict) and len(self._tasks) >= _MOST_QUESTIONS:
            verdict.close()
            verdict = Verdict(ask.number, refused="unresolved")
        if isinstance(verdict, Verdict):
            link.tell(verdict)
            return

        async def later(looking: Coroutine[Any, Any, Verdict]) -> None:
            link.tell(await looking)

        task = asyncio.get_running_loop().create_task(later(verdict))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _settle(self, number: int) -> None:
        done = self._unsettled.get(number)
        if done is not None and not done.done():
            done.set_result(None)

    def _ended(self) -> None:
        for number in list(self._unsettled):
            self._settle(number)
        self._link = None
        process, self._process = self._process, None
        if self._closing or process is None:
            return
        process.kill()
        _log.warning("egress_proxy_ended")
        self._restarting = asyncio.get_running_loop().create_task(self._restart(process))

    async def _restart(self, process: Process) -> None:
        await process.gone()
        if asyncio.get_running_loop().time() - self._started_at > _STABLE_S:
            self._pause_s = _FIRST_PAUSE_S
        while True:
            await asyncio.sleep(self._pause_s)
            self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
            try:
                await self.start()
            except (TartarusError, OSError) as error:
                _log.error("egress_proxy_not_started", error=str(error))
            else:
                return
