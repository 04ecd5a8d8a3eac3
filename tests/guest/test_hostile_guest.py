"""A guest that breaks the protocol, played over a socket: every breach closes the channel with one clear error."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator

import pytest

from tartarus.guest.channel import BootFailed, GuestChannel
from tartarus.guest.protocol import EXIT, HEADER, INPUT_WINDOW, READY, ToHost, text
from tartarus.model.errors import CommandNotFound, FileFailed, GuestFailed

from .conftest import command

pytestmark = pytest.mark.anyio
STARTED = struct.pack("<II", 42, 0)


def raw(kind: int, stream: int, payload: bytes = b"", flags: int = 0) -> bytes:
    return HEADER.pack(len(payload), kind, flags, 0, stream) + payload


class Liar:
    """The guest's end, in the hands of the test."""

    def __init__(self) -> None:
        host, self.sock = socket.socketpair()
        self.sock.setblocking(False)
        self.channel = GuestChannel(host)

    def say(self, *frames: bytes) -> None:
        self.sock.sendall(b"".join(frames))

    async def heard(self) -> bytes:
        """What the host has sent."""
        return await asyncio.get_running_loop().sock_recv(self.sock, 1 << 20)


@pytest.fixture
async def liar() -> AsyncIterator[Liar]:
    opened = Liar()
    await opened.channel.open()
    yield opened
    opened.channel.close()
    opened.sock.close()


async def test_end_of_file_fails_what_waits(liar: Liar) -> None:
    process = liar.channel.exec(command("x"))
    listing = asyncio.create_task(liar.channel.list("/"))
    ping = asyncio.create_task(liar.channel.ping())
    await asyncio.sleep(0)
    liar.sock.close()
    for waiting in (liar.channel.ready(), process.started(), process.wait(), process.read(), listing, ping):
        with pytest.raises(GuestFailed, match="went away"):
            await waiting
    assert isinstance(await liar.channel.closed, GuestFailed)
    with pytest.raises(GuestFailed):
        await liar.channel.exec(command("x")).started()
    with pytest.raises(GuestFailed):
        await liar.channel.stat("/")
    with pytest.raises(GuestFailed):
        await liar.channel.ping()


async def test_failure_to_boot(liar: Liar) -> None:
    process = liar.channel.exec(command("x"))
    liar.say(raw(ToHost.BOOT_FAILED, 0, struct.pack("<II", 7, 13)))
    with pytest.raises(BootFailed) as failed:
        await liar.channel.ready()
    assert (failed.value.step, failed.value.errno) == (7, 13)
    with pytest.raises(BootFailed):
        await process.started()


async def test_failure_to_boot_is_heard_though_the_guest_is_gone(liar: Liar) -> None:
    """The guest says why and exits at once; what the host sends by then can't be delivered."""
    liar.say(raw(ToHost.BOOT_FAILED, 0, struct.pack("<II", 3, 1)))
    liar.sock.close()
    liar.channel.exec(command("x"))
    with pytest.raises(BootFailed):
        await liar.channel.ready()


GREETING = raw(ToHost.READY, 0, READY.pack(1, 1, 0))
EXITED = EXIT.pack(0, 0, 0, 0, 0)


@pytest.mark.parametrize(
    "lie",
    [
        b"\xff" * 64,
        raw(ToHost.READY, 0, READY.pack(2, 1, 0)),
        GREETING + GREETING,
        GREETING + raw(ToHost.BOOT_FAILED, 0, struct.pack("<II", 7, 13)),
        raw(ToHost.PONG, 0, b"to nothing"),
        raw(ToHost.STOPPED, 0, b"\1\0\0\0"),
        raw(ToHost.FROZEN, 0, b"\1\0\0\0"),
        raw(ToHost.STARTED, 2, STARTED),
        raw(ToHost.STDOUT, 1, b"before the start"),
        raw(ToHost.STARTED, 1, STARTED) + raw(ToHost.STDOUT, 1, b"x" * 1001),
        raw(ToHost.STARTED, 1, STARTED) + raw(ToHost.ERROR, 1, struct.pack("<I", 2) + text("command")),
        raw(ToHost.ERROR, 1, struct.pack("<I", 2) + b"\xff\0\0\0"),
        raw(ToHost.ERROR, 1, struct.pack("<I", 2) + text("command") + b"x"),
        raw(ToHost.EXIT, 1, EXITED),
        raw(ToHost.STARTED, 1, STARTED) + raw(ToHost.EXIT, 1, EXIT.pack(256, 0, 0, 0, 0)),
        raw(ToHost.STARTED, 1, STARTED) + raw(ToHost.EXIT, 1, EXIT.pack(1, 9, 0, 0, 0)),
        raw(ToHost.STARTED, 1, STARTED) + raw(ToHost.EXIT, 1, EXIT.pack(0, 65, 0, 0, 0)),
        raw(ToHost.STARTED, 1, STARTED) + raw(ToHost.EXIT, 1, EXITED + b"two"),
        raw(ToHost.STDIN_CREDIT, 1, struct.pack("<I", 1)),
        raw(ToHost.FILE_DATA, 1, b"x"),
        raw(ToHost.RESULT, 1),
        raw(ToHost.EVENT, 1, text("create") + text("/x")),
        raw(ToHost.FORWARD_DATA, 1, b"x"),
    ],
)
async def test_lies_about_a_process(liar: Liar, lie: bytes) -> None:
    process = liar.channel.exec(command("x", window=1000))
    liar.say(lie)
    with pytest.raises(GuestFailed, match="broke its protocol"):
        await process.wait()
    assert liar.channel.closed.done()


