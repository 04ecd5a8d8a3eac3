"""Bytes that no host of ours would send: the agent ends at once, and everything in the sandbox with it."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator

import pytest

from tartarus.guest.protocol import (
    HEADER,
    INPUT_WINDOW,
    U16_U16,
    U32,
    U32_U32,
    U32_U32_U32,
    ToGuest,
    ToHost,
    connect_payload,
    exec_payload,
    fixup_payload,
    frame,
    hello,
    read_payload,
    text,
    write_payload,
)

from .conftest import Agent

SLEEP = exec_payload(2, 24, 80, 1000, "/", ["sleep", "1000"], {"PATH": "/usr/bin:/bin"})
PAYLOADS = {
    ToGuest.EXEC: SLEEP,
    ToGuest.STAT: text("/nowhere"),
    ToGuest.LIST: text("/nowhere"),
    ToGuest.READ: read_payload("/nowhere", 0, 0, 0),
    ToGuest.WRITE: write_payload("/nowhere/at/all", 0, 0),
    ToGuest.MKDIR: text("/nowhere/at/all") + U32_U32.pack(0, 0),
    ToGuest.MOVE: text("/nowhere") + text("/nowhere/else"),
    ToGuest.REMOVE: text("/nowhere") + U32.pack(0),
    ToGuest.WATCH: text("/nowhere") + U32.pack(0),
    ToGuest.CONNECT: connect_payload(1),
    ToGuest.FIXUP: fixup_payload(0, b"x"),
}


@pytest.fixture
def wire(agent: Agent) -> Iterator[socket.socket]:
    with socket.socket(fileno=agent.fd) as sock:
        agent.fd = -1
        yield sock


def answers(sock: socket.socket) -> list[int]:
    """The types of all frames until the agent closes."""
    data = b""
    try:
        while more := sock.recv(65536):
            data += more
    except ConnectionResetError:
        pass
    kinds = []
    while len(data) >= HEADER.size:
        length, kind, *_ = HEADER.unpack_from(data)
        kinds.append(kind)
        data = data[HEADER.size + length :]
    return kinds


@pytest.mark.parametrize("kind", PAYLOADS)
def test_cut_payloads_end_the_session(wire: socket.socket, kind: ToGuest) -> None:
    wire.sendall(hello() + frame(kind, 1, PAYLOADS[kind][:-1]))
    assert answers(wire) in ([ToHost.READY], [])


@pytest.mark.parametrize("kind", PAYLOADS)
def test_payloads_with_something_left_over_end_the_session(wire: socket.socket, kind: ToGuest) -> None:
    wire.sendall(hello() + frame(kind, 1, PAYLOADS[kind] + b"x"))
    assert answers(wire) in ([ToHost.READY], [])


@pytest.mark.parametrize("kind", PAYLOADS)
def test_whole_payloads_are_answered(wire: socket.socket, kind: ToGuest) -> None:
    wire.sendall(hello() + frame(kind, 1, PAYLOADS[kind]))
    wire.shutdown(socket.SHUT_WR)
    assert set(answers(wire)) <= {ToHost.READY, ToHost.RESULT, ToHost.ERROR, ToHost.STARTED}


SETTLED = hello() + frame(ToGuest.EXEC, 1, SLEEP)
QUIET = SETTLED + frame(ToGuest.QUIESCE, 0, U32.pack(1))


@pytest.mark.parametrize(
    "nonsense",
    [
        b"\xff" * 100,
        b"GET / HTTP/1.1\r\n\r\n",
        frame(ToGuest.PING, 0, b"before the greeting"),
        frame(ToGuest.EXEC, 1, SLEEP),
        SETTLED + hello(),
        frame(ToGuest.HELLO, 0, U32.pack(2)),
        hello() + frame(ToGuest.EXEC, 0, SLEEP),
        SETTLED + frame(ToGuest.EXEC, 1, SLEEP),
        SETTLED + frame(ToGuest.STDIN, 2, b"x"),
        SETTLED + frame(ToGuest.SIGNAL, 7, U32_U32.pack(9, 0)),
        SETTLED + frame(ToGuest.SIGNAL, 1, U32.pack(9)),
        SETTLED + frame(ToGuest.RESIZE, 1, U16_U16.pack(1, 1) + b"x"),
        SETTLED + frame(ToGuest.CREDIT, 1),
        SETTLED + frame(ToGuest.CANCEL, 1),
        SETTLED + frame(ToGuest.WRITE_DATA, 1, b"x"),
        SETTLED + frame(ToGuest.WRITE_END, 1),
        SETTLED + frame(ToGuest.STDIN_EOF, 1, b"x"),
        SETTLED + frame(ToGuest.STDIN_EOF, 1) + frame(ToGuest.STDIN, 1, b"x"),
        SETTLED + frame(ToGuest.SHUTDOWN, 0),
        SETTLED + frame(ToGuest.SHUTDOWN, 1, U32.pack(0)),
        SETTLED + HEADER.pack(INPUT_WINDOW + 1, ToGuest.STDIN, 0, 0, 1),
        SETTLED + HEADER.pack(0xFFFFFFFF, ToGuest.EXEC, 0, 0, 2),
        SETTLED + frame(ToGuest.QUIESCE, 0),
        SETTLED + frame(ToGuest.QUIESCE, 1, U32.pack(1)),
        QUIET + frame(ToGuest.QUIESCE, 0, U32.pack(2)),
        QUIET + hello(),
        QUIET + frame(ToGuest.STDIN, 1, b"x"),
        QUIET + frame(ToGuest.SIGNAL, 1, U32_U32.pack(9, 0)),
        QUIET + frame(ToGuest.EXEC, 2, SLEEP),
        QUIET + frame(ToGuest.GO_ON, 0, U32.pack(0)),
        QUIET + frame(ToGuest.GO_ON, 0, U32_U32.pack(3, 0)),
        QUIET + frame(ToGuest.GO_ON, 0, U32_U32.pack(0, 1)),
        QUIET + frame(ToGuest.GO_ON, 0, U32_U32.pack(1, 0xFFFFFFFF)),
        QUIET + frame(ToGuest.GO_ON, 0, U32_U32.pack(1, 1) + U32.pack(2)),
        QUIET + frame(ToGuest.GO_ON, 0, U32_U32.pack(1, 2) + U32_U32.pack(1, 1)),
        QUIET + frame(ToGuest.GO_ON, 0, U32_U32.pack(0, 0)) * 2,
        SETTLED + frame(ToGuest.GO_ON, 0, U32_U32.pack(0, 0)),
        SETTLED + frame(ToGuest.HELLO, 0, U32_U32_U32.pack(1, 1, 1)),
        QUIET + frame(ToGuest.HELLO, 0, U32_U32_U32.pack(1, 1, 2)),
        QUIET + frame(ToGuest.HELLO, 0, U32_U32_U32.pack(1, 2, 1)),
        frame(ToGuest.HELLO, 0, U32_U32_U32.pack(1, 1, 0)),
        SETTLED + HEADER.pack(0, ToGuest.PING, 1, 0, 0),
        SETTLED + HEADER.pack(0, ToGuest.PING, 0, 1, 0),
        SETTLED + HEADER.pack(0, 0x7F, 0, 0, 2),
    ],
)
def test_nonsense_ends_the_session(wire: socket.socket, agent: Agent, nonsense: bytes) -> None:
    wire.sendall(nonsense)
    assert set(answers(wire)) <= {ToHost.READY, ToHost.STARTED, ToHost.QUIESCED}
    assert agent.process.wait(timeout=30) == 0
    assert agent.descendants() == set()


def test_more_input_than_granted_ends_the_session(wire: socket.socket) -> None:
    wire.sendall(SETTLED)
    for _ in range(3):
        try:
            wire.sendall(frame(ToGuest.STDIN, 1, bytes(INPUT_WINDOW)))
        except (BrokenPipeError, ConnectionResetError):
            break
    assert set(answers(wire)) <= {ToHost.READY, ToHost.STARTED}


def test_a_host_that_reads_nothing_makes_the_agent_wait_not_grow(wire: socket.socket, agent: Agent) -> None:
    wire.sendall(hello())
    wire.setblocking(False)
    pings = frame(ToGuest.PING, 0, bytes(4000)) * 16
    sent = 0
    try:
        while sent < 1 << 30:
            sent += wire.send(pings)
    except BlockingIOError:
        pass
    assert sent < 64 << 20
    with open(f"/proc/{agent.pid}/status", encoding="ascii") as status:
        peak_kib = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    assert peak_kib < 200 * 1024


def test_too_many_streams_are_refused_one_by_one(wire: socket.socket) -> None:
    watch = text("/") + U32.pack(0)
    wire.sendall(hello() + b"".join(frame(ToGuest.WATCH, stream, watch) for stream in range(1, 1200)))
    wire.shutdown(socket.SHUT_WR)
    kinds = answers(wire)
    assert kinds[0] == ToHost.READY
    assert ToHost.ERROR in kinds


def test_credit_does_not_overflow(wire: socket.socket) -> None:
    flood = exec_payload(0, 24, 80, 0xFFFFFFFF, "/", ["echo", "fine"], {"PATH": "/usr/bin:/bin"})
    wire.sendall(hello() + frame(ToGuest.EXEC, 1, flood))
    wire.sendall(frame(ToGuest.CREDIT, 1, struct.pack("<I", 0xFFFFFFFF)) * 100)
    data = b""
    while b"fine" not in data:
        data += wire.recv(65536)
