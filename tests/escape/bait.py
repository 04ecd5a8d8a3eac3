"""What the host lays out for attackers: files that anyone may read or change, doors that anyone may knock at.

All of it is open to every user of the host on purpose, so that only the sandbox's own walls stand before it,
never file modes. Every thing notices when it was touched.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from tartarus.guest.syscalls import number

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_IPC_CREAT, _IPC_RMID = 0o1000, 0
_KEYCTL_SETPERM, _KEYCTL_UNLINK, _KEYCTL_READ = 5, 9, 11
_KEY_SPEC_USER_KEYRING = -4
DAEMONS_GROUP = 4242
"""A group that the daemon is in, and that no sandbox may use."""


def _call(name: str, *args: int | bytes | ctypes.Array[ctypes.c_char] | None) -> int:
    result = int(_libc.syscall(ctypes.c_long(number(name)), *args))
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
    return result


class Bait:
    """Made once for all attacks. `secret` is in every place that must not be read from a sandbox."""

    def __init__(self, daemon_socket: Path) -> None:
        self.secret = f"tartarus-bait-{secrets.token_hex(12)}"
        self.directory = Path(tempfile.mkdtemp(prefix="tartarus-bait-", dir="/var/tmp"))
        self._undo = contextlib.ExitStack()
        self._undo.callback(shutil.rmtree, self.directory, ignore_errors=True)
        self._listeners: dict[str, socket.socket] = {}
        self._files()
        self._doors(daemon_socket)
        self._objects()

    def close(self) -> None:
        """Take everything away again."""
        self._undo.close()

    def _files(self) -> None:
        self.directory.chmod(0o777)
        for name, mode in (("readable", 0o644), ("writable", 0o666), ("private", 0o600)):
            path = self.directory / name
            path.write_text(self.secret + "\n")
            path.chmod(mode)
        group = self.directory / "group"
        group.write_text(self.secret + "\n")
        group.chmod(0o640)
        if os.geteuid() == 0:
            os.chown(group, -1, DAEMONS_GROUP)
        program = self.directory / "program"
        program.write_text(f"#!/bin/sh\necho {self.secret}\n")
        program.chmod(0o755)
        os.mkfifo(self.directory / "fifo")
        (self.directory / "fifo").chmod(0o666)
        (self.directory / "inner").mkdir(mode=0o777)
        (self.directory / "inner").chmod(0o777)
        self.shared_memory = Path("/dev/shm") / self.directory.name
        self.shared_memory.write_text(self.secret)
        self.shared_memory.chmod(0o666)
        self._undo.callback(self.shared_memory.unlink)

    def _doors(self, daemon_socket: Path) -> None:
        self._listen("tcp4", socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0))
        self._listen("udp4", socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0))
        with contextlib.suppress(OSError):  # a host may have no IPv6
            self._listen("tcp6", socket.AF_INET6, socket.SOCK_STREAM, ("::1", 0))
        self.abstract = f"\0{self.directory.name}"
        self._listen("abstract", socket.AF_UNIX, socket.SOCK_STREAM, self.abstract)
        self._listen("abstract-datagram", socket.AF_UNIX, socket.SOCK_DGRAM, self.abstract)
        for name, kind, path in (
            ("socket", socket.SOCK_STREAM, self.directory / "docker.sock"),
            ("datagram", socket.SOCK_DGRAM, self.directory / "syslog.sock"),
            ("daemon", socket.SOCK_STREAM, daemon_socket),
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            self._listen(name, socket.AF_UNIX, kind, str(path))
            path.chmod(0o666)
        self.daemon_socket = daemon_socket
        self._undo.callback(daemon_socket.unlink, missing_ok=True)

    def _listen(self, name: str, family: int, kind: int, address: Any) -> None:
        door = socket.socket(family, kind | socket.SOCK_NONBLOCK)
        self._undo.callback(door.close)
        door.bind(address)
        if kind == socket.SOCK_STREAM:
            door.listen(64)
        self._listeners[name] = door

    def _objects(self) -> None:
        self.segment = _call("shmget", 0, 4096, _IPC_CREAT | 0o666)
        self._undo.callback(_call, "shmctl", self.segment, _IPC_RMID, None)
        self.queue = _call("msgget", 0, _IPC_CREAT | 0o666)
        self._undo.callback(_call, "msgctl", self.queue, _IPC_RMID, None)
        self.semaphores = _call("semget", 0, 1, _IPC_CREAT | 0o666)
        self._undo.callback(_call, "semctl", self.semaphores, 0, _IPC_RMID, None)
        self.mq = self.directory.name
        before = os.umask(0)
        try:
            descriptor = _call("mq_open", self.mq.encode(), os.O_RDWR | os.O_CREAT, 0o666, None)
        finally:
            os.umask(before)
        os.close(descriptor)
        self._undo.callback(_call, "mq_unlink", self.mq.encode())
        payload = self.secret.encode()
        self.key = _call("add_key", b"user", self.mq.encode(), payload, len(payload), _KEY_SPEC_USER_KEYRING)
        self._undo.callback(_call, "keyctl", _KEYCTL_UNLINK, self.key, _KEY_SPEC_USER_KEYRING, 0, 0)
        _call("keyctl", _KEYCTL_SETPERM, self.key, 0x3F3F3F3F, 0, 0)

    def world(self) -> dict[str, Any]:
        """What an attacker is told, so that it has to guess nothing."""
        ports = {
            name: self._listeners[name].getsockname()[1] for name in ("tcp4", "udp4", "tcp6") if name in self._listeners
        }
        return {
            "secret": self.secret[:13],
            "bait": str(self.directory),
            "ports": ports,
            "abstract": self.abstract,
            "sockets": [str(self.directory / "docker.sock"), str(self.daemon_socket)],
            "datagram": str(self.directory / "syslog.sock"),
            "shared_memory": str(self.shared_memory),
            "segment": self.segment,
            "queue": self.queue,
            "semaphores": self.semaphores,
            "mq": self.mq,
            "key": self.key,
        }

    def touched(self) -> list[str]:
        """Doors that somebody knocked at since the last look."""
        knocked = []
        for name, door in self._listeners.items():
            try:
                if door.type == socket.SOCK_DGRAM:
                    door.recv(1)
                else:
                    door.accept()[0].close()
            except BlockingIOError:
                continue
            knocked.append(f"somebody reached the host's {name}")
        return knocked

    def state(self) -> dict[str, Any]:
        """Everything about the files and objects that an attack could change."""
        found: dict[str, Any] = {}
        for path in [self.directory, *sorted(self.directory.rglob("*")), self.shared_memory, self.daemon_socket]:
            status = path.lstat()
            found[str(path)] = (
                status.st_mode, status.st_uid, status.st_gid, status.st_nlink, status.st_size, status.st_mtime_ns,
                tuple(os.listxattr(path, follow_symlinks=False)), path.read_bytes() if path.is_file() else b"",
            )  # fmt: skip
        buffer = ctypes.create_string_buffer(256)
        size = _call("keyctl", _KEYCTL_READ, self.key, buffer, 256, 0)
        found["key"] = buffer.raw[:size]
        for kind, identifier in (("shm", self.segment), ("msg", self.queue), ("sem", self.semaphores)):
            lines = Path(f"/proc/sysvipc/{kind}").read_text(encoding="ascii").splitlines()
            found[f"SysV {kind}"] = [line for line in lines if line.split()[1] == str(identifier)]
        return found


class Twin:
    """A process outside every sandbox that runs as a sandbox's own user, with a secret in its environment and argv."""

    def __init__(self, uid: int, secret: str) -> None:
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", "sleep 600; exit 0", f"--token={secret}"],
            env={"PATH": "/usr/bin:/bin", "TOKEN": secret},
            user=uid if os.geteuid() == 0 else None,
            extra_groups=[] if os.geteuid() == 0 else None,
            start_new_session=True,
        )
        self.pid = self._process.pid

    def state(self) -> dict[str, Any]:
        """What another process could change about it."""
        limits = Path(f"/proc/{self.pid}/limits").read_text(encoding="ascii")
        status = Path(f"/proc/{self.pid}/status").read_text(encoding="ascii")
        kept = ("TracerPid", "SigPnd", "ShdPnd", "Cpus_allowed_list", "Seccomp")
        lines = tuple(line for line in status.splitlines() if line.split(":")[0] in kept)
        lines += ("stopped",) if "(stopped)" in status or "(tracing stop)" in status else ()
        nice = os.getpriority(os.PRIO_PROCESS, self.pid)
        score = Path(f"/proc/{self.pid}/oom_score_adj").read_text(encoding="ascii")
        return {"twin": (self._process.poll(), limits, lines, nice, os.sched_getscheduler(self.pid), score)}

    def close(self) -> None:
        """End it and what it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, 9)
        self._process.wait()
