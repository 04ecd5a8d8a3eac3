"""Where a daemon keeps its state and listens, and its few limits; made once, at the edge, from the environment.

Nothing else reads the environment: every part is handed this object.
"""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from tartarus.model.errors import InvalidRequest
from tartarus.model.sandbox import Isolation
from tartarus.model.secrets import SecretGrant, SecretProvider

if TYPE_CHECKING:
    from collections.abc import Mapping

SOCKET_NAME = "tartarus.sock"
CONFIG_NAME = "config.yaml"
# sockaddr_un.sun_path is 108 bytes with its closing NUL; see unix(7).
MAX_SOCKET_PATH_BYTES = 107


class MicrovmMonitor(str, Enum):
    """Which virtual machine monitor runs microVMs; AUTO: the first that is installed and boots one here."""

    AUTO = "auto"
    QEMU = "qemu"
    FIRECRACKER = "firecracker"
    CLOUD_HYPERVISOR = "cloud-hypervisor"


class Settings(msgspec.Struct, frozen=True):
    """One daemon's places and limits. Paths are absolute; sizes are bytes, durations seconds.

    `ended_kept_s`: how long the records and logs of ended sandboxes are kept.
    `lamentations_kept_s`: how long failures are. `quarantine_kept_s`: how long closed cases of quarantine are.
    `upload_bytes`: the largest file that a client may send ahead of making a template.
    `memory_budget_bytes`: how much disk memory snapshots and hibernated sandboxes may take in all.
    `stop_grace_s`: how long a graceful stop waits for sandboxes and open requests.
    `enable_hypnos`: whether sandboxes may be hibernated.
    `isolation_floor`: the weakest level that any sandbox here may have. `config_file`: where the rest is said.
    `microvm_monitor`: what runs microVMs; `microvm_jailer`: Firecracker is started by its own jailer.
    `secret_providers`, `secret_grants`: where secrets are kept, and which may be asked for.
    `gvisor_platform`: what gVisor runs on; `auto` is KVM where a guest was seen to run on it.
    `audit_kept_s`, `audit_bytes`: how long, and how much of, the audit log is kept. `audit_witness`: where its
    checkpoints are taken besides: a file, an https address, or `syslog`.
    `network_name_servers`, `network_slots`, `network_ranges`: of sandboxes' networks; empty ones are the usual.
    """

    state_dir: Path
    socket: Path
    node_name: str = "local"
    log_bytes: int = 10 * 1024**2
    log_files: int = 3
    ended_kept_s: float = 7 * 86400.0
    lamentations_kept_s: float = 30 * 86400.0
    quarantine_kept_s: float = 90 * 86400.0
    upload_bytes: int = 16 * 1024**3
    stop_grace_s: float = 10.0
    isolation_floor: Isolation = Isolation.AUTO
    gvisor_platform: Literal["systrap", "kvm", "auto"] = "systrap"
    enable_hypnos: bool = True
    config_file: Path | None = None
    microvm_monitor: MicrovmMonitor = MicrovmMonitor.AUTO
    memory_budget_bytes: int = 64 * 1024**3
    microvm_jailer: bool = False
    audit_kept_s: float = 90 * 86400.0
    audit_bytes: int = 1024**3
    audit_witness: str = ""
    network_name_servers: tuple[str, ...] = ()
    network_slots: int = 512
    network_ranges: tuple[str, ...] = ()
    secret_providers: tuple[SecretProvider, ...] = ()
    secret_grants: tuple[SecretGrant, ...] = ()

    @classmethod
    def at(cls, state_dir: Path, socket: Path | None = None) -> Settings:
        """Settings for the state directory `state_dir`; the socket is below it unless given."""
        state_dir = Path(state_dir).absolute()
        socket = Path(socket).absolute() if socket is not None else state_dir / "run" / SOCKET_NAME
        size = len(str(socket).encode("utf-8", "surrogateescape"))
        if size > MAX_SOCKET_PATH_BYTES:
            raise InvalidRequest(
                f"the socket's path {str(socket)!r} is {size} bytes long",
                why=f"Unix sockets take at most {MAX_SOCKET_PATH_BYTES}",
                fix="choose a shorter TARTARUS_HOME or --socket",
            )
        return cls(state_dir=state_dir, socket=socket, config_file=state_dir / CONFIG_NAME)

    @classmethod
    def from_environment(cls, environ: Mapping[str, str], uid: int) -> Settings:
        """The settings of the daemon that user `uid`'s commands talk to.

        `TARTARUS_HOME` holds everything when it is set. Otherwise root has /var/lib/tartarus, /run/tartarus and
        /etc/tartarus, and a user the XDG state, runtime and configuration directories.
        """
        home = environ.get("TARTARUS_HOME", "")
        if home:
            return cls.at(Path(home).expanduser())
        if uid == 0:
            settings = cls.at(Path("/var/lib/tartarus"), Path("/run/tartarus") / SOCKET_NAME)
            return msgspec.structs.replace(settings, config_file=Path("/etc/tartarus") / CONFIG_NAME)
        state_home = environ.get("XDG_STATE_HOME", "")
        # The XDG specification: a relative path is to be ignored.
        base = Path(state_home) if state_home.startswith("/") else Path(environ.get("HOME", "/")) / ".local" / "state"
        state_dir = base / "tartarus"
        runtime = environ.get("XDG_RUNTIME_DIR", "")
        config_home = environ.get("XDG_CONFIG_HOME", "")
        config = Path(config_home) if config_home.startswith("/") else Path(environ.get("HOME", "/")) / ".config"
        settings = cls.at(state_dir, Path(runtime) / "tartarus" / SOCKET_NAME if runtime.startswith("/") else None)
        return msgspec.structs.replace(settings, config_file=config / "tartarus" / CONFIG_NAME)

    @property
    def database(self) -> Path:
        """The state database (SQLite)."""
        return self.state_dir / "state.db"

    @property
    def audit_dir(self) -> Path:
        """The audit log."""
        return self.state_dir / "audit"

    @property
    def lock_file(self) -> Path:
        """Held with flock(2) by the one daemon of this state directory."""
        return self.state_dir / "daemon.lock"

    @property
    def pid_file(self) -> Path:
        """The running daemon's process id."""
        return self.state_dir / "daemon.pid"

    @property
    def log_file(self) -> Path:
        """The daemon's log, JSON lines."""
        return self.state_dir / "daemon.log"

    @property
    def cache_dir(self) -> Path:
        """What can be made again: prepared templates."""
        return self.state_dir / "cache"

    @property
    def kernels(self) -> Path:
        """Guest kernels of the microVM level (`tartarus kernel install`)."""
        return self.state_dir / "kernels"
