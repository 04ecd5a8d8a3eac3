"""What must be known of a sandbox beside its guest's memory, so that another host end can go on with it.

Written down when the guest stands still (`describe`), and taken over when it was restored (`take_over`): in another
daemon, or for a copy beside its source. Within one daemon the live objects go on instead (`Sandbox.wake_up`).
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from tartarus.guest.channel import GuestChannel, GuestProcess, SessionState
from tartarus.guest.contexts import MAX_LINE, CodeContext
from tartarus.guest.parked import HandedOver, Parked, Parking
from tartarus.guest.process import ProcessState
from tartarus.model.errors import GuestFailed, InvalidState

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tartarus.guest.contexts import ContextProcess
    from tartarus.node.commands import Process

MOST_CONTEXTS = 1024
_MOST_EARLY = 256 * 1024


class CommandState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A command. `early`: output that came before the program in a parked interpreter had been accepted."""

    process: ProcessState
    early: tuple[tuple[int, bytes], ...] = ()
    parked: bool = False

    def __post_init__(self) -> None:
        if sum(len(data) for _, data in self.early) > _MOST_EARLY or any(kind not in (1, 2) for kind, _ in self.early):
            raise ValueError("a command's early output is none")


class ContextState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A code context: its command, how many cells it has run, and what is there of an event that is not whole yet."""

    id: str
    command: CommandState
    count: int
    running: bool
    begun: bytes
    last_words: bytes
    interrupted_by_host: bool

    def __post_init__(self) -> None:
        if not self.id.startswith("ctx-") or self.count < 0 or len(self.begun) > MAX_LINE + self.command.process.window:
            raise ValueError(f"code context {self.id!r} is none")


class ParkedState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An interpreter that still waits for its program."""

    command: CommandState
    parking: Parking


class SandboxSession(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All of it. `channel` belongs into the `GuestRequest` that restores the guest."""

    channel: SessionState
    main: CommandState | None = None
    contexts: tuple[ContextState, ...] = ()
    parked: ParkedState | None = None

    def __post_init__(self) -> None:
        if len(self.contexts) > MOST_CONTEXTS or len({context.id for context in self.contexts}) != len(self.contexts):
            raise ValueError("a sandbox's code contexts are not each there once")


class TakenOver:
    """A command that a parked interpreter runs, on a new channel."""

    def __init__(self, process: GuestProcess, early: tuple[tuple[int, bytes], ...]) -> None:
        self._process = process
        self._early = deque(early)
        self.write_stdin = process.write_stdin
        self.close_stdin = process.close_stdin
        self.signal = process.signal
        self.resize = process.resize
        self.wait = process.wait

    async def started(self) -> tuple[int, bool]:
        """(pid in the sandbox, True: the parked interpreter runs it)."""
        pid, _ = await self._process.started()
        return pid, True

    async def read(self) -> tuple[int, bytes] | None:
        """The next output; None after the end."""
        await self._process.session.flowing()
        return self._early.popleft() if self._early else await self._process.read()

    def state(self) -> CommandState:
        """What a new channel must know."""
        return CommandState(self._process.state(), tuple(self._early), parked=True)


class Taken(NamedTuple):
    """What a sandbox goes on with."""

    main: Process | None
    contexts: dict[str, CodeContext]
    parked: Parked | None


async def settled(main: Process | None, contexts: Mapping[str, CodeContext]) -> None:
    """Wait until no command is just being handed over to a parked interpreter: it is no state to be saved in."""
    for process in (main, *(context.process for context in contexts.values())):
        if isinstance(process, HandedOver):
            await process.settled()


def describe(
    channel: SessionState, main: Process | None, contexts: Mapping[str, CodeContext], parked: Parked | None
) -> SandboxSession:
    """Write down a sandbox that stands still. Raises InvalidState when its main command has just ended."""
    found = []
    for context_id, context in contexts.items():
        command = None if context.ended else _command(context.process)
        if command is not None:
            found.append(
                ContextState(
                    id=context_id, command=command, count=context.count, running=context.running, begun=context.begun,
                    last_words=context.last_words, interrupted_by_host=context.interrupted_by_host,
                )
            )  # fmt: skip
    waiting = None
    if parked is not None and parked.waits:
        waiting = ParkedState(CommandState(parked.process.state(), parked=True), parked.parking)
    main_command = None if main is None else _command(main)
    if main is not None and main_command is None:
        raise InvalidState("this sandbox's command has ended just now")
    return SandboxSession(channel, main_command, tuple(found), waiting)


def _command(process: Process | ContextProcess) -> CommandState | None:
    """None once it has ended."""
    try:
        if isinstance(process, TakenOver):
            return process.state()
        if isinstance(process, HandedOver):
            return CommandState(process.process.state(), process.early, parked=process.by_parked)
        if isinstance(process, GuestProcess):
            return CommandState(process.state())
    except InvalidState:
        return None
    raise TypeError(f"a {type(process).__name__} can't be saved")


def take_over(session: SandboxSession, channel: GuestChannel) -> Taken:
    """Go on with what was written down, on a channel that resumes it. Raises GuestFailed when that is not possible."""
    try:
        main = None if session.main is None else _restored(channel, session.main)
        contexts = {state.id: _context(channel, state) for state in session.contexts}
        parked = None
        if session.parked is not None:
            parked = Parked(GuestProcess.restored(channel, session.parked.command.process), session.parked.parking)
    except ValueError as error:
        raise GuestFailed("the sandbox can't go on", why=f"what was kept beside its memory: {error}") from error
    return Taken(main, contexts, parked)


def _restored(channel: GuestChannel, state: CommandState) -> GuestProcess | TakenOver:
    process = GuestProcess.restored(channel, state.process)
    return TakenOver(process, state.early) if state.parked else process


def _context(channel: GuestChannel, state: ContextState) -> CodeContext:
    return CodeContext.restored(
        _restored(channel, state.command), count=state.count, running=state.running, begun=state.begun,
        last_words=state.last_words, interrupted_by_host=state.interrupted_by_host,
    )  # fmt: skip
