"""A parked interpreter, the host's end: an ordinary process of a guest that has warmed up and waits for its program.

Node.js and R can't be cloned as Python is (Node.js has threads; an R fork shares what must not be shared), so
each waits in a guest of its own for the one program that it will run (node/spares.py). The runners are runner.cjs
and runner.R.

To the runner, on its standard input: `u32` size, `u32` count, then that many strings, each ended by a NUL. Lists
inside a message have their length, in digits, before them. First message: modules to load, text of a warm-up script.
Second: working directory, "1" when input follows, mode, program and option (see `command_lines`), variables to unset,
variables to set, arguments. From it, on standard output: ACK when it is parked; then for the second message ACK, after
which everything is the program's, or NAK and a reason. Anything else, or silence, ends the interpreter, and the
command starts cold.
"""

from __future__ import annotations

import asyncio
import secrets
import signal
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import structlog

from tartarus.guest.channel import GuestChannel, GuestExec, GuestProcess
from tartarus.guest.command_lines import CONTEXT, Kind, NotKnown, program_of, steering_variable
from tartarus.guest.protocol import U32_U32
from tartarus.model.errors import GuestFailed, InvalidState, TemplateFailed
from tartarus.model.sandbox import ExitStatus

_log = structlog.get_logger("tartarus.guest.parked")
_ACK, _NAK = b"\x06", b"\x15"
WARM_UP_S = 120.0
"""How long a warm-up may take, as with the Python runner."""
ANSWER_S = 5.0
"""How long a parked interpreter may take to accept a program; it needs a few milliseconds."""
MAX_REQUEST = 1024 * 1024
"""Bytes of a request; longer ones start cold, as with the Python runner."""
_MOST_PRINTED = 16 * 1024 * 1024
_MAX_EARLY = 64 * 1024
_LAST_WORDS = 2000
_CELLS = Path(__file__).with_name("cells.R")
_RUNNERS: dict[Kind, str] = {"node": "runner.cjs", "r": "runner.R"}


def encode(words: Sequence[str]) -> bytes:
    """One message."""
    data = b"".join(word.encode("utf-8", "surrogateescape") + b"\0" for word in words)
    return U32_U32.pack(len(data), len(words)) + data


def _listed(words: Sequence[str]) -> list[str]:
    return [str(len(words)), *words]


class Parking(msgspec.Struct, frozen=True):
    """How to park: the command, its environment and directory, what it warms up, and a directory for the runner.

    `command` is started by the name that people's commands have to begin with, from the same PATH.
    `cells`: it is for code cells only, which R has to know before it starts.
    """

    kind: Kind
    command: str
    imports: tuple[str, ...]
    script: str
    env: dict[str, str]
    cwd: str
    scratch: str
    cells: bool = False


async def park(channel: GuestChannel, parking: Parking, limit_s: float = WARM_UP_S) -> Parked:
    """Start the interpreter, warm it up and wait until it is parked.

    Raises TemplateFailed with what it printed when the warm-up fails or takes over `limit_s` seconds, GuestFailed
    when the guest does.
    """
    source = Path(__file__).with_name(_RUNNERS[parking.kind])
    place = f"{parking.scratch}/.tartarus-{secrets.token_hex(4)}-{source.name}"
    await channel.write(place, source.read_bytes(), mode=0o600)
    argv: tuple[str, ...] = (parking.command, place)
    if parking.cells and parking.kind == "r":
        argv = ("/bin/sh", "-c", 'exec "$@" 3>&1 1>&2', "sh", *argv, "--cells")
    process = channel.exec(GuestExec(argv=argv, env=parking.env, cwd=parking.cwd, stdin=True))
    said = bytearray()
    total = 0
    try:
        async with asyncio.timeout(limit_s):
            await process.started()
            await process.write_stdin(encode([*_listed(parking.imports), parking.script]))
            while True:
                piece = await process.read()
                if piece is None:
                    raise TemplateFailed("the warm-up failed", why=_text(said) or "the interpreter ended")
                if piece[0] == 1 and piece[1].endswith(_ACK):
                    return Parked(process, parking)
                said = (said + piece[1])[-_LAST_WORDS:]
                total += len(piece[1])
                if total > _MOST_PRINTED:
                    process.signal(signal.SIGKILL)
                    raise TemplateFailed(f"the warm-up printed over {_MOST_PRINTED >> 20} MiB", why=_text(said))
    except TimeoutError:
        process.signal(signal.SIGKILL)
        raise TemplateFailed(f"the warm-up took over {limit_s:g} s", why=_text(said)) from None


