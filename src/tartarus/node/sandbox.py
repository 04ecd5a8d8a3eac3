"""One live sandbox: its guest, its main command, its end."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

import msgspec
import structlog

from tartarus.guest.channel import GuestChannel, GuestExec, SessionState
from tartarus.guest.command_lines import CONTEXT
from tartarus.guest.contexts import CodeContext
from tartarus.guest.parked import Parked
from tartarus.guest.session import Others
from tartarus.guest.wasm import command_line
from tartarus.model.enforcement import Violation
from tartarus.model.errors import (
    GuestFailed,
    InvalidState,
    SandboxNotFound,
    TartarusError,
    Unsupported,
)
from tartarus.model.sandbox import ExecSpec, ExitStatus, Isolation, Reason, SandboxRecord, SandboxSpec, Stats, Wasm
from tartarus.model.secrets import directories_of
from tartarus.model.states import State
from tartarus.model.template import Template
from tartarus.node import sessions
from tartarus.node.absent import AbsentGuest
from tartarus.node.admission import Place
from tartarus.node.commands import MainProcess, Process
from tartarus.node.contexts import Contexts
from tartarus.node.detained import Detained
from tartarus.node.guarding import Guard, Tally
from tartarus.node.networking import Line
from tartarus.node.offers import Offer
from tartarus.node.outputlog import OutputLog
from tartarus.node.reaching import Reachable
from tartarus.node.resting import Resting
from tartarus.node.secrecy import Held
from tartarus.node.sessions import SandboxSession
from tartarus.node.stopping import Stopping
from tartarus.node.termination import Grace, outcome
from tartarus.runtimes.base import Guest, Places, command_environment
from tartarus.runtimes.confine.recording import CallRecorder
from tartarus.store.sandboxes import SandboxStore

if TYPE_CHECKING:
    from tartarus.guest.ports import GuestPort
    from tartarus.node.publishing import Published

_log = structlog.get_logger("tartarus.node.sandbox")
_STORE_RETRY_S = 1.0
_STORE_RETRY_MAX_S = 60.0
_STARTED = frozenset({State.STARTING, State.RUNNING, State.PAUSED, State.HIBERNATED, State.QUARANTINED})
_STOPPING = frozenset({State.STOPPING})


class Sandbox(Detained, Contexts, Reachable, Resting, Stopping):
    """Made by the node when the guest is running."""

    def __init__(
        self, record: SandboxRecord, template: Template, guest: Guest, store: SandboxStore, log: OutputLog,
        places: Places, on_end: Callable[[Sandbox], None], parked: Parked | None = None,
    ) -> None:  # fmt: skip
        self.record = record
        self.template = template
        self.guest = guest
        self.log = log
        self.main: MainProcess | None = None
        self._store = store
        self._places = places
        self._on_end = on_end
        self._parked = parked
        self.offer: Offer | None = None
        self.place: Place | None = None
        self.line: Line | None = None
        self.published: Published | None = None
        self.held: Held | None = None
        self.recorder: CallRecorder | None = None
        self.guard: Guard | None = None
        self.violation: Violation | None = None
        self.calls: Tally | None = None
        self._contexts: dict[str, CodeContext] = {}
        self._connections: dict[object, tuple[int, GuestPort] | None] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._timers: list[asyncio.TimerHandle] = []
        self.turn = asyncio.Lock()
        self._grace: Grace | None = None
        self._ending: Reason | None = None
        self._exit: ExitStatus | None = None
        self._done: asyncio.Future[SandboxRecord] = self._loop.create_future()
        self.channel = guest.channel
        self.asleep = False

    @classmethod
    async def attached(
        cls, record: SandboxRecord, template: Template, guest: Guest, store: SandboxStore, log: OutputLog,
        places: Places, on_end: Callable[[Sandbox], None], session: SandboxSession, *, others: Others = "kill",
    ) -> Sandbox:  # fmt: skip
        """A sandbox whose guest was restored with `session.channel`: its main command and code contexts go on.

        `others`: what becomes of its other commands, whose clients are not here. Raises GuestFailed.
        """
        await guest.ready()
        sandbox = cls(record, template, guest, store, log, places, on_end)
        taken = sessions.take_over(session, guest.channel)
        sandbox._contexts, sandbox._parked = taken.contexts, taken.parked
        if taken.main is not None:
            sandbox.main = MainProcess(taken.main, log)
        guest.channel.go_on(others)
        return sandbox

    @classmethod
    def sleeping(
        cls, record: SandboxRecord, template: Template, store: SandboxStore, log: OutputLog, places: Places,
        on_end: Callable[[Sandbox], None], session: SandboxSession | None,
    ) -> Sandbox:  # fmt: skip
        """A sandbox that an earlier daemon put to sleep. Without its `session` it can't wake up, only end."""
        guest = AbsentGuest.of(SessionState(0, ()) if session is None else session.channel)
        sandbox = cls(record, template, guest, store, log, places, on_end)
        if session is not None:
            taken = sessions.take_over(session, guest.channel)
            sandbox._contexts, sandbox._parked = taken.contexts, taken.parked
            if taken.main is not None:
                sandbox.main = MainProcess(taken.main, log)
        guest.channel.unplug().close()
        sandbox.asleep, sandbox.others = True, "kill"
        return sandbox

    @property
    def is_ending(self) -> bool:
        """Whether its end has begun."""
        return self._ending is not None or self._done.done()

    @property
    def files(self) -> GuestChannel:
        """File operations: stat, list, read, write, mkdir, move, remove, watch."""
        return self.channel

    def start_command(self, spec: ExecSpec) -> MainProcess:
        """Send the main command; its output waits in the guest until read."""
        request = self._guest_exec(spec if self.held is None else self.held.added_to(spec), once=True)
        self.main = MainProcess(self._begin(request), self.log)
        return self.main

    def supervise(self) -> None:
        """From now on, the end of the guest or of the main command ends the sandbox, and so does its deadline."""
        self._watch()
        if self.main is not None:
            self._spawn(self._watch_main(self.main))
        self.set_deadline()

    def _watch(self) -> None:
        self._spawn(self._watch_guest())

    def detach(self) -> None:
        """Nobody will read the main command's output: keep it in the log."""
        if self.main is not None:
            self._spawn(self._drain(self.main))

    async def exec(self, spec: ExecSpec) -> Process:
        """Run another command beside the main one. Raises InvalidState when paused or ended."""
        self._require(State.RUNNING, "run a command in")
        process = self._begin(self._guest_exec(spec, once=False))
        if spec.timeout_s is not None:
            timer = self._loop.call_later(spec.timeout_s, process.signal, signal.SIGKILL, True)
            self._spawn(self._cancel_after(process, timer))
        return process

    async def kill(self, *, signal: int | None = None, reason: Reason = Reason.USER_REQUEST) -> None:
        """End the sandbox, or with `signal` only signal its main command. Ending twice is no error."""
        self.refuse_if_quarantined()
        if signal is not None:
            if self.main is None:
                raise InvalidState("this sandbox has no main command to signal", fix="use kill without --signal")
            self.main.signal(signal)
            return
        if self._ending is None:
            self._ending = reason
        was_asleep, self.asleep = self.asleep, False
        if was_asleep:
            self.channel.close()
            await self._finish()
        else:
            await self._end_guest()
        await self.wait()

    async def pause(self) -> None:
        """Freeze everything in it."""
        async with self.turn:
            self._require(State.RUNNING, "pause")
            await self.guest.pause()
            self.record = await self._store.transition(self.record.id, {State.RUNNING}, State.PAUSED)

    async def resume(self) -> None:
        """Let it run again."""
        async with self.turn:
            self._require(State.PAUSED, "resume")
            await self.guest.resume()
            self.record = await self._store.transition(self.record.id, {State.PAUSED}, State.RUNNING)

    async def stats(self) -> Stats:
        """Use of resources now."""
        return self.guest.stats()

    def _begin(self, request: GuestExec) -> Process:
        """In the interpreter that is parked here, if it can run this; else a process of its own."""
        taken = None
        if self._parked is not None:
            taken = self._parked.offer(request, lambda: self.channel.exec(request))
        return self.channel.exec(request) if taken is None else taken

    def _guest_exec(self, spec: ExecSpec, *, once: bool) -> GuestExec:
        if self.record.isolation is Isolation.WASM:
            return self._module_exec(spec)
        warm_up = self.template.warm_up
        warm = self.guest.warm and warm_up is not None and spec.argv[0] in (*warm_up.argv0, CONTEXT)
        argv = spec.argv
        if argv[0] == CONTEXT and warm_up is None:
            raise GuestFailed(
                f"template {self.template.id} runs no code contexts", fix="use a template with a warm interpreter"
            )
        if argv[0] == CONTEXT and not warm and warm_up is not None and warm_up.is_cloned:
            argv = (
                self._places.localize(warm_up.interpreter),
                self._places.localize("/opt/tartarus/runner.py"),
                "context",
            )
        return self._guest_command(spec, argv, command_environment(self.template, self._places), warm=warm, once=once)

    def _module_exec(self, spec: ExecSpec) -> GuestExec:
        """A module's command line. Of the template's variables it gets HOME: the others are for native programs."""
        if spec.argv[0] == CONTEXT:
            raise Unsupported(
                "the wasm level runs no code contexts", why="it has no interpreter",
                fix="use another level, or a module that is one",
            )  # fmt: skip
        sandbox = self.record.spec
        wasm = sandbox.wasm or Wasm()
        limits = sandbox.resources.over(self.template.resources)
        argv = command_line(
            spec.argv, loaded=bool(wasm.module) and not spec.argv[0].startswith("/"),
            memory_bytes=limits.memory_bytes, fuel=wasm.fuel,
            directories=(self._places.workdir, "/tmp", *(mount.target for mount in sandbox.mounts),  # noqa: S108
                         *directories_of(sandbox.secrets)),
            deadline_s=spec.timeout_s,
        )  # fmt: skip
        return self._guest_command(spec, argv, {"HOME": self._places.workdir}, warm=True, once=False)

    def _guest_command(
        self, spec: ExecSpec, argv: tuple[str, ...], env: dict[str, str], *, warm: bool, once: bool
    ) -> GuestExec:
        sandbox = self.record.spec
        terminal = {"TERM": "xterm-256color"} if spec.tty else {}
        return GuestExec(
            argv=argv, env=terminal | env | sandbox.env | spec.env,
            cwd=spec.workdir or sandbox.workdir or self._places.workdir, stdin=spec.stdin,
            tty=spec.tty, rows=spec.rows, cols=spec.cols, warm=warm, once=once and sandbox.command is not None,
        )  # fmt: skip

    def _require(self, state: State, doing: str) -> None:
        if self.record.state is not state or self._ending is not None:
            raise InvalidState(f"can't {doing} a sandbox that is {self.record.state.value}")

    def _past_deadline(self) -> None:
        if self.quarantined:  # its holder decides; the limit counts again when it is let go
            return
        if self.guard is not None and self.guard.past_deadline():
            return
        self._spawn(self.kill(reason=Reason.TIMEOUT))

    async def _watch_main(self, main: MainProcess) -> None:
        try:
            self._exit = await main.wait()
        except TartarusError as error:
            _log.info("main_command_lost", sandbox=self.record.id, error=str(error))
            return
        if self._ending is None:
            self._ending = Reason.COMPLETED
        # What else runs in it has its time to end, too.
        if self._grace is None:
            await self._end_guest()

    @property
    def spec(self) -> SandboxSpec:
        """What it is, held to the contract that is in force now."""
        return self.record.spec if self.line is None else self.line.described(self.record.spec)

    async def _end_guest(self) -> None:
        """End it, and before it its network: nothing of its last moment gets out."""
        if self.line is not None:
            try:
                await self.line.cut()
            except (TartarusError, OSError) as error:
                _log.error("network_not_cut", sandbox=self.record.id, error=str(error))
        await self.guest.destroy()

    async def _watch_guest(self) -> None:
        guest = self.guest
        await asyncio.shield(guest.ended)
        if guest is self.guest and not self.asleep:
            await self._finish()

    async def _finish(self) -> None:
        for timer in self._timers:
            timer.cancel()
        if self.left_behind:
            self.log.end()
            self._on_end(self)
            return
        oom_kills, why = self.guest.stats().oom_kills, getattr(self.guest, "why_ended", "")
        state, changes = outcome(
            self._ending, self._exit, oom_kills, asked=self._grace is not None, why_lost=why,
            kills_unnamed=self.record.isolation is Isolation.GVISOR,
        )  # fmt: skip
        changes["ended_at"] = time.time()
        if state is State.KILLED and self.violation is not None and self._ending is not Reason.USER_REQUEST:
            changes["message"] = self.violation.message
        if self._grace is not None and self._grace.forced:
            changes.setdefault("message", "it was still running when its time to end was over")
        if self.held is not None and "message" in changes:
            changes["message"] = self.held.scrub(changes["message"])
        ended = msgspec.structs.replace(self.record, state=state, **changes)
        stored = await self._store_end(state, changes)
        self.record = stored or ended
        if self.main is None:
            self.log.end()
        if not self._done.done():
            self._done.set_result(self.record)
        retry_s = _STORE_RETRY_S
        while stored is None:
            # A full disk, most likely. Until it is known to the store, the sandbox is not forgotten here either.
            await asyncio.sleep(retry_s)
            retry_s = min(retry_s * 2, _STORE_RETRY_MAX_S)
            stored = await self._store_end(state, changes)
        self._on_end(self)

    async def _store_end(self, state: State, changes: dict[str, Any]) -> SandboxRecord | None:
        is_stopping = self.record.state is State.STOPPING
        path: tuple[State, ...] = (state,) if is_stopping or state is State.LOST else (State.STOPPING, state)
        expected = _STOPPING if is_stopping else _STARTED
        try:
            return await self._store.transition(self.record.id, expected, *path, known=self.record, **changes)
        except (InvalidState, SandboxNotFound) as error:
            _log.error("ended_already", sandbox=self.record.id, error=str(error))
            return self.record
        except TartarusError as error:
            _log.error("final_state_not_stored", sandbox=self.record.id, error=str(error))
            return None

    async def _drain(self, main: MainProcess) -> None:
        try:
            while await main.read() is not None:
                pass
        except TartarusError as error:
            _log.info("output_ended", sandbox=self.record.id, error=str(error))
        finally:
            self.log.end()

    async def _cancel_after(self, process: Process, timer: asyncio.TimerHandle) -> None:
        try:
            await process.wait()
        except TartarusError as error:
            _log.debug("command_lost", sandbox=self.record.id, error=str(error))
        finally:
            timer.cancel()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
