"""An engine that lies, hangs, drips or floods: played by the test itself, on a real socket."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.compat.engine import rootfs

from tartarus.compat.docker import DockerRuntime
from tartarus.compat.docker_nouns import VersionAnswer
from tartarus.compat.engines import LegacyRequest, collect
from tartarus.compat.transfer import Export
from tartarus.compat.wire import EngineSlow, EngineSocket, check_socket, demultiplexed
from tartarus.model.errors import (
    ContainerNotFound,
    EngineFailed,
    InvalidRequest,
    MigrationRefused,
    TartarusError,
)

Answer = Callable[[socket.socket], None]


@contextlib.contextmanager
def liar(answer: Answer) -> Iterator[str]:
    """A server that gives every caller the same answer; the socket's path."""
    place = tempfile.mkdtemp(prefix="tt-liar-")
    path = f"{place}/e.sock"
    over = threading.Event()

    def serve(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.settimeout(20)
            connection.recv(65536)
            answer(connection)

    def listen() -> None:
        threads = []
        while not over.is_set():
            with contextlib.suppress(TimeoutError):
                connection, _ = listener.accept()
                threads.append(threading.Thread(target=serve, args=(connection,)))
                threads[-1].start()
        for thread in threads:
            thread.join()

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        listener.settimeout(0.05)
        thread = threading.Thread(target=listen)
        thread.start()
        try:
            yield path
        finally:
            over.set()
            thread.join()
            os.unlink(path)
            os.rmdir(place)


def says(content: bytes, status: str = "200 OK") -> Answer:
    head = f"HTTP/1.1 {status}\r\nContent-Length: {len(content)}\r\n\r\n".encode()
    return lambda connection: connection.sendall(head + content)


def floods(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n")
    while True:
        connection.sendall(b" " * (1 << 20))


def hangs(connection: socket.socket) -> None:
    connection.recv(1)  # until the other side gives up


def drips(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
    while True:
        connection.sendall(b" ")
        time.sleep(0.01)


def endless_head(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\n")
    while True:
        connection.sendall(b"X: " + b"y" * 60000 + b"\r\n")


def cut(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{}")


def cut_chunk(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\n{}")


@pytest.mark.parametrize(
    "answer",
    [
        floods, endless_head, cut, cut_chunk, says(b"[" * 1_000_000), says(b"{}{}"), says(b'{"Version": 1}'), says(b""),
        says(b"\xff\xfe"), says(b'{"message":"\x1b[2J"}', "500 No"), says(b"x" * (1 << 20), "500 No"),
        lambda connection: connection.sendall(b"\0" * 4096), lambda connection: connection.sendall(b"HTTP/1.1 -5 \r\n\r\n"),
        lambda connection: None,
    ],
)  # fmt: skip
def test_an_answer_that_is_none(answer: Answer) -> None:
    with liar(answer) as path, pytest.raises(EngineFailed) as caught:
        EngineSocket(path, "docker").read("GET", "/version", VersionAnswer, deadline_s=15)
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("answer", [hangs, drips])
def test_an_answer_that_does_not_come(answer: Answer) -> None:
    with liar(answer) as path:
        engine = EngineSocket(path, "docker")
        with pytest.raises(EngineSlow):
            engine.read("GET", "/version", VersionAnswer, deadline_s=0.3)
    assert not [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]


def test_what_is_not_there() -> None:
    with liar(says(b'{"message":"no such container"}', "404 Not Found")) as path, pytest.raises(ContainerNotFound):
        DockerRuntime(path).export_state("x")


@pytest.mark.parametrize(
    "content",
    [b"\x01\0\0\0\0\0\0\x05ab", b"\x01\0\0\0\0", b"\x09\0\0\0\0\0\0\1a", b"\1\1\1\1\0\0\0\1a", b"GET / HTTP/1.1\r\n"],
)
def test_frames_that_are_none(content: bytes) -> None:
    with pytest.raises(ValueError):
        list(demultiplexed(iter([content])))
    with pytest.raises(ValueError):
        list(demultiplexed(bytes([byte]) for byte in content))


def test_a_frame_of_gigabytes_is_not_held() -> None:
    def sent() -> Iterator[bytes]:
        yield b"\1\0\0\0" + (3 << 30).to_bytes(4, "big")
        for _ in range(3 << 10):
            yield b"x" * (1 << 20)

    out, err, truncated = collect(demultiplexed(sent()), 1000)
    assert (len(out), err, truncated) == (1000, b"", True)


def test_an_exec_or_a_container_with_a_path_for_an_id() -> None:
    with liar(says(b'{"Id":"../../containers/other"}')) as path:
        engine = DockerRuntime(path)
        with pytest.raises(TartarusError):
            engine.execute("x", ("true",), timeout_s=5, most_bytes=10)
        with pytest.raises(TartarusError):
            engine.create(LegacyRequest(image="box", token="t"))


@pytest.mark.parametrize("name", ["", "..", "a/b", "-x", "a b", "a\n", "a%2fb", "ä", "x" * 300, "a?b=c"])
def test_a_name_that_is_none_is_never_asked_for(name: str) -> None:
    with liar(hangs) as path:
        engine = DockerRuntime(path)
        for act in (engine.export_state, engine.start, engine.pause, engine.usage, engine.remove):
            with pytest.raises(InvalidRequest):
                act(name)


def exported(*pieces: bytes, most: int = 1 << 30) -> bytes:
    return b"".join(Export(contextlib.nullcontext(iter([iter(pieces)])), "docker", most).parts())


def test_an_archive_that_is_cut_off() -> None:
    whole = rootfs()
    whole = whole.rstrip(b"\0")
    whole += bytes(-len(whole) % 512 + 1024)
    assert exported(whole[:1000], whole[1000:]) == whole
    assert exported(*(whole[at : at + 700] for at in range(0, len(whole), 700))) == whole
    for short in (whole[:-512], whole[: len(whole) // 2], whole[:-1], b"", bytes(512)):
        with pytest.raises(EngineFailed):
            exported(short)


def test_an_archive_without_end() -> None:
    def endless() -> Iterator[bytes]:
        while True:
            yield b"x" * (1 << 20)

    with pytest.raises(MigrationRefused):
        for _ in Export(contextlib.nullcontext(iter([endless()])), "docker", 8 << 20).parts():
            pass


def test_letting_go_of_an_archive_lets_go_of_the_engine() -> None:
    left = []

    @contextlib.contextmanager
    def archive() -> Iterator[Iterator[Iterator[bytes]]]:
        try:
            yield iter([iter([b"a" * 2048, b"b"])])
        finally:
            left.append(True)

    export = Export(archive(), "docker")
    assert next(export.parts()) == b"a" * 1024
    export.close()
    assert left == [True]


def test_sockets_that_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (str(tmp_path / "file"), str(tmp_path / "missing"), str(tmp_path)):
        with pytest.raises(EngineFailed):
            check_socket(path, "docker")
    for path in ("tcp://1.2.3.4", "docker.sock", ""):
        with pytest.raises(InvalidRequest):
            check_socket(path, "docker")


@pytest.mark.needs("root")
def test_another_users_socket_is_refused() -> None:
    with liar(hangs) as path:
        os.chown(path, 1000, 1000)
        with pytest.raises(EngineFailed, match="another user"):
            check_socket(path, "docker")