class Parked:
    """One interpreter that waits. It serves one command, or is ended with its guest."""

    def __init__(self, process: GuestProcess, parking: Parking) -> None:
        self.parking = parking
        self._process = process
        self._taken = False
        # Reads on while it waits: a parked interpreter that says a word, or ends, is none.
        self._reading = asyncio.get_running_loop().create_task(process.read())
        self._reading.add_done_callback(_look_at)

    @property
    def process(self) -> GuestProcess:
        """The interpreter."""
        return self._process

    @property
    def waits(self) -> bool:
        """Whether it still does."""
        return not self._taken and not self._reading.done()

    async def broken(self) -> None:
        """Return when it has ended, or said something: unasked, unless it was taken."""
        await asyncio.wait([self._reading])

    def why_not(self, argv: tuple[str, ...], env: Mapping[str, str], *, tty: bool) -> str:
        """Why it can't run this command as a fresh interpreter would; "" when it can."""
        if not self.waits:
            return "the parked interpreter is gone"
        if argv[0] not in (self.parking.command, CONTEXT):
            return f"{argv[0]!r} is not its command"
        if self.parking.kind == "r" and (argv[0] == CONTEXT) is not self.parking.cells:
            return "R is parked either for programs or for cells"
        if tty:
            return "a terminal was asked for"
        if name := steering_variable(self.parking.kind, self.parking.env, env):
            return f"{name} is read only at an interpreter's start"
        try:
            program_of(self.parking.kind, argv)
        except NotKnown as unknown:
            return str(unknown)
        return ""

    def offer(self, request: GuestExec, start_cold: Callable[[], GuestProcess]) -> HandedOver | None:
        """Hand a command over, or None when it is not for it.

        `start_cold` starts the same command the ordinary way, should the interpreter refuse it or fail.
        """
        why = self.why_not(request.argv, request.env, tty=request.tty)
        message = b"" if why else self._message(request)
        if len(message) > MAX_REQUEST:
            why = "the command is too long"
        if why:
            _log.debug("cold_start", command=request.argv[0], why=why)
            return None
        self._taken = True
        return HandedOver(self._process, self._reading, message, request, start_cold)

    def _message(self, request: GuestExec) -> bytes:
        program = program_of(self.parking.kind, request.argv)
        before, after = self.parking.env, request.env
        unset = [name for name in before if name not in after]
        changed = [f"{name}={value}" for name, value in after.items() if before.get(name) != value]
        if program.mode == "context" and self.parking.kind == "r":
            program = msgspec.structs.replace(program, program=_CELLS.read_text("utf-8"))
        place = [request.cwd, "1" if request.stdin else "", program.mode, program.program, program.option]
        return encode([*place, *_listed(unset), *_listed(changed), *_listed(program.arguments)])


