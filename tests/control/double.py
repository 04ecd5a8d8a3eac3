"""A node that runs commands as plain host processes: the control layer's tests look at requests, not at isolation."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal as signals
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from tartarus.model.errors import (
    CommandNotFound,
    ContextNotFound,
    FileFailed,
    InvalidState,
    SandboxNotFound,
    TemplateNotFound,
)
from tartarus.model.ids import new_id
from tartarus.model.sandbox import (
    ExecSpec,
    ExitStatus,
    FileEvent,
    FileInfo,
    Isolation,
    Reason,
    SandboxRecord,
    SandboxSpec,
    Stats,
)
from tartarus.model.states import State
from tartarus.model.template import Template
from tartarus.store import SandboxStore
from tartarus.telemetry.metrics import Metrics

WINDOW = 256 * 1024


class HostProcess:
    """A host process with the shape of a guest's."""

    def __init__(self, spec: ExecSpec) -> None:
        self._spec = spec
        self._output: asyncio.Queue[tuple[int, bytes] | None] = asyncio.Queue(maxsize=4)
        self._start = asyncio.ensure_future(self._launch())
        self.resized: list[tuple[int, int]] = []

    async def _launch(self) -> asyncio.subprocess.Process:
        try:
            process = await asyncio.create_subprocess_exec(
                *self._spec.argv,
                env={"PATH": os.environ["PATH"], **self._spec.env},
                stdin=asyncio.subprocess.PIPE if self._spec.stdin else asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                limit=WINDOW,
                start_new_session=True,
            )
        except FileNotFoundError as error:
            raise CommandNotFound(f"{self._spec.argv[0]!r} is not there") from error
        self._pump = asyncio.ensure_future(self._collect(process))
        return process

    async def _collect(self, process: asyncio.subprocess.Process) -> None:
        async def one(number: int, stream: asyncio.StreamReader) -> None:
            while data := await stream.read(WINDOW):
                await self._output.put((number, data))

        assert process.stdout is not None
        assert process.stderr is not None
        await asyncio.gather(one(1, process.stdout), one(2, process.stderr))
        await process.wait()
        await self._output.put(None)

    async def started(self) -> tuple[int, bool]:
        return (await asyncio.shield(self._start)).pid, False

    async def read(self) -> tuple[int, bytes] | None:
        await self.started()
        return await self._output.get()

    async def write_stdin(self, data: bytes) -> None:
        process = await self._start
        if process.stdin is not None:
            process.stdin.write(data)
            await process.stdin.drain()

    def close_stdin(self) -> None:
        process = self._start.result()
        if process.stdin is not None:
            process.stdin.close()

    def signal(self, number: int, group: bool = False) -> None:
        process = self._start.result()
        if process.returncode is None:
            (os.killpg if group else os.kill)(process.pid, number)

    def resize(self, rows: int, cols: int) -> None:
        self.resized.append((rows, cols))

    async def wait(self) -> ExitStatus:
        code = await (await self._start).wait()
        return ExitStatus(code=max(code, 0), signal=max(-code, 0))


class Entry(NamedTuple):
    time_ns: int
    stream: int
    data: bytes


class MemoryLog:
    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.ended = asyncio.Event()
        self._grew = asyncio.Condition()

    async def add(self, stream: int, data: bytes) -> None:
        self.entries.append(Entry(time.time_ns(), stream, data))
        async with self._grew:
            self._grew.notify_all()

    async def end(self) -> None:
        self.ended.set()
        async with self._grew:
            self._grew.notify_all()

    async def read(self, *, follow: bool = False) -> AsyncIterator[Entry]:
        shown = 0
        while True:
            for entry in self.entries[shown:]:
                shown += 1
                yield entry
            if shown < len(self.entries):
                continue
            if not follow or self.ended.is_set():
                return
            async with self._grew:
                await self._grew.wait()


class Main:
    def __init__(self, process: HostProcess, log: MemoryLog) -> None:
        self._process = process
        self._log = log
        self.started = process.started
        self.write_stdin = process.write_stdin
        self.close_stdin = process.close_stdin
        self.signal = process.signal
        self.resize = process.resize
        self.wait = process.wait

    async def read(self) -> tuple[int, bytes] | None:
        piece = await self._process.read()
        if piece is None:
            await self._log.end()
        else:
            await self._log.add(*piece)
        return piece


