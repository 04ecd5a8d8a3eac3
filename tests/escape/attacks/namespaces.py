"""Attacks by namespaces: new ones, others', and what can be learned about them."""

from __future__ import annotations

import fcntl
import os
import signal
import struct

from tests.escape.attack import inside
from tests.escape.kit import WORLD, asked, call, in_child, opened, outcome

_KINDS = {
    "mnt": 0x00020000, "cgroup": 0x02000000, "uts": 0x04000000, "ipc": 0x08000000, "user": 0x10000000, "pid": 0x20000000,
    "net": 0x40000000, "time": 0x00000080,
}  # fmt: skip


@inside("namespaces/unshare", tries="leave into new namespaces of every kind", container="EPERM", process="EPERM")
def unshare() -> dict[str, str]:
    found = {kind: asked("unshare", flag) for kind, flag in _KINDS.items()}
    found["all"] = asked("unshare", sum(_KINDS.values()))
    found["user, upper half"] = asked("unshare", _KINDS["user"] | 1 << 32)
    return found


@inside(
    "namespaces/clone", tries="be born into new namespaces of every kind", container="EPERM", process="EPERM",
    note="The time namespace is left out: clone has no flag for it.",
)  # fmt: skip
def clone() -> dict[str, str]:
    def attempt(flags: int) -> str:
        def fork() -> None:
            if call("clone", flags | signal.SIGCHLD, 0, 0, 0, 0) == 0:
                os._exit(0)

        return in_child(lambda: outcome(fork))

    found = {kind: attempt(flag) for kind, flag in _KINDS.items() if kind != "time"}
    found["all"] = attempt(sum(_KINDS.values()) & ~_KINDS["time"])
    found["user, upper half"] = attempt(_KINDS["user"] | 1 << 40)
    return found


@inside("namespaces/clone3", tries="be born into namespaces or cgroups by the call whose arguments no filter sees",
        container="ENOSYS", process="ENOSYS")  # fmt: skip
def clone3() -> dict[str, str]:
    def arguments(flags: int) -> bytes:
        return struct.pack("<11Q", flags, 0, 0, 0, signal.SIGCHLD, 0, 0, 0, 0, 0, 0)

    flags = {**_KINDS, "into a cgroup": 0x200000000, "none": 0}
    return {name: asked("clone3", arguments(flag), 88) for name, flag in flags.items()}


@inside(
    "namespaces/enter",
    tries="enter namespaces by descriptor",
    container="EPERM|EACCES",
    process="EPERM|EACCES",
    twin=True,
)
def enter() -> dict[str, str]:
    def by_file(pid: str, kind: str) -> None:
        call("setns", os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY), 0)

    def by_process(pid: int) -> None:
        call("setns", call("pidfd_open", pid, 0), 0x7E020080 & ~0x10000000)

    found = {}
    for kind in ("mnt", "cgroup", "uts", "ipc", "user", "pid", "net", "time"):
        for pid in ("self", "1"):
            found[f"{kind} of {pid}"] = outcome(by_file, pid, kind)
    found["all of its parent"] = outcome(by_process, os.getppid())
    found["any"] = asked("setns", 0, 0)
    return found


@inside(
    "namespaces/walk", tries="walk from its own namespaces to their owners, parents and neighbours",
    container="EPERM|ENOTTY|EINVAL|ENOENT|EACCES", process="EPERM|ENOTTY|EINVAL|ENOENT|EACCES",
)  # fmt: skip
def walk() -> dict[str, str]:
    requests = {
        "owning user namespace": 0xB701, "parent": 0xB702, "next mount namespace": 0x8010B70B, "previous mount namespace": 0x8010B70C,
    }  # fmt: skip

    def attempt(kind: str, request: int) -> None:
        fd = os.open(f"/proc/self/ns/{kind}", os.O_RDONLY)
        found = fcntl.ioctl(fd, request, bytes(16)) if request >> 30 else fcntl.ioctl(fd, request)
        # The user namespace that owns its others is its own, and says nothing new.
        if isinstance(found, int) and os.fstat(found).st_ino == os.stat("/proc/self/ns/user").st_ino:
            raise OSError(1, "own")

    kinds = ("mnt", "cgroup", "uts", "ipc", "user", "pid", "net")
    return {f"{name} of {kind}": outcome(attempt, kind, request)
            for kind in kinds for name, request in requests.items()}  # fmt: skip


@inside(
    "namespaces/of-processes-outside", tries="get namespaces of processes outside through their pidfd", container="ESRCH",
    process="EPERM|EACCES|ENOTTY|EOPNOTSUPP|ESRCH", twin=True,
)  # fmt: skip
def of_processes_outside() -> dict[str, str]:
    def attempt(request: int) -> None:
        fcntl.ioctl(call("pidfd_open", WORLD["twin"], 0), request)

    return {f"request {number}": outcome(attempt, 0xFF00 + number)
            for number in range(1, 11)}  # fmt: skip


@inside(
    "namespaces/links", tries="name the namespaces of the host's processes", container="ENOENT|EACCES", process="EACCES|EPERM|ENOENT",
    twin=True,
)  # fmt: skip
def links() -> dict[str, str]:
    pids = [WORLD["twin"], WORLD["daemon_pid"]]
    return {f"{pid} {kind}": outcome(os.readlink, f"/proc/{pid}/ns/{kind}")
            for pid in pids for kind in ("mnt", "net", "user")}  # fmt: skip


@inside("namespaces/host-name", tries="change the host's name", container="EPERM", process="EPERM")
def host_name() -> dict[str, str]:
    name = os.uname().nodename
    return {
        "host name": asked("sethostname", name, len(name)),
        "domain name": asked("setdomainname", name, len(name)),
    }


@inside(
    "namespaces/cgroup", tries="find, enter, mount or change control groups", container="ENOENT|EPERM|EACCES|EROFS|hidden",
    process="EACCES|EPERM|ENOENT",
)  # fmt: skip
def cgroup() -> dict[str, str]:
    def own_path() -> str:
        said: list[str] = []

        def look() -> None:
            with open("/proc/self/cgroup") as file:
                said.extend(line.strip().split(":", 2)[2] for line in file)

        answer = outcome(look, succeeded="hidden")
        return answer if all(path == "/" for path in said) else "escaped"

    found = {"own path": own_path()}
    for name in ("cgroup.procs", "memory/cgroup.procs", "unified/cgroup.procs", "release_agent", "memory/release_agent", "pids/tasks",
                 "memory/memory.limit_in_bytes", "memory.max", "pids.max", "freezer/freezer.state", "devices/devices.allow"):  # fmt: skip
        found[name] = opened(f"/sys/fs/cgroup/{name}", os.O_WRONLY)
        found[f"read {name}"] = opened(f"/sys/fs/cgroup/{name}")
    found["make one"] = outcome(os.mkdir, "/sys/fs/cgroup/memory/mine")
    found["mount v1"] = asked("mount", "none", "/tmp", "cgroup", 0, "memory")
    found["mount v2"] = asked("mount", "none", "/tmp", "cgroup2", 0, None)
    found["release agent option"] = asked("mount", "none", "/tmp", "cgroup", 0, "memory,release_agent=/bin/true")
    return found