class HandedOver:
    """A process whose program a parked interpreter runs; a cold one in its place when that did not work out."""

    def __init__(
        self,
        parked: GuestProcess,
        reading: asyncio.Task[tuple[int, bytes] | None],
        message: bytes,
        request: GuestExec,
        start_cold: Callable[[], GuestProcess],
    ) -> None:
        self._parked = parked
        self._reading: asyncio.Task[tuple[int, bytes] | None] | None = reading
        self._message = message
        self._request = request
        self._start_cold = start_cold
        self._early: deque[tuple[int, bytes]] = deque()
        self._signals: list[tuple[int, bool]] = []
        self._input_ended = not request.stdin
        self._process: GuestProcess | None = None
        self._deciding = asyncio.get_running_loop().create_task(self._decide())
        self._deciding.add_done_callback(_look_at)

    async def started(self) -> tuple[int, bool]:
        """(pid in the sandbox, whether the parked interpreter runs it). Raises what kept it from starting."""
        process = await self._decided()
        pid, _ = await process.started()
        return pid, process is self._parked

    async def read(self) -> tuple[int, bytes] | None:
        """The next output as (1 stdout or 2 stderr, data); None after the end. One reader at a time."""
        process = await self._decided()
        await process.session.flowing()  # what waits here, too, stays as it is while it is saved
        return self._early.popleft() if self._early else await process.read()

    async def settled(self) -> None:
        """Return once it is known who runs the program, or that nobody can."""
        await asyncio.wait([self._deciding])

    @property
    def process(self) -> GuestProcess:
        """Whoever runs the program. Raises InvalidState unless that is `settled`."""
        if self._process is None:
            raise InvalidState("this command is just being started", fix="try again in a moment")
        return self._process

    @property
    def by_parked(self) -> bool:
        """Whether the parked interpreter runs it."""
        return self._process is self._parked

    @property
    def early(self) -> tuple[tuple[int, bytes], ...]:
        """Output that came before the program was accepted, and was not read yet."""
        return tuple(self._early)

    async def write_stdin(self, data: bytes) -> None:
        """Send input; returns when all of it is on its way."""
        await (await self._decided()).write_stdin(data)

    def close_stdin(self) -> None:
        """End of input."""
        self._input_ended = True
        if self._process is not None:
            self._process.close_stdin()

    def signal(self, number: int, group: bool = False) -> None:
        """Send a signal; one that comes before the start is delivered at the start."""
        if self._process is not None:
            self._process.signal(number, group)
        else:
            self._signals.append((number, group))

    def resize(self, rows: int, cols: int) -> None:
        """Nothing: it has no terminal."""

    async def wait(self) -> ExitStatus:
        """How it ended."""
        return await (await self._decided()).wait()

    async def _decided(self) -> GuestProcess:
        if self._process is not None:
            return self._process
        return await asyncio.shield(self._deciding)

    async def _decide(self) -> GuestProcess:
        refusal = await self._hand_over()
        process = self._parked
        if refusal:
            _log.info("cold_start", command=self._request.argv[0], why=refusal)
            self._early.clear()
            process = self._start_cold()
        self._process = process
        if self._input_ended:
            process.close_stdin()
        for number, group in self._signals:
            process.signal(number, group)
        return process

    async def _hand_over(self) -> str:
        """Why the parked interpreter does not run the program, and is gone; "" when it runs it."""
        try:
            async with asyncio.timeout(ANSWER_S):
                await self._parked.write_stdin(self._message)
                refusal = await self._answer()
                if refusal:
                    await self._until_gone()
                return refusal
        except TimeoutError:
            refusal = f"no answer within {ANSWER_S:g} s"
        except _Breach as breach:
            refusal = str(breach)
        # Only once it is gone is it known not to have begun.
        self._parked.signal(signal.SIGKILL)
        try:
            async with asyncio.timeout(ANSWER_S):
                begun = await self._until_gone()
        except TimeoutError:
            raise GuestFailed("the parked interpreter can't be ended", why=refusal) from None
        return "" if begun else refusal

    async def _answer(self) -> str:
        """Why it does not run the program; "" when it does. Raises _Breach."""
        while (piece := await self._next()) is not None:
            stream, data = piece
            if stream == 1 and data[:1] == _ACK:
                self._keep(1, data[1:])
                return ""
            if stream == 1:
                if data[:1] != _NAK:
                    raise _Breach("an answer that is none")
                return _text(data[1:]) or "refused"
            # What the program said right after its start may come first: it is another pipe.
            self._keep(stream, data)
            if sum(len(early) for _, early in self._early) > _MAX_EARLY:
                raise _Breach("output, but no answer")
        return "the parked interpreter ended"

    async def _until_gone(self) -> bool:
        """Read on to its end; whether it turns out to have begun the program."""
        begun = False
        while (piece := await self._next()) is not None:
            stream, data = piece
            if stream == 1 and data[:1] == _ACK and not begun:
                begun, data = True, data[1:]
            if begun:
                self._keep(stream, data)
        return begun

    def _keep(self, stream: int, data: bytes) -> None:
        if data:
            self._early.append((stream, data))

    async def _next(self) -> tuple[int, bytes] | None:
        """The next output. The first is being read already."""
        if self._reading is None:
            return await self._parked.read()
        piece = await asyncio.shield(self._reading)
        self._reading = None
        return piece


class _Breach(Exception):
    """The parked interpreter did not do its part."""


def _text(said: bytes | bytearray) -> str:
    return said[-_LAST_WORDS:].decode("utf-8", "replace").strip()


def _look_at(task: asyncio.Task[Any]) -> None:
    """An error that nobody waits for is no reason for a warning."""
    if not task.cancelled():
        task.exception()