class HostFiles:
    """Files below a directory of the host."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def _at(self, path: str) -> Path:
        return self._root / path.lstrip("/")

    async def stat(self, path: str) -> FileInfo:
        try:
            found = self._at(path).lstat()
        except OSError as error:
            raise FileFailed(f"{path}: {error.strerror}") from error
        kind = "dir" if self._at(path).is_dir() else "file"
        return FileInfo(path, kind, found.st_size, found.st_mode & 0o7777, found.st_uid, found.st_gid, found.st_mtime)

    async def list(self, path: str) -> list[FileInfo]:
        return [await self.stat(f"{path}/{name}") for name in sorted(os.listdir(self._at(path)))]

    async def read(self, path: str, offset: int = 0, limit: int | None = None) -> AsyncIterator[bytes]:
        try:
            file = self._at(path).open("rb")
        except OSError as error:
            raise FileFailed(f"{path}: {error.strerror}") from error
        with file:
            while data := file.read(65536):
                yield data

    async def write(
        self, path: str, data: AsyncIterator[bytes] | bytes, *, mode: int | None = None, parents: bool = False
    ) -> int:
        target = self._at(path)
        if parents:
            target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(target.name + ".part")
        try:
            with temporary.open("wb") as file:
                assert not isinstance(data, bytes)
                async for piece in data:
                    file.write(piece)
            temporary.chmod(mode or 0o644)
            temporary.rename(target)
            return target.stat().st_size
        except OSError as error:
            raise FileFailed(f"{path}: {error.strerror}") from error
        finally:
            temporary.unlink(missing_ok=True)

    async def mkdir(self, path: str, *, parents: bool = False) -> None:
        self._at(path).mkdir(parents=parents, exist_ok=parents)

    async def move(self, source: str, target: str) -> None:
        self._at(source).rename(self._at(target))

    async def remove(self, path: str, *, recursive: bool = False) -> None:
        shutil.rmtree(self._at(path)) if recursive else self._at(path).unlink()

    def watch(self, path: str, *, recursive: bool = False) -> TwoChanges:
        return TwoChanges(path)


class TwoChanges:
    def __init__(self, path: str) -> None:
        self._path = path

    async def ready(self) -> None:
        return

    async def __aiter__(self) -> AsyncIterator[FileEvent]:
        yield FileEvent("create", self._path + "/a")
        yield FileEvent("write", self._path + "/a")

    async def aclose(self) -> None:
        return


class HostSandbox:
    def __init__(self, node: HostNode, record: SandboxRecord) -> None:
        self._node = node
        self.record = record
        self.log = MemoryLog()
        self.root = Path(tempfile.mkdtemp(prefix="double-"))
        self.files = HostFiles(self.root)
        self.main: Main | None = None
        self._done: asyncio.Future[SandboxRecord] = asyncio.get_running_loop().create_future()
        self._contexts: set[str] = set()
        self._ending: asyncio.Task[None] | None = None
        self.processes: list[HostProcess] = []

    def start_main(self, spec: ExecSpec) -> None:
        process = HostProcess(spec)
        self.processes.append(process)
        self.main = Main(process, self.log)

    async def watch_main(self) -> None:
        assert self.main is not None
        status = await self.main.wait()
        state = State.FAILED if status.shell_status else State.SUCCEEDED
        await self._finish(state, Reason.COMPLETED, exit_code=status.shell_status, exit_signal=status.signal or None)

    async def _finish(self, state: State, reason: Reason, **changes: Any) -> None:
        if self._done.done():
            return
        alive = {State.RUNNING, State.PAUSED}
        try:
            self.record = await self._node.store.transition(
                self.record.id, alive, State.STOPPING, state, reason=reason, **changes
            )
        except InvalidState:
            return
        self._node.sandboxes.pop(self.record.id, None)
        self._node.metrics.ended(self.record)
        shutil.rmtree(self.root, ignore_errors=True)
        if self.main is None:
            await self.log.end()
        self._done.set_result(self.record)

    def detach(self) -> None:
        async def drain(main: Main) -> None:
            while await main.read() is not None:
                pass

        if self.main is not None:
            self._node.spawn(drain(self.main))

    async def exec(self, spec: ExecSpec) -> HostProcess:
        process = HostProcess(spec)
        self.processes.append(process)
        return process

    async def kill(self, *, signal: int | None = None, reason: Reason = Reason.USER_REQUEST) -> None:
        if signal is not None:
            if self.main is None:
                raise InvalidState("no main command")
            self.main.signal(signal)
            return
        await self._finish(State.KILLED, reason)
        for process in self.processes:
            process.signal(signals.SIGKILL, group=True)

    async def pause(self) -> None:
        self.record = await self._node.store.transition(self.record.id, {State.RUNNING}, State.PAUSED)

    async def resume(self) -> None:
        self.record = await self._node.store.transition(self.record.id, {State.PAUSED}, State.RUNNING)

    async def stats(self) -> Stats:
        return Stats(memory_bytes=1, pids=len(self.processes))

    async def wait(self) -> SandboxRecord:
        return await asyncio.shield(self._done)

    async def open_context(self) -> str:
        self._contexts.add(found := new_id("ctx"))
        return found

    def context(self, context_id: str) -> Cells:
        if context_id not in self._contexts:
            raise ContextNotFound(f"no context {context_id!r}")
        return Cells(context_id)

    async def close_context(self, context_id: str) -> None:
        self.context(context_id)
        self._contexts.discard(context_id)


class Cells:
    def __init__(self, context_id: str) -> None:
        self.id = context_id

    async def run(self, code: str, timeout_s: float | None = None) -> AsyncIterator[Any]:
        yield {"type": "stdout", "text": self.id}
        yield {"type": "result", "data": {"text/plain": str(eval(code))}}
        yield {"type": "done"}

    async def interrupt(self) -> None:
        return


class HostNode:
    """The node's shape over host processes."""

    def __init__(self, store: SandboxStore, metrics: Metrics) -> None:
        self.store = store
        self.metrics = metrics
        self.sandboxes: dict[str, HostSandbox] = {}
        self.logs: dict[str, MemoryLog] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def start(self) -> None:
        return

    async def stop(self, reason: Reason) -> None:
        for sandbox in list(self.sandboxes.values()):
            await sandbox.kill(reason=reason)

    async def create(self, tenant: str, spec: SandboxSpec) -> HostSandbox:
        if spec.template != "host":
            raise TemplateNotFound(f"no template {spec.template!r}", fix="known: host")
        began = time.time()
        record = SandboxRecord(
            id=new_id("sbx"), tenant=tenant, name=spec.name, template=spec.template, isolation=Isolation.PROCESS,
            isolation_reason="a test", state=State.PENDING, spec=spec, created_at=began,
        )  # fmt: skip
        record = await self.store.insert(record, State.SCHEDULED, State.STARTING)
        sandbox = HostSandbox(self, record)
        if spec.command is not None:
            sandbox.start_main(spec.command)
            assert sandbox.main is not None
            try:
                await sandbox.main.started()
            except CommandNotFound as error:
                await self.store.transition(
                    record.id, {State.STARTING}, State.FAILED, reason=Reason.START_FAILED, message=str(error)
                )
                raise
        sandbox.record = await self.store.transition(
            record.id, {State.STARTING}, State.RUNNING, started_at=time.time(), start_ms=(time.time() - began) * 1e3
        )
        self.sandboxes[record.id] = sandbox
        self.logs[record.id] = sandbox.log
        self.metrics.launched(spec.template, time.time() - began, warm=False)
        if sandbox.main is not None:
            self.spawn(sandbox.watch_main())
        return sandbox

    def live(self, tenant: str, id_or_name: str) -> HostSandbox:
        found = self.sandboxes.get(id_or_name)
        if found is None or found.record.tenant != tenant:
            raise SandboxNotFound(f"no live sandbox {id_or_name!r}")
        return found

    def log(self, record: SandboxRecord) -> MemoryLog:
        return self.logs[record.id]

    async def templates(self) -> list[Template]:
        return [Template(id="host", name="host")]

    async def levels(self) -> list[Any]:
        return [msgspec.structs.asdict(Stats())]
