"""`Sandbox`: one sandbox, its commands, code, files and end."""

from __future__ import annotations

import builtins
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType

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
from tartarus.sdk.client import Client
from tartarus.sdk.contexts import MAX_OUTPUT_BYTES, CodeContext, OnOutput, run_cell
from tartarus.sdk.decoding import LogDecoder
from tartarus.sdk.files import Files
from tartarus.sdk.forks import Forks
from tartarus.sdk.networks import Networked
from tartarus.sdk.process import Process
from tartarus.sdk.progress import Progress
from tartarus.sdk.results import CodeResult, CommandResult, LogEntry
from tartarus.sdk.snapshots import Snapshot
from tartarus.sdk.specs import duration_or_none, exec_spec, sandbox_spec
from tartarus.sdk.waiting import Deadline


class Sandbox(Networked):
    """A sandbox. Make one with `Sandbox.create`, or find one with `Sandbox.connect` and `Sandbox.list`.

    Used as a context manager, a sandbox that was created is killed at the block's end, and one
    that was connected to is left alone. Every method may be called from any thread. Errors are subclasses of
    `tartarus.TartarusError`, each with a stable `code`, what happened, why, and what to do.
    """

    def __init__(self, record: SandboxRecord, client: Client, *, owned: bool = False) -> None:
        self._record = record
        self._client = client
        self._owned = owned
        self.files = Files(client.transport, record.id)

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
        client: Client | None = None,
    ) -> Sandbox:
        """Make a sandbox; limits that are not given are the template's.

        Args:
            template: what it is made from; `Client().templates()` lists them.
            isolation: ``process``, ``container``, ``gvisor``, ``wasm``, or ``auto``: the strongest this host can give.
            command: its main command; the sandbox then ends with it. Read its output with `attach` or `logs`.
            timeout_s: how long it may live, in seconds or as in ``"10m"``; for ever if not given.
            memory: bytes, or as in ``"512MiB"``.
            cpus: how many CPUs' time, as in 2, 0.5 or ``"250m"``.
            pids: how many processes and threads.
            disk: how much it may write, in bytes or as in ``"1GiB"``.
            env: variables for everything that runs in it.
            workdir: the directory commands start in; the template's if not given.
            mounts: host files or directories to show in it, as ``source:target[:ro]``.
            network: what it may reach: ``none``, ``open`` for every public address, or a `Contract`.
            allow: destinations that it may reach beside those, as in ``"example.org:443"``.
            publish: ports of it to show on the host, as in ``8080`` or ``"127.0.0.1:8080:80"``.
            name: a name to find it by; no other live sandbox of yours may have it.
            labels: your own keys and values, to find it by.
            snapshot: the id or name of a `Snapshot` to go on from; it brings its own template.
            module: a WebAssembly module or component to run, as a file's path or as bytes. Commands are then its
                command lines, and the level is ``wasm``.
            fuel: how many instructions, about, each of its commands may execute.
            stop_signal: what asks it to end, by name or number; the template's (TERM if it has none) if not given.
            stop_grace: how long it then has, in seconds or as in ``"30s"``; the last part of its time limit, too.
            idle: hibernate it after so long without work, in seconds or as in ``"5m"``; what is asked of it wakes it.
            secrets: what the host lets it have, as ``NAME[,as=env|proxy][,target=T]``; a file if not said.
            security: how it is hardened beyond what its template and its level say; never less.
            record_calls: note each system call that is made in it, for `Seccomp.recorded`; it is slower then.
            client: which daemon; the one of your environment if not given.

        Raises:
            InvalidRequest, TemplateNotFound, NoSpace, and other TartarusErrors; nothing is left behind then.
        """
        code = b"" if module is None else modules.read(module)
        spec = sandbox_spec(
            template=template, isolation=isolation, command=command, timeout_s=timeout_s, memory=memory, cpus=cpus,
            pids=pids, disk=disk, env=env, workdir=workdir, mounts=mounts, network=network, allow=allow,
            publish=publish, name=name, labels=labels, snapshot=snapshot, fuel=fuel, stop_signal=stop_signal,
            module="" if module is None else modules.digest_of(code), stop_grace=stop_grace, idle=idle,
            secrets=secrets, security=security, record_calls=record_calls,
        )  # fmt: skip
        client = client or Client()
        if module is not None:
            modules.ensure(client.transport, code)
        return cls(client.transport.call(calls.create(spec)), client, owned=True)

    @classmethod
    def connect(cls, sandbox: str, *, client: Client | None = None) -> Sandbox:
        """The sandbox of that id, name or unique id prefix, alive or ended. Raises SandboxNotFound."""
        client = client or Client()
        return cls(client.transport.call(calls.show(sandbox)), client)

    @classmethod
    def resume_checkpoint(cls, checkpoint: str, *, client: Client | None = None) -> Sandbox:
        """A new sandbox from a checkpoint, by its id or name: as the checkpoint's was, and from where it was.

        One of memory goes on; one of files starts its command anew over them. Raises SnapshotNotFound.
        """
        client = client or Client()
        return cls(client.transport.call(calls.resume_checkpoint(checkpoint)), client)

    @classmethod
    def list(
        cls,
        *,
        states: Iterable[State | str] | None = None,
        labels: Mapping[str, str] | None = None,
        name: str = "",
        limit: int | None = None,
        client: Client | None = None,
    ) -> builtins.list[Sandbox]:
        """Your sandboxes, newest first: the live ones, or those in the given `states`."""
        client = client or Client()
        wanted = state_names(states)
        found: list[SandboxRecord] = []
        cursor = None
        while limit is None or len(found) < limit:
            size = 1000 if limit is None else min(1000, limit - len(found))
            page = client.transport.call(calls.page(wanted, dict(labels or {}), name, size, cursor))
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

    def refresh(self) -> SandboxRecord:
        """Ask for its record now."""
        self._record = self._client.transport.call(calls.show(self.id))
        return self._record

    def run(
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
        process = self.start(
            argv, env=env, workdir=workdir, timeout_s=timeout_s, stdin=input is not None,
            max_output_bytes=max_output_bytes,
        )  # fmt: skip
        with process:
            if input is not None:
                process.feed(input)
            return process.wait(check=check)

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
    ) -> Process:
        """Start a command and return while it runs.

        With `stdin` it reads what you `write`; with `tty` it has a terminal of `rows` and `cols`. Raises
        CommandNotFound and NotExecutable. It is killed when its `Process` is closed.
        """
        spec = exec_spec(
            argv, env=env, workdir=workdir, stdin=stdin, tty=tty, rows=rows, cols=cols, timeout_s=timeout_s
        )
        connection = self._client.transport.open(f"/v1/sandboxes/{self.id}/exec", calls.encode(spec))
        return Process.opened(connection, Progress(spec.argv, spec.timeout_s), max_output_bytes)

    def attach(self, *, max_output_bytes: int = MAX_OUTPUT_BYTES) -> Process:
        """Follow the main command's output from now on. Closing the returned `Process` leaves it running."""
        argv = self._record.spec.command.argv if self._record.spec.command is not None else ("main command",)
        connection = self._client.transport.open(f"/v1/sandboxes/{self.id}/attach", b"{}")
        return Process.opened(connection, Progress(argv, None), max_output_bytes)

    def run_code(
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
        return run_cell(
            self._client.transport, self.id, None, code, timeout_s=timeout_s, check=check, on_stdout=on_stdout,
            on_stderr=on_stderr,
        )  # fmt: skip

    def open_context(self) -> CodeContext:
        """A fresh interpreter beside the one that `run_code` uses."""
        return CodeContext(self._client.transport, self.id, self._client.transport.call(calls.open_context(self.id)))

    def logs(self, *, follow: bool = False) -> Iterator[LogEntry]:
        """The main command's recorded output; with `follow` also what still comes, until its end."""
        decoder = LogDecoder()
        with self._client.transport.stream(calls.logs(self.id, follow=follow)) as answer:
            for part in answer:
                yield from decoder.receive(part)

    def stats(self) -> Stats:
        """What it uses now."""
        return self._client.transport.call(calls.stats(self.id))

    def snapshot(self, *, name: str = "", labels: Mapping[str, str] | None = None, memory: bool = False) -> Snapshot:
        """Keep what it has changed in its files, to make sandboxes from; it goes on.

        With `memory`, all of it: sandboxes made from that go on where this one stands. No other snapshot of yours may
        have the `name`. Raises Unsupported at levels that can't.
        """
        kind = SnapshotKind.MEMORY if memory else SnapshotKind.FILES
        request = CreateSnapshot(self.id, name, dict(labels or {}), kind)
        return Snapshot(self._client.transport.call(library_calls.create_snapshot(request)), self._client)

    def fork(self, count: int = 1, *, name: str = "", labels: Mapping[str, str] | None = None) -> Forks[Sandbox]:
        """Make `count` live copies, memory included where the level can (gVisor, microVM); it goes on.

        Each has an id, host name, network and randomness of its own, and is called `name` (this one's, if it has one)
        with ``-1``, ``-2``… after it. A container's copies have its files and nothing runs in them: `Forks.kind` says
        so. Raises what kept the first from being made when none was; else `Forks.errors` has it.
        """
        request = ForkRequest(count, name, dict(labels or {}))
        result = self._client.transport.call(library_calls.fork(self.id, request))
        forks = Forks(result, lambda record: Sandbox(record, self._client, owned=True))
        if not forks.sandboxes:
            raise forks.errors[0]
        return forks

    def checkpoint(self, *, name: str = "") -> Snapshot:
        """Keep it as it is, to start it anew with `resume_checkpoint`; it goes on.

        With its memory at levels that can save that; else with its files.
        """
        return Snapshot(self._client.transport.call(calls.checkpoint(self.id, CheckpointRequest(name))), self._client)

    def pause(self) -> None:
        """Freeze every process in it. Its time limit goes on."""
        self._record = self._client.transport.call(calls.pause(self.id))

    def resume(self) -> None:
        """Let it go on."""
        self._record = self._client.transport.call(calls.resume(self.id))

    def hibernate(self, *, after: float | str | None = None) -> None:
        """Write its memory to disk and give everything else back; whatever is asked of it later wakes it.

        With `after` (seconds, or as in ``"10m"``), only then, and this returns at once. Its time limit goes on. Raises
        Unsupported at levels whose memory can't be saved; on any error it runs on.
        """
        request = HibernateRequest(duration_or_none(after))
        self._record = self._client.transport.call(calls.hibernate(self.id, request))

    def wake(self) -> None:
        """Let it go on, if it is hibernated. When this raises, it sleeps on."""
        self._record = self._client.transport.call(calls.wake(self.id))

    def signal(self, signal: int) -> None:
        """Send its main command a signal."""
        self._client.transport.call(calls.send_signal(self.id, signal))

    def stop(
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
        stopped = self._client.transport.call(calls.stop(self.id, request))
        self._record = stopped.sandbox
        return stopped

    def kill(self: Sandbox | str, *, client: Client | None = None) -> None:
        """End it and everything in it; one that has ended is fine.

        Also ``Sandbox.kill("sbx-…")``, without connecting first.
        """
        if isinstance(self, str):
            (client or Client()).transport.call(calls.end(self))
        else:
            (client or self._client).transport.call(calls.end(self.id))

    def wait(self, timeout_s: float | None = None) -> SandboxRecord:
        """Wait for its end and return its last record. Raises TimeLimit when `timeout_s` passes first."""
        deadline = Deadline(timeout_s)
        while self._record.state not in TERMINAL:
            left_s = deadline.left_s(calls.WAIT_S)
            if left_s < 0:
                raise TimeLimit(f"sandbox {self.id} did not end within {timeout_s:g} s", fix="kill it, or wait longer")
            self._record = self._client.transport.call(calls.wait(self.id, left_s))
        return self._record

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._owned:
            self.kill()

    def __repr__(self) -> str:
        return f"<Sandbox {self.id} {self._record.template} {self._record.state.value}>"


def state_names(states: Iterable[State | str] | None) -> list[str]:
    """States for a listing; without any, those that are alive."""
    if states is None:
        return [state.value for state in State if state not in TERMINAL]
    return [State(state).value for state in states]