async def test_kills_for_memory_are_counted(liar: Liar) -> None:
    """However many a guest speaks of, it is a number, and that of its own sandbox."""
    process = liar.channel.exec(command("x"))
    killed = EXIT.pack(0, 9, 0, 0, 0) + struct.pack("<I", 0xFFFF_FFFF)
    liar.say(raw(ToHost.STARTED, 1, STARTED) + raw(ToHost.EXIT, 1, killed))
    assert (await process.wait()).signal == 9
    assert liar.channel.memory_kills == 0xFFFF_FFFF


@pytest.mark.parametrize(
    "lie",
    [
        raw(ToHost.RESULT, 1, b"\xff" * 100),
        raw(ToHost.RESULT, 1, text("/x") + bytes(4 + 4 + 4 + 8 + 8) + text("")),
        raw(ToHost.RESULT, 1, flags=1),
        raw(ToHost.STDOUT, 1, b"x"),
        raw(ToHost.EXIT, 1, EXITED),
        raw(ToHost.RESULT, 1, b"x"),
    ],
)
async def test_lies_about_a_file(liar: Liar, lie: bytes) -> None:
    asking = asyncio.create_task(liar.channel.stat("/x"))
    await asyncio.sleep(0)
    liar.say(lie)
    with pytest.raises(GuestFailed, match="broke its protocol"):
        await asking


async def test_a_listing_without_end(liar: Liar) -> None:
    entry = text("n") + struct.pack("<IIIQq", 0o100644, 0, 0, 0, 0) + text("")
    page = raw(ToHost.RESULT, 1, entry * 1000, flags=1)
    asking = asyncio.create_task(liar.channel.list("/"))
    await asyncio.sleep(0)
    loop = asyncio.get_running_loop()
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        for _ in range(10_000):
            await loop.sock_sendall(liar.sock, page)
    with pytest.raises(GuestFailed, match="broke its protocol"):
        await asking


async def test_more_of_a_file_than_was_granted(liar: Liar) -> None:
    reading = liar.channel.read("/x")
    first = asyncio.ensure_future(anext(reading))
    await asyncio.sleep(0)
    loop = asyncio.get_running_loop()
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        for _ in range(100):
            await loop.sock_sendall(liar.sock, raw(ToHost.FILE_DATA, 1, bytes(200_000)))
    assert len(await first) > 0
    with pytest.raises(GuestFailed):
        async for _ in reading:
            pass


async def test_events_of_no_kind(liar: Liar) -> None:
    watch = liar.channel.watch("/x")
    liar.say(raw(ToHost.RESULT, 1), raw(ToHost.EVENT, 1, text("explode") + text("/x")))
    with pytest.raises(GuestFailed):
        await anext(watch)


async def test_errors_without_a_name(liar: Liar) -> None:
    asking = asyncio.create_task(liar.channel.stat("/x"))
    await asyncio.sleep(0)
    liar.say(raw(ToHost.ERROR, 1, struct.pack("<I", 0xFFFFFFFF) + text("\x1b[31m")))
    with pytest.raises(FileFailed):
        await asking


async def test_late_frames_of_a_finished_stream_are_ignored(liar: Liar) -> None:
    process = liar.channel.exec(command("x"))
    liar.say(raw(ToHost.STARTED, 1, STARTED), raw(ToHost.EXIT, 1, EXITED), raw(ToHost.STDOUT, 1, b"late"), GREETING)
    await liar.channel.ready()
    assert await process.read() is None
    assert (await process.wait()).code == 0


async def test_an_error_of_the_command_is_not_one_of_the_guest(liar: Liar) -> None:
    process = liar.channel.exec(command("x"))
    liar.say(raw(ToHost.ERROR, 1, struct.pack("<I", 2) + text("command")), GREETING)
    with pytest.raises(CommandNotFound):
        await process.started()
    await liar.channel.ready()


async def test_a_guest_that_grants_nothing_gets_no_more_than_its_window(liar: Liar) -> None:
    process = liar.channel.exec(command("x", stdin=True))
    writing = asyncio.create_task(process.write_stdin(bytes(10 * INPUT_WINDOW)))
    heard = 0
    while heard < INPUT_WINDOW:
        heard += len(await liar.heard())
    await asyncio.sleep(0)
    assert not writing.done()
    with pytest.raises(BlockingIOError):
        liar.sock.recv(1)
    writing.cancel()


async def test_a_guest_that_never_reads_is_given_up(liar: Liar) -> None:
    for _ in range(100):
        liar.channel.exec(command("x", "y" * 200_000))
    assert "does not read" in str(await liar.channel.closed)


async def test_cancelled_waits_leave_the_channel_usable(liar: Liar) -> None:
    process = liar.channel.exec(command("x"))
    for waiting in (process.started(), process.wait(), process.read(), liar.channel.stat("/x"), liar.channel.ready()):
        task = asyncio.create_task(waiting)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    liar.say(GREETING, raw(ToHost.STARTED, 1, STARTED), raw(ToHost.STDOUT, 1, b"out"), raw(ToHost.EXIT, 1, EXITED))
    assert await process.read() == (1, b"out")
    assert (await process.wait()).code == 0
