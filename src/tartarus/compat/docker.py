"""Docker and Podman through the API that both have, over a Unix socket of this host."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import msgspec

from tartarus.compat.docker_nouns import (
    ContainerAnswer,
    InfoAnswer,
    ListedAnswer,
    VersionAnswer,
    state,
    summary,
)
from tartarus.compat.engines import (
    EXPORT_S,
    LABEL,
    STDOUT,
    CommandOutcome,
    ContainerState,
    ContainerSummary,
    EngineFacts,
    LegacyRequest,
    Usage,
    check_container,
    collect,
    is_ours,
    shown,
)
from tartarus.compat.wire import EngineSlow, EngineSocket, demultiplexed
from tartarus.model.errors import ContainerNotFound, EngineFailed, TimeLimit

LOGS_S = 600.0
_WAIT_S = 366 * 86400.0
MAX_LISTED = 10_000


class _Created(msgspec.Struct, rename="pascal"):
    id: str


class _ExecState(msgspec.Struct, rename="pascal"):
    running: bool = False
    exit_code: int | None = None


class _Waited(msgspec.Struct, rename="pascal"):
    status_code: int = 0


class _Cpu(msgspec.Struct):
    cpu_usage: dict[str, Any] = {}


class _Memory(msgspec.Struct):
    usage: int = 0
    stats: dict[str, Any] | None = None


class _Pids(msgspec.Struct):
    current: int = 0


class _Stats(msgspec.Struct):
    cpu_stats: _Cpu = msgspec.field(default_factory=_Cpu)
    memory_stats: _Memory = msgspec.field(default_factory=_Memory)
    pids_stats: _Pids = msgspec.field(default_factory=_Pids)


class DockerRuntime:
    """An engine that speaks Docker's API. `kind`: docker or podman."""

    def __init__(self, socket_path: str, kind: str = "docker") -> None:
        self.kind = kind
        self._socket = EngineSocket(socket_path, kind)

    def facts(self) -> EngineFacts:
        """Who answers."""
        version = self._socket.read("GET", "/version", VersionAnswer).version
        runtime = self._socket.read("GET", "/info", InfoAnswer).default_runtime
        return EngineFacts(
            engine=self.kind, version=shown(version, 60), runtime=shown(runtime, 60), socket=self._socket.path
        )

    def words(self) -> tuple[str, ...]:
        """What `opening.reopen` needs in another process."""
        return self.kind, self._socket.path, ""

    def containers(self, *, everything: bool) -> list[ContainerSummary]:
        """Its containers: the running ones, or every one."""
        query = {"all": "1", "limit": str(MAX_LISTED)} if everything else None
        found = self._socket.read("GET", "/containers/json", list[ListedAnswer], query=query)
        isolation = self.facts().isolation
        return [summary(entry, self.kind, isolation) for entry in found[:MAX_LISTED]]

    def export_state(self, container: str) -> ContainerState:
        """How a container is set up, and how it stands."""
        return state(self._socket.read("GET", self._at(container, "json"), ContainerAnswer), self.kind)

    @contextlib.contextmanager
    def export_files(self, container: str) -> Iterator[Iterator[bytes]]:
        """Its file system as a tar, without what is mounted in it."""
        with self._socket.stream("GET", self._at(container, "export"), deadline_s=EXPORT_S) as pieces:
            yield pieces

    def logs(
        self, container: str, *, since: str = "", follow: bool = False, timeout_s: float | None = None
    ) -> Iterator[tuple[int, bytes]]:
        """What it wrote: the stream's number and a piece, and with `follow` what still comes."""
        query = {"stdout": "1", "stderr": "1", **_since(since), **({"follow": "1"} if follow else {})}
        tty = self.export_state(container).tty
        limit_s = timeout_s or (_WAIT_S if follow else LOGS_S)
        with _time_limit(container, limit_s), self._socket.stream(
            "GET", self._at(container, "logs"), query=query, deadline_s=limit_s, stall_s=limit_s
        ) as pieces:  # fmt: skip
            yield from self._output(pieces, tty=tty)

    def _output(self, pieces: Iterator[bytes], *, tty: bool) -> Iterator[tuple[int, bytes]]:
        if tty:
            for piece in pieces:
                yield STDOUT, piece
            return
        try:
            yield from demultiplexed(pieces)
        except ValueError as error:
            raise EngineFailed(f"{self.kind} answered with nonsense", why=str(error)) from None

    def execute(self, container: str, argv: tuple[str, ...], *, timeout_s: float, most_bytes: int) -> CommandOutcome:
        """Run one more command in it."""
        body = {"AttachStdout": True, "AttachStderr": True, "Cmd": argv}
        made = self._socket.read("POST", self._at(container, "exec"), _Created, body=body).id
        path = f"/exec/{check_container(made)}"
        with self._socket.stream(
            "POST", f"{path}/start", body={"Detach": False, "Tty": False}, deadline_s=timeout_s, stall_s=timeout_s
        ) as pieces:
            written = collect(self._output(pieces, tty=False), most_bytes)
        ended = self._socket.read("GET", f"{path}/json", _ExecState)
        if ended.running or ended.exit_code is None:
            raise EngineFailed(f"{self.kind} does not say how the command ended")
        return CommandOutcome(ended.exit_code, *written)

    def create(self, request: LegacyRequest) -> str:
        """Make a container without network, mounts, capabilities or a way to new ones; returns its id."""
        body: dict[str, Any] = {
            "Image": request.image,
            "Env": [f"{name}={value}" for name, value in request.env.items()],
            "WorkingDir": request.workdir,
            "User": request.user,
            "Labels": {LABEL: request.token},
            "NetworkDisabled": True,
            "HostConfig": {
                "NetworkMode": "none",
                "CapDrop": ["ALL"],
                "SecurityOpt": ["no-new-privileges"],
                "Memory": request.memory_bytes,
                "MemorySwap": request.memory_bytes,
                "NanoCpus": request.cpu_milli * 1_000_000,
                "PidsLimit": request.pids,
            },
        }
        if request.argv:
            body["Cmd"] = request.argv
        query = {"name": check_container(request.name)} if request.name else None
        return check_container(self._socket.read("POST", "/containers/create", _Created, query=query, body=body).id)

    def start(self, container: str) -> None:
        """Start it."""
        self._socket.call("POST", self._at(container, "start"), accept=(304,))

    def wait(self, container: str, *, timeout_s: float | None) -> int:
        """Wait for its end; its exit status. Raises TimeLimit."""
        limit_s = timeout_s or _WAIT_S
        with _time_limit(container, limit_s), self._socket.stream(
            "POST", self._at(container, "wait"), deadline_s=limit_s, stall_s=limit_s
        ) as pieces:  # fmt: skip
            content = b"".join(pieces)
        try:
            return msgspec.json.decode(content, type=_Waited).status_code
        except msgspec.MsgspecError as error:
            raise EngineFailed(f"{self.kind} answered with nonsense", why=shown(str(error))) from None

    def stop(self, container: str, *, grace_s: int) -> None:
        """Ask it to end, and end it after `grace_s`."""
        self._socket.call(
            "POST", self._at(container, "stop"), query={"t": str(grace_s)}, deadline_s=grace_s + 60.0, accept=(304,)
        )

    def remove(self, container: str, token: str = "") -> None:
        """End and remove a container that `create` made; see the protocol."""
        try:
            found = self.export_state(container)
        except ContainerNotFound:
            return
        if is_ours(found, token):
            query = {"force": "1", "v": "1"}
            self._socket.call("DELETE", f"/containers/{check_container(found.id)}", query=query, accept=(404,))

    def pause(self, container: str) -> None:
        """Freeze its processes."""
        self._socket.call("POST", self._at(container, "pause"))

    def unpause(self, container: str) -> None:
        """Let them go on; one that is not frozen is fine."""
        if self.export_state(container).status == "paused":
            self._socket.call("POST", self._at(container, "unpause"))

    def usage(self, container: str) -> Usage:
        """What it uses now."""
        found = self._socket.read("GET", self._at(container, "stats"), _Stats, query={"stream": "0", "one-shot": "1"})
        total = found.cpu_stats.cpu_usage.get("total_usage", 0)
        return Usage(
            cpu_ms=total / 1e6 if isinstance(total, int) else 0.0,
            memory_bytes=max(0, found.memory_stats.usage),
            pids=max(0, found.pids_stats.current),
        )

    @staticmethod
    def _at(container: str, what: str) -> str:
        return f"/containers/{check_container(container)}/{what}"


@contextlib.contextmanager
def _time_limit(container: str, limit_s: float) -> Iterator[None]:
    try:
        yield
    except EngineSlow:
        raise TimeLimit(f"container {container} did not end within {limit_s:g} s") from None


def _since(started_at: str) -> dict[str, str]:
    """The parameter for what was written since a start.

    A command may write before the engine has noted its start: a quarter of a second is granted.
    """
    try:
        started = datetime.fromisoformat(started_at)
        return {"since": f"{started.timestamp() - 0.25:.6f}"} if started.year > 1 else {}
    except (ValueError, OverflowError):
        return {}
