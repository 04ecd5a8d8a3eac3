"""What a sandbox is asked to be (spec), what it is (record), and what runs in it (exec)."""

from __future__ import annotations

from enum import Enum

import msgspec

from tartarus.model.checks import (
    check_command,
    check_env,
    check_idle,
    check_labels,
    check_mount,
    check_stop,
    check_time_limit,
    no_nul,
    require,
)
from tartarus.model.contract import MAX_PUBLISHED, Contract, Publish
from tartarus.model.ids import check_name
from tartarus.model.secrets import SecretUse, check_uses
from tartarus.model.security import SecurityConfig
from tartarus.model.states import State

MAX_BYTES = 2**60
MAX_FUEL = 2**63
# What the terminal's own structure (struct winsize) can hold.
MAX_TERMINAL_SIZE = 65535


class Isolation(str, Enum):
    """How strongly a sandbox is held. `auto` takes the strongest level this host can give; `wasm` is for modules."""

    AUTO = "auto"
    PROCESS = "process"
    CONTAINER = "container"
    GVISOR = "gvisor"
    MICROVM = "microvm"
    WASM = "wasm"


class Network(str, Enum):
    """What a sandbox may reach. `none`: its own loopback and nothing else; `open`: every public address."""

    NONE = "none"
    OPEN = "open"
    CONTRACT = "contract"


class Reason(str, Enum):
    """Why a sandbox ended; the names of the user's roadmap (Thanatos)."""

    COMPLETED = "completed"
    TIMEOUT = "timeout"
    USER_REQUEST = "user_request"
    RESOURCE_LIMIT = "resource_limit"
    POLICY_VIOLATION = "policy_violation"
    NODE_DRAIN = "node_drain"
    START_FAILED = "start_failed"
    LOST = "lost"


