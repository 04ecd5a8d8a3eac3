"""The async twin of `sandbox`: the same names, awaited."""

from __future__ import annotations

import builtins
import os
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from types import TracebackType

import anyio

from tartarus.model.contract import Contract, Publish
from tartarus.model.errors import TimeLimit
from tartarus.model.forking import ForkRequest
from tartarus.model.library import CreateSnapshot
from tartarus.model.lifecycle import CheckpointRequest, HibernateRequest, Stopped, StopRequest
from tartarus.model.sandbox import Mount, SandboxRecord, Stats
from tartarus.model.secrets import SecretUse
from tartarus.model.security import SecurityConfig
from tartarus.model.snapshots import SnapshotKind
from tartarus.model.states import TERMINAL, State
from tartarus.sdk import calls, library_calls, modules
from tartarus.sdk.async_client import AsyncClient
from tartarus.sdk.async_contexts import AsyncCodeContext, run_cell
from tartarus.sdk.async_files import AsyncFiles
from tartarus.sdk.async_process import AsyncProcess
from tartarus.sdk.async_snapshots import AsyncSnapshot
from tartarus.sdk.contexts import MAX_OUTPUT_BYTES, OnOutput
from tartarus.sdk.decoding import LogDecoder
from tartarus.sdk.forks import Forks
from tartarus.sdk.http import Call
from tartarus.sdk.networks import AsyncNetworked
from tartarus.sdk.opening import Opening
from tartarus.sdk.progress import Progress
from tartarus.sdk.results import CodeResult, CommandResult, LogEntry
from tartarus.sdk.sandbox import state_names
from tartarus.sdk.specs import duration_or_none, exec_spec, sandbox_spec
from tartarus.sdk.waiting import Deadline


