"""Starts an agent that has a warm runner, as a clone would: fork, serve in the child, execve the agent.

Usage: fake_runner.py AGENT CHANNEL_FD BEHAVIOUR [ARGUMENT]. Behaviours are functions below: each is a
runner good or bad, so that tests can see what the agent makes of it.
"""

from __future__ import annotations

import array
import os
import signal
import socket
import struct
import sys
import time

ANSWER = struct.Struct("<IiI")
STARTED, EXITED, REFUSED = 1, 2, 3


def receive(sock: socket.socket) -> tuple[bytes, list[int]]:
    """The next request and its descriptors; ends with the agent."""
    data, ancillary, _, _ = sock.recvmsg(65536, socket.CMSG_SPACE(12), socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for _, _, rights in ancillary:
        fds.frombytes(rights)
    while len(data) < 4 or len(data) < 4 + struct.unpack_from("<I", data)[0]:
        more = sock.recv(65536)
        if not more:
            os._exit(0)
        data += more
    return data[4:], list(fds)


def become(sock: socket.socket, fds: list[int], text: bytes, code: int) -> None:
    """Take the program's place: say something, end."""
    os.setsid()
    for target, fd in enumerate(fds):
        os.dup2(fd, target)
    sock.send(ANSWER.pack(STARTED, os.getpid(), 0))
    os.write(1, text)
    os._exit(code)


def once(sock: socket.socket) -> None:
    payload, fds = receive(sock)
    become(sock, fds, b"warm %d\n" % len(payload), 9)


def forks(sock: socket.socket) -> None:
    while True:
        _, fds = receive(sock)
        if (pid := os.fork()) == 0:
            become(sock, fds, b"forked\n", 3)
        for fd in fds:
            os.close(fd)
        os.waitpid(pid, 0)
        sock.send(ANSWER.pack(EXITED, pid, 3 << 8))


def sleeps(sock: socket.socket) -> None:
    _, fds = receive(sock)
    os.setsid()
    for target, fd in enumerate(fds):
        os.dup2(fd, target)
    sock.send(ANSWER.pack(STARTED, os.getpid(), 0))
    time.sleep(1000)


def dies_after_fork(sock: socket.socket) -> None:
    _, fds = receive(sock)
    if os.fork() == 0:
        os.setsid()
        for target, fd in enumerate(fds):
            os.dup2(fd, target)
        sock.send(ANSWER.pack(STARTED, os.getpid(), 0))
        os.write(1, b"orphan\n")
        while os.getppid() != int(os.environ["AGENT"]):
            pass
        os._exit(5)
    os._exit(0)


def refuses(sock: socket.socket) -> None:
    while True:
        _, fds = receive(sock)
        for fd in fds:
            os.close(fd)
        sock.send(ANSWER.pack(REFUSED, 22, 0))


def loses_child(sock: socket.socket) -> None:
    receive(sock)
    sock.send(ANSWER.pack(EXITED, 12345, 9))
    time.sleep(1000)


def dies(sock: socket.socket) -> None:
    os._exit(1)


def dies_when_asked(sock: socket.socket) -> None:
    receive(sock)
    os._exit(1)


def slow(sock: socket.socket) -> None:
    """Answers only once a file appears."""
    _, fds = receive(sock)
    while not os.path.exists(sys.argv[4]):
        pass
    become(sock, fds, b"late\n", 0)


def nonsense(sock: socket.socket) -> None:
    sock.send(os.urandom(4096))
    time.sleep(1000)


def names_pid_1(sock: socket.socket) -> None:
    receive(sock)
    sock.send(ANSWER.pack(STARTED, 1, 0))
    time.sleep(1000)


def names_stranger(sock: socket.socket) -> None:
    receive(sock)
    sock.send(ANSWER.pack(STARTED, int(sys.argv[4]), 0))
    time.sleep(1000)


def never_reads(sock: socket.socket) -> None:
    time.sleep(1000)


def main() -> None:
    ours, theirs = socket.socketpair()
    os.environ["AGENT"] = str(os.getpid())
    pid = os.fork()
    if pid == 0:
        ours.close()
        os.close(int(sys.argv[2]))
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        globals()[sys.argv[3]](theirs)
    os.set_inheritable(ours.fileno(), True)
    options = [f"--channel={sys.argv[2]}", f"--runner={ours.fileno()}", f"--runner-pid={pid}", "--shared-pids"]
    os.execve(sys.argv[1], ["tartarus-guest", "agent", *options], {})


main()
