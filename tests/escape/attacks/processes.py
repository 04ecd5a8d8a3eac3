"""Attacks on processes outside: the host's, the neighbour's, and one of the sandbox's own user."""

from __future__ import annotations

import ctypes
import fcntl
import os
import resource
import signal
import struct

from tests.escape.attack import inside
from tests.escape.kit import WORLD, asked, call, in_child, outcome

_SIGNALS = (0, signal.SIGTERM, signal.SIGKILL, signal.SIGSTOP, signal.SIGCONT, signal.SIGUSR1, signal.SIGSEGV)


def _outsiders() -> dict[str, int]:
    found = {
        "twin": WORLD["twin"],
        "daemon": WORLD["daemon_pid"],
        "neighbour": WORLD["neighbour"]["host_pid"],
        "init": 1,
    }
    if WORLD["level"] != "process":
        del found["init"]  # that number is its own guest agent here; guest/* attacks that
    return found


@inside(
    "processes/signals", tries="send signals to processes outside by every call there is", container="ESRCH",
    process="EPERM|ESRCH", twin=True,
)  # fmt: skip
def signals() -> dict[str, str]:
    info = struct.pack("<iii", 10, 0, -1) + bytes(116)
    found = {}
    for name, pid in _outsiders().items():
        for number in _SIGNALS:
            found[f"kill {name} {number}"] = asked("kill", pid, number)
            found[f"tkill {name} {number}"] = asked("tkill", pid, number)
            found[f"tgkill {name} {number}"] = asked("tgkill", pid, pid, number)
        found[f"group of {name}"] = asked("kill", -pid if pid > 1 else -0x7FFFFFFF, signal.SIGTERM)
        found[f"queue {name}"] = asked("rt_sigqueueinfo", pid, 10, info)
        found[f"queue thread {name}"] = asked("rt_tgsigqueueinfo", pid, pid, 10, info)
    return found


@inside(
    "processes/by-descriptor", tries="signal processes outside through a pidfd", container="ESRCH", process="EPERM",
    twin=True,
)  # fmt: skip
def by_descriptor() -> dict[str, str]:
    def attempt(pid: int, number: int) -> None:
        fd = call("pidfd_open", pid, 0)
        try:
            call("pidfd_send_signal", fd, number, None, 0)
        finally:
            os.close(fd)

    return {f"{name} {number}": outcome(attempt, pid, number)
            for name, pid in _outsiders().items() for number in (0, signal.SIGTERM, signal.SIGKILL)}  # fmt: skip


@inside(
    "processes/exists", tries="find out which processes the host has", container="ESRCH", process="visible", twin=True,
    note="Without a pid namespace the host's numbers are there: whether one is taken shows, and nothing more.",
)  # fmt: skip
def exists() -> dict[str, str]:
    def look(pid: int) -> str:
        answer = asked("kill", pid, 0)
        return "visible" if answer == "EPERM" else answer

    return {name: look(pid) for name, pid in _outsiders().items()}


