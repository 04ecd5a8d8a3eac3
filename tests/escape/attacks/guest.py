"""Attacks on what Tartarus itself puts into a sandbox: the guest agent, its channel, the warm interpreter."""

from __future__ import annotations

import array
import fcntl
import os
import signal
import socket
import stat

from tests.escape.arena import Arena, finish
from tests.escape.attack import inside, shipped, staged
from tests.escape.kit import ESCAPED, WORLD, asked, call, content, opened, outcome

from tartarus.model.sandbox import ExecSpec, Isolation


def _open_descriptors() -> list[int]:
    return [fd for fd in range(65536) if outcome(fcntl.fcntl, fd, fcntl.F_GETFD) == ESCAPED]


@inside(
    "guest/descriptors",
    tries="find descriptors that a command was not meant to have",
    container="0, 1, 2",
    process="0, 1, 2",
)
def descriptors() -> str:
    return ", ".join(str(fd) for fd in _open_descriptors())


def _print_descriptors() -> None:
    os.write(1, str(_open_descriptors()).encode())


@staged(
    "guest/descriptors-of-cold-commands", tries="find descriptors in a program that the agent itself starts, and in its shell",
    container="0, 1, 2", process="0, 1, 2",
)  # fmt: skip
async def descriptors_of_cold_commands(arena: Arena, level: Isolation) -> dict[str, str]:
    sandbox = await arena.sandbox(level)
    program = shipped(_print_descriptors) + "\n_print_descriptors()"
    # An option that only a start-up can honour: the warm interpreter refuses, and the agent starts a cold one.
    commands = {
        "python": ("python3", "-X", "utf8", "-c", program),
        "shell": ("/bin/sh", "-c", 'exec python3 -X utf8 -c "$0"', program),
    }
    found = {}
    for name, argv in commands.items():
        # Without a user id of its own a process-level sandbox is given no terminals.
        for tty in (False, True) if level is Isolation.CONTAINER or os.geteuid() == 0 else (False,):
            said = await finish(await sandbox.exec(ExecSpec(argv=argv, tty=tty)))
            found[f"{name}, {'terminal' if tty else 'pipes'}"] = said.out.decode().strip(" []\r\n")
    await sandbox.kill()
    return found


@inside(
    "guest/pass-descriptors", tries="pass a descriptor out, or take one in, over what it was given", container="ENOTSOCK",
    process="ENOTSOCK",
)  # fmt: skip
def pass_descriptors() -> dict[str, str]:
    def attempt(fd: int, receive: bool) -> None:
        end = socket.socket(socket.AF_UNIX, fileno=os.dup(fd)) if stat.S_ISSOCK(os.fstat(fd).st_mode) else None
        if end is None:
            call("recvmsg" if receive else "sendmsg", fd, bytes(56), 0)
        elif receive:
            end.recvmsg(1, 1024, socket.MSG_DONTWAIT)
        else:
            end.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))])

    return {f"{'take' if receive else 'pass'} over {fd}": outcome(attempt, fd, receive)
            for fd in (0, 1, 2) for receive in (False, True)}  # fmt: skip


@inside("guest/environment", tries="find the daemon's environment in its own", container="clean", process="clean")
def environment() -> dict[str, str]:
    expected = {"PATH", "HOME", "USER", "LANG", "LC_CTYPE", "TERM"}
    stray = set(os.environ) - expected
    secret = [name for name, value in os.environ.items() if WORLD["secret"] in value]
    own = b"" if WORLD["level"] == "process" else content("/proc/self/environ")
    return {
        "names": ", ".join(sorted(stray)) or "clean",
        "values": ESCAPED if secret else "clean",
        "start": ESCAPED if WORLD["secret"].encode() in own else "clean",
    }


@inside(
    "guest/signal-agent", tries="kill, stop and crash the guest agent with every signal", container="ignored",
    note="It is the first process of its pid namespace, and the kernel keeps what it does not handle from it. At process level "
    "see guest/kill-agent.",
)  # fmt: skip
def signal_agent() -> dict[str, str]:
    # Whether it still serves is asked after every attack.
    found = {f"signal {number}": outcome(os.kill, 1, number, succeeded="ignored") for number in range(1, 65)}
    found["as a thread"] = outcome(call, "tkill", 1, signal.SIGKILL, succeeded="ignored")
    return found


@inside(
    "guest/attach-agent", tries="read descriptors, memory and registers of the agent and the warm interpreter",
    container="EPERM|EACCES", process="EPERM|EACCES",
)  # fmt: skip
def attach_agent() -> dict[str, str]:
    def pidfd(pid: int, number: int) -> None:
        call("pidfd_getfd", call("pidfd_open", pid, 0), number, 0)

    found = {}
    for pid in {WORLD["agent"], os.getppid()}:
        for number in range(3, 8):
            found[f"descriptor {number} of {pid}"] = outcome(pidfd, pid, number)
        found[f"seize {pid}"] = asked("ptrace", 0x4206, pid, 0, 0)
        found[f"memory of {pid}"] = asked("process_vm_readv", pid, bytes(16), 1, bytes(16), 1, 0)
    return found


@inside(
    "guest/agent-channel", tries="open the agent's channel to the host through /proc", container="EACCES|ENOENT|ENXIO",
    process="EACCES",
)  # fmt: skip
def agent_channel() -> dict[str, str]:
    agent = WORLD["agent"]
    found = {}
    for number in range(3, 16):
        found[f"open {number}"] = outcome(os.open, f"/proc/{agent}/fd/{number}", os.O_RDWR)
        found[f"read link {number}"] = outcome(os.readlink, f"/proc/{agent}/fd/{number}")
    return found


@inside(
    "guest/own-files", tries="change the runner and the loader's settings that its template brought", container="own", process="EACCES",
    note="A container changes its own copies; clones/files shows that nobody else sees it.",
)  # fmt: skip
def own_files() -> dict[str, str]:
    own = "own" if WORLD["level"] != "process" else ESCAPED
    prefix = "" if WORLD["level"] != "process" else WORLD["layer"]
    found = {}
    for path in ("/opt/tartarus/runner.py", "/etc/passwd", "/etc/ld.so.cache"):
        found[path] = opened(prefix + path, os.O_WRONLY | os.O_APPEND, own)
    found["preload"] = opened("/etc/ld.so.preload", os.O_WRONLY | os.O_CREAT, own)
    return found