class AsyncSandbox(AsyncNetworked):
    """A sandbox, for asyncio; see `Sandbox`, whose names it has.

    Make one with ``await AsyncSandbox.create()`` or ``async with AsyncSandbox.create() as sbx:``; the second
    kills it at the block's end. One that was connected to is left alone then.
    """

    def __init__(self, record: SandboxRecord, client: AsyncClient, *, owned: bool = False) -> None:
        self._record = record
        self._client = client
        self._owned = owned
        self.files = AsyncFiles(client.transport, record.id)

    @classmethod
    def create(
        cls,
        template: str = "host",
        *,
        isolation: str = "auto",
        command: Sequence[str] | None = None,
        timeout_s: float | str | None = None,
        memory: int | str | None = None,
        cpus: float | str | None = None,
        pids: int | None = None,
        disk: int | str | None = None,
        env: Mapping[str, str] | None = None,
        workdir: str = "",
        mounts: Iterable[str | Mount] = (),
        network: str | Contract = "none",
        allow: Iterable[str] = (),
        publish: Iterable[str | int | Publish] = (),
        name: str = "",
        labels: Mapping[str, str] | None = None,
        snapshot: str = "",
        module: str | os.PathLike[str] | bytes | None = None,
        fuel: int | None = None,
        stop_signal: int | str = "",
        stop_grace: float | str | None = None,
        idle: float | str | None = None,
        secrets: Iterable[str | SecretUse] = (),
        security: SecurityConfig | None = None,
        record_calls: bool = False,
        client: AsyncClient | None = None,
    ) -> Opening[AsyncSandbox]:
        """Make a sandbox; limits that are not given are the template's.

        ``sbx = await AsyncSandbox.create()``, or ``async with AsyncSandbox.create() as sbx:``.

        The arguments, and what is raised, are those of `Sandbox.create`.
        """
        code = b"" if module is None else modules.read(module)
        spec = sandbox_spec(
            template=template, isolation=isolation, command=command, timeout_s=timeout_s, memory=memory, cpus=cpus,
            pids=pids, disk=disk, env=env, workdir=workdir, mounts=mounts, network=network, allow=allow,
            publish=publish, name=name, labels=labels, snapshot=snapshot, fuel=fuel, stop_signal=stop_signal,
            module="" if module is None else modules.digest_of(code), stop_grace=stop_grace, idle=idle, secrets=secrets,
            security=security, record_calls=record_calls,
        )  # fmt: skip
        return Opening(cls._made(calls.create(spec), client, owned=True, code=None if module is None else code))

    @classmethod
    async def _made(
        cls, call: Call[SandboxRecord], client: AsyncClient | None, *, owned: bool, code: bytes | None = None
    ) -> AsyncSandbox:
        client = client or AsyncClient()
        if code is not None:
            await modules.ensure_async(client.transport, code)
        return cls(await client.transport.call(call), client, owned=owned)

    @classmethod
    def connect(cls, sandbox: str, *, client: AsyncClient | None = None) -> Opening[AsyncSandbox]:
        """The sandbox of that id, name or unique id prefix, alive or ended. Raises SandboxNotFound."""
        return Opening(cls._made(calls.show(sandbox), client, owned=False))

    @classmethod
    def resume_checkpoint(cls, checkpoint: str, *, client: AsyncClient | None = None) -> Opening[AsyncSandbox]:
        """A new sandbox from a checkpoint, by its id or name: as the checkpoint's was, and from where it was.

        One of memory goes on; one of files starts its command anew over them. Raises SnapshotNotFound.
        """
        return Opening(cls._made(calls.resume_checkpoint(checkpoint), client, owned=False))

    @classmethod
    async def list(
        cls,
        *,
        states: Iterable[State | str] | None = None,
        labels: Mapping[str, str] | None = None,
        name: str = "",
        limit: int | None = None,
        client: AsyncClient | None = None,
    ) -> builtins.list[AsyncSandbox]:
        """Your sandboxes, newest first: the live ones, or those in the given `states`."""
        client = client or AsyncClient()
        wanted = state_names(states)
        found: list[SandboxRecord] = []
        cursor = None
        while limit is None or len(found) < limit:
            size = 1000 if limit is None else min(1000, limit - len(found))
            page = await client.transport.call(calls.page(wanted, dict(labels or {}), name, size, cursor))
            found += page.items
            cursor = page.next
            if cursor is None:
                break
        return [cls(record, client) for record in found]

    @property
    def id(self) -> str:
        """Its id, such as ``sbx-3kq9…``."""
        return self._record.id

    @property
    def info(self) -> SandboxRecord:
        """What was last heard of it; `refresh` asks again."""
        return self._record

    async def refresh(self) -> SandboxRecord:
        """Ask for its record now."""
        self._record = await self._client.transport.call(calls.show(self.id))
        return self._record

    async def run(
        self,
        argv: Sequence[str],
        *,
        input: bytes | str | None = None,  # noqa: A002 - the name that subprocess.run gave it
        env: Mapping[str, str] | None = None,
        workdir: str = "",
        timeout_s: float | str | None = None,
        check: bool = False,
        max_output_bytes: int = MAX_OUTPUT_BYTES,
    ) -> CommandResult:
        """Run a command to its end.

        Args:
            argv: the command and its arguments; no shell reads them.
            input: its standard input; empty if not given.
            env: further variables.
            workdir: where it starts; the sandbox's if not given.
            timeout_s: how long it may run; CommandTimedOut is raised after that.
            check: raise CommandFailed unless it exits with status 0.
            max_output_bytes: output beyond this is dropped, and the result says so.
        """
        opening = self.start(
            argv, env=env, workdir=workdir, timeout_s=timeout_s, stdin=input is not None,
            max_output_bytes=max_output_bytes,
        )  # fmt: skip
        async with opening as process:
            if input is not None:
                await process.feed(input)
            return await process.wait(check=check)

    def start(
        self,
        argv: Sequence[str],
        *,
        stdin: bool = False,
        tty: bool = False,
        rows: int = 24,
        cols: int = 80,
        env: Mapping[str, str] | None = None,
        workdir: str = "",
        timeout_s: float | str | None = None,
        max_output_bytes: int = MAX_OUTPUT_BYTES,
    ) -> Opening[AsyncProcess]:
        """Start a command and return while it runs.

        ``async with sbx.start([...]) as process:``; with `stdin` it reads what you `write`, with `tty` it has
        a terminal of `rows` and `cols`. Raises
        CommandNotFound and NotExecutable. It is killed when its `Process` is closed.
        """
        spec = exec_spec(
            argv, env=env, workdir=workdir, stdin=stdin, tty=tty, rows=rows, cols=cols, timeout_s=timeout_s
        )
        progress = Progress(spec.argv, spec.timeout_s)
        return Opening(self._opened("exec", calls.encode(spec), progress, max_output_bytes))

    def attach(self, *, max_output_bytes: int = MAX_OUTPUT_BYTES) -> Opening[AsyncProcess]:
        """Follow the main command's output from now on. Closing the returned `Process` leaves it running."""
        argv = self._record.spec.command.argv if self._record.spec.command is not None else ("main command",)
        return Opening(self._opened("attach", b"{}", Progress(argv, None), max_output_bytes))

    async def _opened(self, kind: str, opening: bytes, progress: Progress, max_output_bytes: int) -> AsyncProcess:
        connection = await self._client.transport.open(f"/v1/sandboxes/{self.id}/{kind}", opening)
        return await AsyncProcess.opened(connection, progress, max_output_bytes)

    async def run_code(
        self,
        code: str,
        *,
        timeout_s: float | None = None,
        check: bool = False,
        on_stdout: OnOutput | None = None,
        on_stderr: OnOutput | None = None,
    ) -> CodeResult:
        """Run Python code that keeps its variables from call to call, with rich results.

        The result has `text`, `html` and `png` of what was shown, `stdout`, `stderr`, and `error` when the
        code raised (with `check`, CodeFailed is raised instead). The callbacks get output while it runs. After
        `timeout_s` the cell is interrupted.
        """
        return await run_cell(
            self._client.transport, self.id, None, code, timeout_s=timeout_s, check=check, on_stdout=on_stdout,
            on_stderr=on_stderr,
        )  # fmt: skip

    def open_context(self) -> Opening[AsyncCodeContext]:
        """A fresh interpreter beside the one that `run_code` uses."""
        return Opening(self._fresh_context())

    async def _fresh_context(self) -> AsyncCodeContext:
        context_id = await self._client.transport.call(calls.open_context(self.id))
        return AsyncCodeContext(self._client.transport, self.id, context_id)

    async def logs(self, *, follow: bool = False) -> AsyncIterator[LogEntry]:
        """The main command's recorded output; with `follow` also what still comes, until its end."""
        decoder = LogDecoder()
        async with self._client.transport.stream(calls.logs(self.id, follow=follow)) as answer:
            async for part in answer:
                for entry in decoder.receive(part):
                    yield entry

    async def stats(self) -> Stats:
        """What it uses now."""
        return await self._client.transport.call(calls.stats(self.id))

    async def snapshot(
        self, *, name: str = "", labels: Mapping[str, str] | None = None, memory: bool = False
    ) -> AsyncSnapshot:
        """Keep what it has changed in its files, to make sandboxes from; it goes on.

        With `memory`, all of it: sandboxes made from that go on where this one stands. No other snapshot of yours may
        have the `name`. Raises Unsupported at levels that can't.
        """
        kind = SnapshotKind.MEMORY if memory else SnapshotKind.FILES
        request = CreateSnapshot(self.id, name, dict(labels or {}), kind)
        return AsyncSnapshot(await self._client.transport.call(library_calls.create_snapshot(request)), self._client)

    async def fork(
        self, count: int = 1, *, name: str = "", labels: Mapping[str, str] | None = None
    ) -> Forks[AsyncSandbox]:
        """Make `count` live copies, memory included where the level can (gVisor, microVM); it goes on.

        Each has an id, host name, network and randomness of its own, and is called `name` (this one's, if it has one)
        with ``-1``, ``-2``… after it. A container's copies have its files and nothing runs in them: `Forks.kind` says
        so. Raises what kept the first from being made when none was; else `Forks.errors` has it.
        """
        request = ForkRequest(count, name, dict(labels or {}))
        result = await self._client.transport.call(library_calls.fork(self.id, request))
        forks = Forks(result, lambda record: AsyncSandbox(record, self._client, owned=True))
        if not forks.sandboxes:
            raise forks.errors[0]
        return forks

    async def checkpoint(self, *, name: str = "") -> AsyncSnapshot:
        """Keep it as it is, to start it anew with `resume_checkpoint`; it goes on.

        With its memory at levels that can save that; else with its files.
        """
        return AsyncSnapshot(
            await self._client.transport.call(calls.checkpoint(self.id, CheckpointRequest(name))), self._client
        )

    async def pause(self) -> None:
        """Freeze every process in it. Its time limit goes on."""
        self._record = await self._client.transport.call(calls.pause(self.id))

    async def resume(self) -> None:
        """Let it go on."""
        self._record = await self._client.transport.call(calls.resume(self.id))

    async def hibernate(self, *, after: float | str | None = None) -> None:
        """Write its memory to disk and give everything else back; whatever is asked of it later wakes it.

        With `after` (seconds, or as in ``"10m"``), only then, and this returns at once. Its time limit goes on. Raises
        Unsupported at levels whose memory can't be saved; on any error it runs on.
        """
        request = HibernateRequest(duration_or_none(after))
        self._record = await self._client.transport.call(calls.hibernate(self.id, request))

    async def wake(self) -> None:
        """Let it go on, if it is hibernated. When this raises, it sleeps on."""
        self._record = await self._client.transport.call(calls.wake(self.id))

    async def signal(self, signal: int) -> None:
        """Send its main command a signal."""
        await self._client.transport.call(calls.send_signal(self.id, signal))

    async def stop(
        self, *, signal: int | str = "", grace: float | str | None = None, checkpoint: bool | str = False
    ) -> Stopped:
        """End it gracefully: a signal to everything in it, time to end, then force. Returns once it is gone.

        Args:
            signal: a name or number; the sandbox's own (TERM unless it says otherwise) if not given.
            grace: how long it has, in seconds or as in ``"30s"``; the sandbox's own (10 s) if not given, 0 for none.
            checkpoint: keep it first, to start it anew with `resume_checkpoint`; a name for the checkpoint, or True.

        One that has ended is fine; a second stop hurries the first. A command that ended by itself with status 0
        has succeeded, and one with another has failed.
        """
        kept = None if checkpoint is False else CheckpointRequest("" if checkpoint is True else checkpoint)
        request = StopRequest(str(signal), duration_or_none(grace), kept)
        stopped = await self._client.transport.call(calls.stop(self.id, request))
        self._record = stopped.sandbox
        return stopped

    async def kill(self: AsyncSandbox | str, *, client: AsyncClient | None = None) -> None:
        """End it and everything in it; one that has ended is fine.

        Also ``await AsyncSandbox.kill("sbx-…")``, without connecting first.
        """
        own, sandbox_id = (None, self) if isinstance(self, str) else (self._client, self.id)
        await (client or own or AsyncClient()).transport.call(calls.end(sandbox_id))

    async def wait(self, timeout_s: float | None = None) -> SandboxRecord:
        """Wait for its end and return its last record. Raises TimeLimit when `timeout_s` passes first."""
        deadline = Deadline(timeout_s)
        while self._record.state not in TERMINAL:
            left_s = deadline.left_s(calls.WAIT_S)
            if left_s < 0:
                raise TimeLimit(f"sandbox {self.id} did not end within {timeout_s:g} s", fix="kill it, or wait longer")
            self._record = await self._client.transport.call(calls.wait(self.id, left_s))
        return self._record

    async def __aenter__(self) -> AsyncSandbox:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._owned:
            with anyio.CancelScope(shield=True):  # a cancelled task must not leave it behind
                await self.kill()

    def __repr__(self) -> str:
        return f"<AsyncSandbox {self.id} {self._record.template} {self._record.state.value}>"