@inside(
    "processes/owner-of-signals", tries="have the kernel signal a process outside when a pipe becomes readable",
    container="ESRCH", process="quiet|EPERM", twin=True,
    note="At process level the owner can be named, but Landlock drops the signal when it is sent.",
)  # fmt: skip
def owner_of_signals() -> dict[str, str]:
    def attempt(owner: int) -> None:
        reader, writer = os.pipe()
        fcntl.fcntl(reader, fcntl.F_SETOWN, owner)
        fcntl.fcntl(reader, 10, signal.SIGTERM)  # F_SETSIG
        fcntl.fcntl(reader, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
        os.write(writer, b"x")

    return {name: outcome(attempt, pid, succeeded="quiet") for name, pid in _outsiders().items()}


@inside("processes/trace", tries="trace a process, its own or another's", container="EPERM", process="EPERM", twin=True)
def trace() -> dict[str, str]:
    requests = {
        "attach": 16,
        "seize": 0x4206,
        "peek": 1,
        "poke": 4,
        "registers": 12,
        "kill": 8,
        "seccomp filter": 0x420C,
    }
    found = {"be traced": asked("ptrace", 0, 0, 0, 0)}
    for name, pid in {**_outsiders(), "parent": os.getppid(), "first": 1, "agent": WORLD["agent"]}.items():
        for request, number in requests.items():
            found[f"{request} {name}"] = asked("ptrace", number, pid, 0, 0)
    return found


@inside(
    "processes/memory", tries="read and write another process's memory by system call", container="EPERM", process="EPERM",
    twin=True,
)  # fmt: skip
def memory() -> dict[str, str]:
    buffer = ctypes.create_string_buffer(16)
    vector = struct.pack("<QQ", ctypes.addressof(buffer), 16)
    found = {}
    for name, pid in {**_outsiders(), "parent": os.getppid(), "first": 1, "agent": WORLD["agent"]}.items():
        found[f"read {name}"] = asked("process_vm_readv", pid, vector, 1, vector, 1, 0)
        found[f"write {name}"] = asked("process_vm_writev", pid, vector, 1, vector, 1, 0)
    return found


@inside(
    "processes/advise", tries="throw another process's memory out, reap it, compare it", container="ENOSYS", process="ENOSYS",
    twin=True,
)  # fmt: skip
def advise() -> dict[str, str]:
    def on_descriptor(name: str) -> None:
        fd = call("pidfd_open", os.getppid(), 0)
        call(name, fd, b"\0" * 16, 1, 21, 0) if name == "process_madvise" else call(name, fd, 0)

    return {
        "process_madvise": outcome(on_descriptor, "process_madvise"),
        "process_mrelease": outcome(on_descriptor, "process_mrelease"),
        "kcmp": asked("kcmp", os.getpid(), WORLD["twin"], 0, 0, 0),
        "move_pages": asked("move_pages", WORLD["twin"], 0, None, None, None, 0),
        "migrate_pages": asked("migrate_pages", WORLD["twin"], 1, b"\x01" + bytes(7), b"\x01" + bytes(7)),
    }


@inside(
    "processes/steal-descriptors",
    tries="take open files out of other processes",
    container="EPERM|ESRCH",
    process="EPERM",
    twin=True,
)
def steal_descriptors() -> dict[str, str]:
    def attempt(pid: int, number: int) -> None:
        fd = call("pidfd_open", pid, 0)
        call("pidfd_getfd", fd, number, 0)

    people = {**_outsiders(), "parent": os.getppid(), "first": 1, "agent": WORLD["agent"]}
    return {f"{name} {number}": outcome(attempt, pid, number)
            for name, pid in people.items() for number in (0, 3, 4)}  # fmt: skip


@inside(
    "processes/limits-of-others", tries="read and change resource limits of processes outside", container="ESRCH|EPERM",
    process="EPERM", twin=True,
)  # fmt: skip
def limits_of_others() -> dict[str, str]:
    pair = struct.pack("<QQ", 16, 16)
    found = {}
    for name, pid in _outsiders().items():
        found[f"read {name}"] = asked("prlimit64", pid, resource.RLIMIT_NOFILE, None, bytes(16))
        found[f"change {name}"] = asked("prlimit64", pid, resource.RLIMIT_NOFILE, pair, None)
    return found


@inside(
    "processes/scheduling-of-others", tries="slow down, pin or reschedule processes outside", container="ESRCH|EPERM",
    process="EPERM", twin=True,
)  # fmt: skip
def scheduling_of_others() -> dict[str, str]:
    attributes = struct.pack("<IIQiIQQQ", 48, 3, 0, 0, 0, 0, 0, 0)
    found = {}
    for name, pid in _outsiders().items():
        found[f"nice {name}"] = asked("setpriority", 0, pid, 19)
        found[f"nice group of {name}"] = asked("setpriority", 1, pid, 19)
        found[f"affinity {name}"] = asked("sched_setaffinity", pid, 8, b"\x01" + bytes(7))
        found[f"class {name}"] = asked("sched_setscheduler", pid, 3, b"\0" * 4)
        found[f"parameters {name}"] = asked("sched_setparam", pid, b"\0" * 4)
        found[f"attributes {name}"] = asked("sched_setattr", pid, attributes, 0)
        found[f"disk priority {name}"] = asked("ioprio_set", 1, pid, 3 << 13)
    return found


@inside(
    "processes/user-wide", tries="slow down every process of a user at once", container="own", process="EPERM",
    note="At container level the user is the sandbox's own; the host's processes are in no namespace that it reaches.", twin=True,
)  # fmt: skip
def user_wide() -> dict[str, str]:
    # In a container what matters is that the twin's priority, looked at afterwards, has not changed.
    held = "own" if WORLD["level"] == "container" else "escaped"
    return {
        "nice": outcome(call, "setpriority", 2, 0, 1, succeeded=held),
        "disk priority": outcome(call, "ioprio_set", 3, os.getuid(), 2 << 13 | 7, succeeded=held),
    }


@inside(
    "processes/robust-list", tries="find addresses in processes outside (futex lists)", container="ESRCH|EPERM",
    process="EPERM|ESRCH", twin=True,
)  # fmt: skip
def robust_list() -> dict[str, str]:
    return {name: asked("get_robust_list", pid, bytes(8), bytes(8)) for name, pid in _outsiders().items()}


@inside(
    "processes/groups", tries="move processes outside into another process group or session", container="ESRCH|EPERM",
    process="ESRCH|EPERM", twin=True,
)  # fmt: skip
def groups() -> dict[str, str]:
    found = {f"move {name}": asked("setpgid", pid, pid) for name, pid in _outsiders().items()}
    return found | {f"join {name}": asked("setpgid", 0, pid) for name, pid in _outsiders().items()}


@inside(
    "processes/wait",
    tries="wait for and reap processes outside",
    container="ECHILD|ESRCH",
    process="ECHILD|EPERM",
    twin=True,
)
def wait() -> dict[str, str]:
    def by_descriptor(pid: int) -> None:
        call("waitid", 3, call("pidfd_open", pid, 0), None, 1 | 4, None)

    found = {}
    for name, pid in _outsiders().items():
        found[f"wait4 {name}"] = asked("wait4", pid, None, 1 | 0x40000000, None)
        found[f"waitid {name}"] = asked("waitid", 1, pid, None, 1 | 4, None)
        found[f"waitid of a pidfd {name}"] = outcome(by_descriptor, pid)
    return found


@inside(
    "processes/parent-of-its-choice", tries="become a child of the agent's parent by CLONE_PARENT, with a deadly exit signal",
    container="held", process="held",
)  # fmt: skip
def parent_of_its_choice() -> str:
    # The kernel must take neither: the agent's next answer shows that it lives.
    flags = 0x8000 | signal.SIGKILL

    def attempt() -> str:
        for _ in range(8):
            if call("clone", flags, 0, 0, 0, 0) == 0:
                os._exit(0)
        return "held"

    return in_child(attempt)
