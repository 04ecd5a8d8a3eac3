"""Connections to servers in the sandbox, and the guest's session-level requests."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from tartarus.guest.channel import GuestChannel
from tartarus.model.errors import GuestFailed, InvalidState

pytestmark = pytest.mark.anyio
Serve = Callable[[socket.AddressFamily, Callable[[socket.socket], None]], int]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts a server for one connection on a loopback; returns its port."""
    threads: list[tuple[threading.Thread, socket.socket]] = []

    def start(family: socket.AddressFamily, handle: Callable[[socket.socket], None]) -> int:
        server = socket.create_server(("127.0.0.1" if family == socket.AF_INET else "::1", 0), family=family)

        def run() -> None:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                handle(connection)

        thread = threading.Thread(target=run)
        thread.start()
        threads.append((thread, server))
        port: int = server.getsockname()[1]
        return port

    yield start
    for thread, server in threads:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join()


def echo(connection: socket.socket) -> None:
    try:
        while data := connection.recv(65536):
            connection.sendall(data)
    except OSError:
        return


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
async def test_bytes_both_ways(guest: GuestChannel, serve: Serve, family: socket.AddressFamily) -> None:
    port = await guest.open_port(serve(family, echo))
    await port.write(b"hello")
    assert await port.read() == b"hello"
    port.close_write()
    assert await port.read() == b""
    with pytest.raises(InvalidState):
        await port.write(b"more")
    port.close()


async def test_much_both_ways_at_once(guest: GuestChannel, serve: Serve) -> None:
    port = await guest.open_port(serve(socket.AF_INET, echo))
    data = os.urandom(1 << 20) * 8

    async def feed() -> None:
        await port.write(data)
        port.close_write()

    feeding = asyncio.create_task(feed())
    received = bytearray()
    while piece := await port.read():
        received += piece
    await feeding
    assert received == data


async def test_half_closed(guest: GuestChannel, serve: Serve) -> None:
    got: list[bytes] = []

    def answer_at_the_end(connection: socket.socket) -> None:
        data = b""
        while more := connection.recv(65536):
            data += more
        connection.sendall(b"%d bytes" % len(data))

    def end_first(connection: socket.socket) -> None:
        connection.shutdown(socket.SHUT_WR)
        while more := connection.recv(65536):
            got.append(more)

    port = await guest.open_port(serve(socket.AF_INET, answer_at_the_end))
    await port.write(b"x" * 1000)
    port.close_write()
    assert await port.read() == b"1000 bytes"
    assert await port.read() == b""
    port = await guest.open_port(serve(socket.AF_INET, end_first))
    assert await port.read() == b""
    await port.write(b"still heard")
    port.close_write()
    while not got:
        await guest.ping()
    assert b"".join(got) == b"still heard"


async def test_a_peer_that_hangs_up_does_not_block_the_writer(guest: GuestChannel, serve: Serve) -> None:
    port = await guest.open_port(serve(socket.AF_INET, lambda connection: None))
    await port.write(bytes(8 << 20))
    assert await port.read() == b""


async def test_what_is_not_read_is_held_back(guest: GuestChannel, serve: Serve) -> None:
    done = threading.Event()

    def flood(connection: socket.socket) -> None:
        try:
            while not done.is_set():
                connection.sendall(bytes(65536))
        except OSError:
            return

    port = await guest.open_port(serve(socket.AF_INET, flood))
    for _ in range(50):
        await guest.ping()
    assert sum(map(len, port._pieces)) <= 256 * 1024
    done.set()
    port.close()


async def test_nobody_listens(guest: GuestChannel) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        free = server.getsockname()[1]
    with pytest.raises(InvalidState, match="refused"):
        await guest.open_port(free)
    with pytest.raises(InvalidState):
        await guest.open_port(0)


async def test_the_guest_goes_away(guest: GuestChannel, serve: Serve) -> None:
    port = await guest.open_port(serve(socket.AF_INET, echo))
    guest.close()
    with pytest.raises(GuestFailed):
        await port.read()
    with pytest.raises(GuestFailed):
        await port.write(b"x")


async def test_pings_come_back_in_order(guest: GuestChannel) -> None:
    await asyncio.gather(*(guest.ping(b"%d" % number) for number in range(100)), guest.ping(bytes(16384)))
    with pytest.raises(ValueError, match="at most"):
        await guest.ping(bytes(16385))


async def test_entropy_is_taken(guest: GuestChannel) -> None:
    clock, entropy = await guest.fixup(entropy=os.urandom(64))
    assert not clock
    assert entropy
    assert await guest.fixup() == (False, False)
