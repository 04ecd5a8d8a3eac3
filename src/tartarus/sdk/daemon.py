"""Reaching the daemon: connect to its socket, and start it when nobody listens there.

Ten clients at once start one: they queue at a lock beside the daemon's state, and whoever comes second finds
the socket served. The daemon steps into the background by itself and its starter returns
once it serves, or prints the one line that says why it can't.
"""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

from tartarus.model.errors import DaemonUnavailable, PermissionRefused, TimeLimit

if TYPE_CHECKING:
    from tartarus.sdk.places import Places

START_S = 60.0
_LOG_TAIL_LINES = 3


def connect(places: Places, *, start: bool = True) -> socket.socket:
    """A connection to the daemon, which is started first if need be and `start` allows it.

    Raises DaemonUnavailable or PermissionRefused.
    """
    connection = try_connect(places)
    if connection is None:
        if not start:
            raise DaemonUnavailable(
                "the daemon is not running", why=f"nobody listens at {places.socket}", fix="start it with: tartarus up"
            )
        start_daemon(places)
        connection = try_connect(places)
        if connection is None:
            raise _died(places, "it ended right after it had started")
    return connection


def try_connect(places: Places) -> socket.socket | None:
    """A connection, or None when no daemon listens."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(places.socket)
    except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError):
        connection.close()
        return None
    except PermissionError as error:
        connection.close()
        raise PermissionRefused(
            f"you may not use the daemon at {places.socket}",
            why="it is another user's",
            fix="unset TARTARUS_HOME, or become that user",
        ) from error
    except OSError as error:
        connection.close()
        raise DaemonUnavailable(f"can't connect to {places.socket}", why=error.strerror or str(error)) from error
    return connection


def start_daemon(places: Places) -> bool:
    """Start the daemon and wait until it serves; False when another client has just done so."""
    import fcntl

    try:
        os.makedirs(places.state_dir, mode=0o700, exist_ok=True)
        lock = os.open(os.path.join(places.state_dir, "start.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise DaemonUnavailable(
            f"the state directory {places.state_dir} can't be used",
            why=error.strerror or str(error),
            fix="check its rights, or set TARTARUS_HOME to a directory of yours",
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        connection = try_connect(places)
        if connection is not None:
            connection.close()
            return False
        _spawn(places)
        return True
    finally:
        os.close(lock)


def _spawn(places: Places) -> None:
    import subprocess
    import sys

    arguments = ["--state-dir", places.state_dir, "--socket", places.socket]
    command = [sys.executable, "-m", "tartarus.control.daemon", *arguments]
    try:
        # Its own session at once: Ctrl-C in this terminal is for us, not for a daemon that is starting.
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            start_new_session=True, timeout=START_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise _died(places, f"it did not serve within {START_S:.0f} s") from error
    except OSError as error:
        raise DaemonUnavailable("the daemon did not start", why=f"{sys.executable}: {error.strerror}") from error
    if done.returncode != 0:
        lines = [line for line in done.stderr.decode("utf-8", "replace").splitlines() if line.strip()]
        why = lines[-1].removeprefix("tartarus: ") if lines else f"it ended with status {done.returncode}"
        raise _died(places, why)


def _died(places: Places, why: str) -> DaemonUnavailable:
    tail = log_tail(places)
    why = f"{why}; its log ends: {tail}" if tail else why
    return DaemonUnavailable("the daemon did not start", why=why, fix=f"see {places.log_file}")


def log_tail(places: Places) -> str:
    """The last messages of the daemon's log, on one line."""
    import json

    try:
        with open(places.log_file, "rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - 8192))
            lines = log.read().decode("utf-8", "replace").splitlines()[-_LOG_TAIL_LINES:]
    except OSError:
        return ""
    shown = []
    for line in lines:
        try:
            entry = json.loads(line)
            shown.append(str(entry.get("event", line)) if isinstance(entry, dict) else line)
        except ValueError:
            shown.append(line)
    return " | ".join(shown)[:500]


def stop(places: Places, timeout_s: float) -> bool:
    """Ask the daemon, of whatever version, to stop, and wait until its process is gone; False when none runs.

    Raises TimeLimit when it takes longer than `timeout_s`.
    """
    import select
    import struct

    from tartarus.sdk import calls
    from tartarus.sdk.transport import Transport

    connection = try_connect(places)
    if connection is None:
        return False
    with connection:
        pid = struct.unpack("iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
    try:
        process = os.pidfd_open(pid)
    except OSError:
        return False  # it went away between the two calls
    try:
        Transport(places, start=False, any_version=True).call(calls.shutdown())
        poller = select.poll()
        poller.register(process, select.POLLIN)
        if not poller.poll(timeout_s * 1e3):
            raise TimeLimit(
                f"the daemon (process {pid}) did not stop within {timeout_s:g} s", fix=f"see {places.log_file}"
            )
    finally:
        os.close(process)
    return True