class Mount(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A host directory or file shown inside the sandbox at the absolute path `target`."""

    source: str
    target: str
    read_only: bool = False


class Resources(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Limits. Sizes in bytes, CPU in thousandths of a CPU; `pids` counts threads too."""

    memory_bytes: int = 512 * 1024**2
    cpu_milli: int = 1000
    pids: int = 512
    disk_bytes: int = 1024**3

    def __post_init__(self) -> None:
        require(self.memory_bytes >= 8 * 1024**2, "memory is below 8MiB", "give at least 8MiB")
        require(self.memory_bytes < MAX_BYTES, "memory is out of range", "use less than 1024PiB")
        require(10 <= self.cpu_milli <= 1024_000, "cpus is out of range", "use 0.01 to 1024")
        require(4 <= self.pids <= 4_194_304, "pids is out of range", "use 4 to 4194304")
        require(self.disk_bytes >= 1024**2, "disk is below 1MiB", "give at least 1MiB")
        require(self.disk_bytes < MAX_BYTES, "disk is out of range", "use less than 1024PiB")


class ResourceRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The limits that a caller asks for; what is left out is the template's."""

    memory_bytes: int | None = None
    cpu_milli: int | None = None
    pids: int | None = None
    disk_bytes: int | None = None

    def __post_init__(self) -> None:
        self.over(Resources())

    def over(self, defaults: Resources) -> Resources:
        """The limits that hold: these, and `defaults` where nothing was asked. Raises InvalidRequest."""
        asked = {name: value for name, value in msgspec.structs.asdict(self).items() if value is not None}
        return msgspec.structs.replace(defaults, **asked)


class ExecSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A command. `workdir` and `user` default to the template's; `window_bytes` bounds unread output."""

    argv: tuple[str, ...]
    env: dict[str, str] = {}
    workdir: str = ""
    stdin: bool = False
    tty: bool = False
    rows: int = 24
    cols: int = 80
    timeout_s: float | None = None

    def __post_init__(self) -> None:
        check_command(self.argv, self.env)
        no_nul(self.workdir, "workdir")
        require(
            not self.workdir or self.workdir.startswith("/"),
            f"workdir {self.workdir!r} is not absolute",
            "begin it with /",
        )
        check_time_limit(self.timeout_s)
        for size, what in ((self.rows, "rows"), (self.cols, "cols")):
            require(0 < size <= MAX_TERMINAL_SIZE, f"{what} is out of range", f"use 1 to {MAX_TERMINAL_SIZE}")


class Wasm(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a WASM-level sandbox runs. `module`: the sha256 of a module or component that was sent to the daemon.

    With it, commands are that module's command lines, unless their first word is an absolute path; that, and without
    it any path, is a module's file in the sandbox. `fuel`: how many instructions, about, each command may execute.
    """

    module: str = ""
    fuel: int | None = None

    def __post_init__(self) -> None:
        digest = not self.module or (len(self.module) == 64 and not set(self.module) - set("0123456789abcdef"))
        require(digest, "wasm.module is no sha256", "give 64 small hexadecimal digits, of a module that was sent")
        require(self.fuel is None or 0 < self.fuel < MAX_FUEL, "wasm.fuel is out of range", "use 1 to 2^63")


class SandboxSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All that a caller may ask of a new sandbox.

    With `command`, the sandbox lives as long as that command; without, until it is killed or its
    `timeout_s` (seconds, wall clock, from start) passes. In a record, `resources` are the limits that hold.
    A `snapshot`, by id or name, brings its own template, and `template` then counts for nothing.

    `stop_signal` (a name or number) and `stop_grace_s` (seconds) say how it is ended gracefully; what is left out is
    the template's, then TERM and 10 s. With a grace of its own or its template's, a time limit ends it gracefully too:
    the signal then comes that long before the limit, which nothing outlives.

    `contract` says what may be reached where `network` is ``contract``; `publish` shows ports of it on the host.

    `idle_s`: it is hibernated after so many seconds of idleness, and wakes when something is asked of it.
    `secrets`: by name only; values never become part of a spec or record.
    `security`: how it is hardened besides; in a record, the template's part too. `record_calls`: each system call that
    is made in it is noted.
    """

    template: str = "host"
    snapshot: str = ""
    isolation: Isolation = Isolation.AUTO
    command: ExecSpec | None = None
    resources: ResourceRequest = ResourceRequest()
    timeout_s: float | None = None
    env: dict[str, str] = {}
    workdir: str = ""
    mounts: tuple[Mount, ...] = ()
    network: Network = Network.NONE
    contract: Contract | None = None
    publish: tuple[Publish, ...] = ()
    wasm: Wasm | None = None
    name: str = ""
    labels: dict[str, str] = {}
    stop_signal: str = ""
    stop_grace_s: float | None = None
    idle_s: float | None = None
    secrets: tuple[SecretUse, ...] = ()
    security: SecurityConfig | None = None
    record_calls: bool = False

    def __post_init__(self) -> None:
        if self.name:
            check_name(self.name)
        no_nul(self.snapshot, "snapshot")
        check_env(self.env)
        no_nul(self.workdir, "workdir")
        require(
            not self.workdir or self.workdir.startswith("/"),
            f"workdir {self.workdir!r} is not absolute",
            "begin it with /",
        )
        check_time_limit(self.timeout_s)
        check_stop(self.stop_signal, self.stop_grace_s, self.timeout_s)
        check_idle(self.idle_s)
        check_labels(self.labels)
        by_contract = self.network is Network.CONTRACT
        require(
            by_contract == (self.contract is not None),
            "the request has a contract and another network" if self.contract else "the network's contract is missing",
            'give "contract" together with "network": "contract"',
        )
        require(
            len(self.publish) <= MAX_PUBLISHED, f"{len(self.publish)} ports are to be published",
            f"publish at most {MAX_PUBLISHED}",
        )  # fmt: skip
        for one in self.publish:
            exposed = self.contract is None or self.contract.exposes(one.guest)
            require(exposed, f"port {one.guest} is published, but not exposed", "add it to exposed_ports")
        check_uses(self.secrets, has_command=self.command is not None)
        for mount in self.mounts:
            check_mount(mount)


class ExitStatus(msgspec.Struct, frozen=True):
    """How a process ended: `code` 0..255 when it exited, else `signal` is the number that killed it."""

    code: int
    signal: int = 0
    user_ms: float = 0.0
    system_ms: float = 0.0
    peak_memory_bytes: int = 0

    @property
    def shell_status(self) -> int:
        """The status a shell would show: the code, or 128 + signal."""
        return 128 + self.signal if self.signal else self.code


class SandboxRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one sandbox. Times are Unix seconds (UTC); durations are milliseconds.

    `saved`: the digest of its memory on disk while it is hibernated.
    """

    id: str
    tenant: str
    name: str
    template: str
    isolation: Isolation
    isolation_reason: str
    state: State
    spec: SandboxSpec
    created_at: float
    started_at: float | None = None
    ended_at: float | None = None
    start_ms: float | None = None
    warm: bool = False
    exit_code: int | None = None
    exit_signal: int | None = None
    reason: Reason | None = None
    message: str = ""
    saved: str = ""
    version: int = 0


class Stats(msgspec.Struct, frozen=True):
    """Use at one moment: bytes, processes and threads, CPU time in microseconds since start.

    `oom_kills` and `refused_forks`: how often its memory limit killed a process, and its process limit refused one.
    """

    memory_bytes: int = 0
    memory_peak_bytes: int = 0
    memory_limit_bytes: int = 0
    cpu_usec: int = 0
    pids: int = 0
    disk_bytes: int = 0
    oom_kills: int = 0
    refused_forks: int = 0


class FileInfo(msgspec.Struct, frozen=True):
    """One file in a sandbox. `kind`: file, dir, symlink, fifo, socket, char, block. `mode`: permission bits."""

    path: str
    kind: str
    size: int
    mode: int
    uid: int
    gid: int
    mtime: float
    link_target: str = ""


class FileEvent(msgspec.Struct, frozen=True):
    """A change below a watched path. `kind`: create, write, remove, rename, attrib, overflow."""

    kind: str
    path: str
