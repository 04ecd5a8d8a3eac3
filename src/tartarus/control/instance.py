"""One daemon per state directory: a lock that dies with its holder, and the step into the background."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from pathlib import Path

from tartarus.model.errors import DaemonUnavailable, TartarusError
from tartarus.model.settings import Settings

# How long a new daemon waits for one that is stopping.
HANDOVER_S = 20.0
_RETRY_S = 0.02


class AlreadyRunning(DaemonUnavailable):
    """Another daemon serves this state directory."""

    code = "already_running"


class InstanceLock:
    """Held for the daemon's life. The kernel drops it when the process ends, however it ends."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._fd = -1

    def acquire(self, handover_s: float = HANDOVER_S) -> None:
        """Become the one daemon, waiting for a predecessor that is stopping.

        Raises AlreadyRunning when one is serving, and DaemonUnavailable when the directory can't be used.
        """
        directory = self._settings.state_dir
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._fd = os.open(self._settings.lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise DaemonUnavailable(
                f"the state directory {directory} can't be used",
                why=error.strerror or str(error),
                fix="check its rights, or set TARTARUS_HOME to a directory of yours",
            ) from error
        deadline = time.monotonic() + handover_s
        while not self._try():
            if serving(self._settings.socket) or time.monotonic() > deadline:
                holder = read_pid(self._settings.pid_file)
                os.close(self._fd)
                raise AlreadyRunning(
                    f"a daemon already serves {directory}",
                    why=f"process {holder}" if holder else "",
                    fix="use it, or stop it with: tartarus down",
                )
            time.sleep(_RETRY_S)

    def record_pid(self) -> None:
        """Write this process' id where people and clients look for it. The lock, not this file, is the truth."""
        self._settings.pid_file.write_text(f"{os.getpid()}\n")

    def release(self) -> None:
        """Let a successor start."""
        self._settings.pid_file.unlink(missing_ok=True)
        os.close(self._fd)

    def _try(self) -> bool:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def serving(path: Path) -> bool:
    """Whether something accepts connections at that socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


def read_pid(path: Path) -> int | None:
    """The process id in a pid file, if there is one."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


class Background:
    """The way into the background, for a caller that waits until the daemon serves or has failed.

    `enter` forks twice: the caller's process waits for the word of the daemon, and returns with it; the
    daemon has no terminal, no parent that must reap it, and no standard streams.
    """

    def __init__(self) -> None:
        self._report = -1

    def enter(self) -> None:
        """Return only in the daemon; the calling process ends with status 0, or 125 and the error's line."""
        reader, writer = os.pipe2(os.O_CLOEXEC)
        child = os.fork()
        if child:
            os.close(writer)
            with os.fdopen(reader, "rb") as pipe:
                word = pipe.read()
            os.waitpid(child, 0)
            if word == b"ready":
                os._exit(0)
            os.write(2, (word or b"tartarus: the daemon ended before it was ready") + b"\n")
            os._exit(TartarusError.exit_status)
        os.close(reader)
        os.setsid()
        if os.fork():
            os._exit(0)
        self._report = writer
        os.chdir("/")
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        os.close(null)

    def ready(self) -> None:
        """Tell the waiting process that the daemon serves."""
        self._tell(b"ready")

    def failed(self, line: str) -> None:
        """Tell the waiting process why there is no daemon."""
        self._tell(line.encode())

    def _tell(self, word: bytes) -> None:
        if self._report >= 0:
            with contextlib.suppress(OSError):
                os.write(self._report, word)
            os.close(self._report)
            self._report = -1
