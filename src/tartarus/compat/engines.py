"""The nouns of other engines, and what each adapter does: Docker, Podman and containerd behind one protocol."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

import msgspec

from tartarus.model.errors import InvalidRequest

STDOUT, STDERR = 1, 2
LABEL = "tartarus.legacy"
"""The label of containers that we made."""
# What all three engines allow for names and ids, and nothing that a command line or a path could take for more.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,254}", re.ASCII)
MAX_TEXT = 4096
EXPORT_S = 4 * 3600.0
"""How long the files of one container may take to copy."""


class EngineFacts(msgspec.Struct, frozen=True, kw_only=True):
    """An engine that answered: `runtime` is what it starts containers with when they name none."""

    engine: str
    version: str
    runtime: str
    socket: str

    @property
    def isolation(self) -> str:
        """Who holds what runs there, in words: never us."""
        return f"{self.engine} {self.version} ({self.runtime or 'its own runtime'})"


class ContainerSummary(msgspec.Struct, frozen=True, kw_only=True):
    """One container in a listing. `isolation`: who holds it."""

    id: str
    name: str
    image: str
    status: str
    command: str
    isolation: str
    engine: str


class ContainerMount(msgspec.Struct, frozen=True, kw_only=True):
    """What is mounted in a container. `kind`: bind, volume, tmpfs or the engine's own word."""

    kind: str
    source: str
    target: str
    read_only: bool = False
    name: str = ""


class ContainerLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Limits that a container has; None where it has none. Bytes, and thousandths of a CPU."""

    memory_bytes: int | None = None
    cpu_milli: int | None = None
    pids: int | None = None


class ContainerState(msgspec.Struct, frozen=True, kw_only=True):
    """All that a migration looks at. Text is the engine's, and foreign: nothing in it has been checked.

    `status`: created, running, paused, exited or the engine's own word. `started_at` is the engine's time stamp of the
    last start. `others`: settings that no sandbox has, in words. `powers`: what the container may do to its host.
    """

    engine: str
    id: str
    name: str
    image: str
    status: str
    argv: tuple[str, ...]
    env: tuple[str, ...] = ()
    workdir: str = ""
    user: str = ""
    tty: bool = False
    labels: dict[str, str] = {}
    limits: ContainerLimits = ContainerLimits()
    mounts: tuple[ContainerMount, ...] = ()
    network: str = ""
    ports: tuple[str, ...] = ()
    restart: str = ""
    powers: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    exit_code: int | None = None
    started_at: str = ""
    keeps_logs: bool = True

    @property
    def ended(self) -> bool:
        """Whether its command ran and ended by itself or by a signal."""
        return self.status in {"exited", "stopped"} and self.exit_code is not None


class CommandOutcome(NamedTuple):
    """How a command ended and the beginning of what it wrote; `truncated`: there was more."""

    exit_code: int
    stdout: bytes
    stderr: bytes
    truncated: bool = False


class LegacyRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A container to be made through another engine.

    No mounts, no network and no privileges can be asked for: what needs those should be run with the engine's own
    command. Memory in bytes, CPU in thousandths of a CPU. `token` marks the container as of this request.
    """

    image: str
    token: str
    argv: tuple[str, ...] = ()
    env: dict[str, str] = {}
    workdir: str = ""
    user: str = ""
    name: str = ""
    memory_bytes: int = 512 * 1024**2
    cpu_milli: int = 1000
    pids: int = 512


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """What a container uses: CPU time in milliseconds since its start, memory in bytes."""

    cpu_ms: float
    memory_bytes: int
    pids: int


class LegacyRuntime(Protocol):
    """One engine that others made.

    Every method is bounded in time and bytes. It raises ContainerNotFound, EngineFailed, Unsupported for what the
    engine does not have, and InvalidRequest.
    """

    kind: str

    def facts(self) -> EngineFacts:
        """Who answers."""

    def words(self) -> tuple[str, ...]:
        """What `opening.reopen` needs in another process."""

    def containers(self, *, everything: bool) -> list[ContainerSummary]:
        """Its containers: the running ones, or every one."""

    def export_state(self, container: str) -> ContainerState:
        """How a container is set up, and how it stands."""

    def export_files(self, container: str) -> AbstractContextManager[Iterator[bytes]]:
        """Its file system as a tar, without what is mounted in it."""

    def logs(
        self, container: str, *, since: str = "", follow: bool = False, timeout_s: float | None = None
    ) -> Iterator[tuple[int, bytes]]:
        """What it wrote: the stream's number and a piece. `since`: a time stamp of the engine's.

        With `follow` also what still comes, until its end; TimeLimit is raised after `timeout_s`.
        """

    def execute(self, container: str, argv: tuple[str, ...], *, timeout_s: float, most_bytes: int) -> CommandOutcome:
        """Run one more command in it."""

    def create(self, request: LegacyRequest) -> str:
        """Make a container and return its id."""

    def start(self, container: str) -> None:
        """Start it."""

    def wait(self, container: str, *, timeout_s: float | None) -> int:
        """Wait for its end; its exit status. Raises TimeLimit."""

    def stop(self, container: str, *, grace_s: int) -> None:
        """Ask it to end, and end it after `grace_s`."""

    def remove(self, container: str, token: str = "") -> None:
        """End and remove a container that `create` made; one that is not there is fine.

        With a `token` only the one that was made for it; another, which may have its name, is left alone.
        """

    def pause(self, container: str) -> None:
        """Freeze its processes."""

    def unpause(self, container: str) -> None:
        """Let them go on; one that is not frozen is fine."""

    def usage(self, container: str) -> Usage:
        """What it uses now."""


def check_container(name: str) -> str:
    """Return a container's name or id, or raise InvalidRequest."""
    if not _NAME.fullmatch(name):
        raise InvalidRequest(
            f"{name[:100]!r} is not a container's name or id",
            fix="use letters, digits, '_', '.' and '-', beginning with a letter or a digit",
        )
    return name


def is_ours(found: ContainerState, token: str = "") -> bool:
    """Whether we made a container, for the request with that token. Without one, InvalidRequest is raised if not."""
    mark = found.labels.get(LABEL, "")
    if token:
        return mark == token
    if not mark:
        raise InvalidRequest(
            f"{shown(found.name or found.id)} was not made by tartarus legacy run",
            fix=f"remove it with {found.engine}'s own command",
        )
    return True


def shown(text: str, most: int = 200) -> str:
    """Foreign text as one short line: terminals obey control characters."""
    flat = "".join(letter if letter.isprintable() else "?" for letter in text[: most + 1])
    return flat if len(flat) <= most else flat[: most - 1] + "…"


def collect(output: Iterator[tuple[int, bytes]], most_bytes: int) -> tuple[bytes, bytes, bool]:
    """Both streams' beginnings, `most_bytes` of each, and whether there was more; the rest is read and dropped."""
    kept = {STDOUT: bytearray(), STDERR: bytearray()}
    truncated = False
    for number, piece in output:
        room = most_bytes - len(kept[number])
        kept[number] += piece[:room]
        truncated = truncated or len(piece) > room
    return bytes(kept[STDOUT]), bytes(kept[STDERR]), truncated
