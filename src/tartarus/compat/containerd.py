"""containerd through `ctr`, the client that every containerd comes with.

Its API is gRPC and its Python clients are not kept; `ctr` is always of the engine's own version. containerd keeps no
output of what it runs, and gives a file system only as mounts: see `snapshot`.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator
from typing import TypeVar

import msgspec

from tartarus.compat import children
from tartarus.compat.containerd_nouns import ContainerAnswer, state, summary
from tartarus.compat.engines import (
    EXPORT_S,
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
from tartarus.compat.snapshot import archive_argv
from tartarus.compat.wire import CALL_S, STALL_S, check_socket
from tartarus.model.errors import ContainerNotFound, EngineFailed, Unsupported
from tartarus.model.ids import new_id

T = TypeVar("T")
_MAX_ANSWER = 16 * 1024**2
_MAX_LISTED = 1000
_POLL_S = 0.1
_SNAPSHOTTER = re.compile(r"[a-z0-9][a-z0-9_.-]{0,62}", re.ASCII)
_NAMES_LINE = re.compile(r"\s+")


class _CpuTime(msgspec.Struct):
    total: int = 0


class _Cpu(msgspec.Struct):
    usage: _CpuTime | None = None
    usage_usec: int = 0


class _Bytes(msgspec.Struct):
    usage: int = 0


class _Memory(msgspec.Struct):
    usage: int | _Bytes = 0


class _Pids(msgspec.Struct):
    current: int = 0


class _Metrics(msgspec.Struct):
    """`ctr tasks metrics`, of cgroup v1 or v2."""

    cpu: _Cpu = msgspec.field(default_factory=_Cpu)
    memory: _Memory = msgspec.field(default_factory=_Memory)
    pids: _Pids = msgspec.field(default_factory=_Pids)


class ContainerdRuntime:
    """One containerd and one of its namespaces."""

    kind = "containerd"

    def __init__(self, socket_path: str, namespace: str = "") -> None:
        self._path = check_socket(socket_path, self.kind)
        self._namespace = check_container(namespace or "default")

    def facts(self) -> EngineFacts:
        """Who answers."""
        text = self._ctr("version")
        _, _, server = text.partition("Server:")
        found = re.search(r"Version:\s*(\S+)", server)
        version = shown(found[1], 60) if found else ""
        return EngineFacts(engine=self.kind, version=version, runtime="runc", socket=self._path)

    def words(self) -> tuple[str, ...]:
        """What `opening.reopen` needs in another process."""
        return self.kind, self._path, self._namespace

    def containers(self, *, everything: bool) -> list[ContainerSummary]:
        """Its containers: the running ones, or every one."""
        isolation = self.facts().isolation
        statuses = self._statuses()
        names = self._ctr("containers", "list", "--quiet").split()[:_MAX_LISTED]
        return [
            summary(self._info(name), statuses.get(name, "created"), isolation)
            for name in names
            if everything or statuses.get(name) == "running"
        ]

    def export_state(self, container: str) -> ContainerState:
        """How a container is set up, and how it stands."""
        return state(self._info(container), self._statuses().get(container, "created"))

    @contextlib.contextmanager
    def export_files(self, container: str) -> Iterator[Iterator[bytes]]:
        """Its file system as a tar, read through a mount that nobody else sees. Needs root."""
        if os.geteuid() != 0:
            raise EngineFailed("containerd's snapshots can be read by root only", fix="run it with sudo")
        found = self._info(container)
        key, snapshotter = found.snapshot_key, found.snapshotter or "overlayfs"
        if not key or not _SNAPSHOTTER.fullmatch(snapshotter):
            raise EngineFailed(f"container {container} has no snapshot")
        mounts = self._ctr("snapshots", "--snapshotter", snapshotter, "mounts", "/mnt", check_container(key))
        argv = archive_argv(mounts)
        with children.streamed(argv, "reading the snapshot", timeout_s=EXPORT_S, stall_s=STALL_S) as pieces:
            yield pieces

    def logs(
        self, container: str, *, since: str = "", follow: bool = False, timeout_s: float | None = None
    ) -> Iterator[tuple[int, bytes]]:
        """Not to be had: containerd hands output to whoever started the container."""
        del since, follow, timeout_s
        raise Unsupported(f"containerd keeps no output of {check_container(container)}", fix="ask whoever started it")

    def execute(self, container: str, argv: tuple[str, ...], *, timeout_s: float, most_bytes: int) -> CommandOutcome:
        """Run one more command in it."""
        exec_id = new_id("tartarus")
        pieces: list[tuple[int, bytes]] = []
        kept = {1: 0, 2: 0}

        def keep(number: int, piece: bytes) -> None:
            if kept[number] <= most_bytes:  # one byte more than is wanted shows that there was more
                pieces.append((number, piece))
            kept[number] += len(piece)

        words = self._argv("tasks", "exec", "--exec-id", exec_id, check_container(container), *argv)
        status = children.followed(words, keep, timeout_s=timeout_s)
        return CommandOutcome(status, *collect(iter(pieces), most_bytes))

    def create(self, request: LegacyRequest) -> str:
        """Not to be had: what `ctr` makes has no limit of processes, and nobody learns how it ended."""
        raise Unsupported(
            f"{shown(request.image)} can't be run through containerd", why="ctr is for looking, not for running",
            fix="run through docker or podman",
        )  # fmt: skip

    def start(self, container: str) -> None:
        """Start it; what it writes is thrown away."""
        self._ctr("tasks", "start", "--detach", "--null-io", check_container(container))

    def wait(self, container: str, *, timeout_s: float | None) -> int:
        """Not to be had: `ctr` tells how a task ended only to who started it."""
        raise Unsupported(
            f"containerd does not tell how {check_container(container)} ended",
            why=f"asked with a limit of {timeout_s} s",
        )

    def stop(self, container: str, *, grace_s: int) -> None:
        """Ask it to end, and end it after `grace_s`."""
        self._ctr("tasks", "kill", "--signal", "SIGTERM", check_container(container))
        until = time.monotonic() + grace_s
        while self._statuses().get(container) == "running":
            if time.monotonic() > until:
                self._ctr("tasks", "kill", "--signal", "SIGKILL", "--all", container)
                return
            time.sleep(_POLL_S)

    def remove(self, container: str, token: str = "") -> None:
        """Refused: nothing here was made by us."""
        is_ours(self.export_state(container), token)

    def pause(self, container: str) -> None:
        """Freeze its processes."""
        self._ctr("tasks", "pause", check_container(container))

    def unpause(self, container: str) -> None:
        """Let them go on; one that is not frozen is fine."""
        if self._statuses().get(container) == "paused":
            self._ctr("tasks", "resume", check_container(container))

    def usage(self, container: str) -> Usage:
        """What it uses now, by cgroup v1 or v2."""
        found = self._read(_Metrics, "tasks", "metrics", "--format", "json", check_container(container))
        used = found.memory.usage if isinstance(found.memory.usage, int) else found.memory.usage.usage
        cpu_ms = found.cpu.usage.total / 1e6 if found.cpu.usage is not None else found.cpu.usage_usec / 1e3
        return Usage(cpu_ms=cpu_ms, memory_bytes=max(0, used), pids=max(0, found.pids.current))

    def _info(self, container: str) -> ContainerAnswer:
        return self._read(ContainerAnswer, "containers", "info", check_container(container))

    def _statuses(self) -> dict[str, str]:
        """Each task's status, in small letters; a container without a task is not in it."""
        lines = self._ctr("tasks", "list").splitlines()[1:]
        rows = [_NAMES_LINE.split(line.strip()) for line in lines]
        names = {"stopped": "exited"}
        return {row[0]: names.get(row[2].lower(), row[2].lower()) for row in rows if len(row) >= 3}

    def _read(self, kind: type[T], *words: str) -> T:
        try:
            return msgspec.json.decode(self._ctr(*words), type=kind)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise EngineFailed("containerd answered with nonsense", why=shown(str(error))) from None

    def _ctr(self, *words: str) -> str:
        status, out, err = children.bounded(self._argv(*words), most_bytes=_MAX_ANSWER, timeout_s=CALL_S)
        if status == 0:
            return out.decode("utf-8", "replace")
        why = shown(err.decode("utf-8", "replace").strip().rpartition("\n")[2], 400)
        if "not found" in why:
            raise ContainerNotFound("containerd has no such thing", why=why)
        raise EngineFailed("containerd refused", why=why)

    def _argv(self, *words: str) -> list[str]:
        return ["ctr", "--address", self._path, "--namespace", self._namespace, *words]
