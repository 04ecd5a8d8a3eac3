"""A sandbox's rest: it stands still so that its guest can be saved, sleeps without one, and wakes with another."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

import structlog

from tartarus.model.errors import InvalidState, TartarusError
from tartarus.model.states import State
from tartarus.node import sessions

if TYPE_CHECKING:
    from tartarus.guest.channel import GuestChannel
    from tartarus.guest.contexts import CodeContext
    from tartarus.guest.parked import Parked
    from tartarus.guest.session import Others
    from tartarus.model.sandbox import Reason, SandboxRecord
    from tartarus.node.commands import MainProcess
    from tartarus.node.guarding import Guard
    from tartarus.node.outputlog import OutputLog
    from tartarus.node.sessions import SandboxSession
    from tartarus.runtimes.base import Guest

_log = structlog.get_logger("tartarus.node.sandbox")

_STILL = frozenset({State.PAUSED, State.QUARANTINED})


class Resting:
    """The part of a `Sandbox` that rests. It stores nothing: whoever keeps the memory says what state that is."""

    record: SandboxRecord
    guest: Guest
    channel: GuestChannel
    log: OutputLog
    main: MainProcess | None
    asleep: bool
    others: Others = "keep"
    guard: Guard | None
    _contexts: dict[str, CodeContext]
    _parked: Parked | None
    _ending: Reason | None
    _timers: list[asyncio.TimerHandle]
    _tasks: set[asyncio.Task[None]]
    _done: asyncio.Future[SandboxRecord]

    async def quiesce(self) -> SandboxSession:
        """Bring it to a stand, and write down where: from then on its guest can be saved.

        A paused one has to run for that moment. What is asked of it meanwhile waits. Raises InvalidState, GuestFailed;
        it goes on then.
        """
        self._require(self.record.state if self.record.state in _STILL else State.RUNNING, "save")
        main = None if self.main is None else self.main.process
        await sessions.settled(main, self._contexts)
        if self.record.state in _STILL:
            await self.guest.resume()
        try:
            state = await self.channel.quiesce()
            session = sessions.describe(state, main, self._contexts, self._parked)
            await asyncio.to_thread(self.log.sync)
        except BaseException:
            self.unquiesce()
            raise
        return session

    def unquiesce(self) -> None:
        """Let it go on as it did, paused if it was."""
        self.channel.go_on()
        if self.record.state in _STILL:
            self._spawn(self._pause_again())

    async def _pause_again(self) -> None:
        try:
            await self.guest.pause()
        except TartarusError as error:  # it ended meanwhile, most likely: then there is nobody to hear of this
            _log.warning("not_paused_again", sandbox=self.record.id, error=str(error))

    async def fall_asleep(self) -> None:
        """End the guest of a sandbox that stands still and was saved; the sandbox itself stays, with all who wait."""
        if self._ending is not None:
            raise InvalidState("this sandbox is being ended")
        old, self.asleep = self.guest, True
        old.channel = self.channel.unplug()
        await old.destroy()

    async def wake_up(self, guest: Guest) -> None:
        """Go on with a guest that was restored from what was saved. When this raises, it sleeps on."""
        if not self.asleep or self._ending is not None:
            raise InvalidState("only a sandbox that is asleep can wake up")
        await guest.ready()
        self.channel.plug(guest.channel)
        guest.channel = self.channel
        self.guest, self.asleep = guest, False
        self._watch()
        self.channel.go_on(self.others)
        self.others = "keep"
        if self.guard is not None:
            self.guard.has_another_guest()

    async def leave(self) -> None:
        """Forget a sandbox that sleeps: another daemon will find it. Who waits for its end gets its record as it is."""
        for timer in self._timers:
            timer.cancel()
        self.channel.close()
        self.log.end()
        if not self._done.done():
            self._done.set_result(self.record)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def calls_waiting(self) -> bool:
        """Whether something was asked of it since it stands still or is asleep."""
        return self.channel.calls_waiting

    def _watch(self) -> None:
        """Notice the end of its guest, from now on."""

    def _require(self, state: State, doing: str) -> None:
        """Raise InvalidState unless it is in that state."""

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Do that beside, and hold on to it."""
