"""Starts the egress proxy's process, in the router's network namespace.

It is forked by a nursery that is process 1 of a pid namespace: the kernel ends both when the daemon dies.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import sys

from tartarus.guest.program import Fd, Program
from tartarus.network.egress.proxy import Process
from tartarus.runtimes.container.layout import CLONE_NEWIPC, CLONE_NEWNET, CLONE_NEWNS, CLONE_NEWUTS
from tartarus.runtimes.microvm.launcher import FIRST_UID, UIDS, add_exec, add_limit, descriptor, open_nursery
from tartarus.runtimes.nursery import Clone, Nursery

PROXY_UID = FIRST_UID + UIDS
"""A user of its own, above those of the monitors."""
_MOST_FILES = 32768
_INSIDE = "tartarus.node.egress_inside"
_VARIABLES = ("PYTHONPATH", "LD_LIBRARY_PATH", "SSL_CERT_FILE")


class Confined:
    """A running proxy and the nursery that holds it."""

    def __init__(self, nursery: Nursery, process: Clone) -> None:
        self._nursery = nursery
        self._process = process
        self.pid = process.pid

    def kill(self) -> None:
        """End both at once; safe to repeat."""
        with contextlib.suppress(OSError):
            signal.pidfd_send_signal(self._process.pidfd, signal.SIGKILL)
        self._nursery.close()

    async def gone(self) -> None:
        """Wait until both have ended."""
        await self._nursery.gone()
        if self._process.pidfd >= 0:
            os.close(self._process.pidfd)
            self._process.pidfd = -1


async def launch(control: socket.socket, listening: list[socket.socket], namespace: int) -> Process:
    """Start one. Raises GuestFailed, NoSpace."""
    nursery = await open_nursery("the egress proxy")
    try:
        passed = [control.fileno(), *(sock.fileno() for sock in listening), namespace]
        flags = CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWUTS
        process = await nursery.clone(_program(len(listening)).encode(), flags, passed)
    except BaseException:
        nursery.close()
        await nursery.gone()
        raise
    return Confined(nursery, process)


def _program(listening: int) -> Program:
    program = Program()
    router = Fd(1 + listening)
    program.syscall("setns", router, CLONE_NEWNET, step="enter the router")
    program.syscall("close", router, step="let go of the router")
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    files = _MOST_FILES if hard == resource.RLIM_INFINITY else min(_MOST_FILES, hard)
    add_limit(program, resource.RLIMIT_NOFILE, files)
    numbers = [descriptor(index) for index in range(1 + listening)]
    argv = [sys.executable, "-P", "-m", _INSIDE, *map(str, (PROXY_UID, *numbers))]
    add_exec(program, argv, [f"{name}={os.environ[name]}" for name in _VARIABLES if name in os.environ])
    return program
