"""The Firecracker driver against its official API document, over real Unix sockets. No machine is booted here."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tests.microvm import kernels
from tests.microvm.contract.documents import Breach
from tests.microvm.contract.firecracker import DOCUMENT, FirecrackerServer
from tests.microvm.contract.guest import descriptors
from tests.microvm.contract.stage import Stage, parts, said

from tartarus.guest.channel import GuestChannel
from tartarus.model.errors import GuestFailed, Unsupported
from tartarus.runtimes.microvm import vmmapi
from tartarus.runtimes.microvm.firecracker import Firecracker
from tartarus.runtimes.microvm.home import Home
from tartarus.runtimes.microvm.launcher import FIRST_UID

pytestmark = [pytest.mark.anyio, pytest.mark.needs("root")]
MIB = 1024 * 1024


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage[FirecrackerServer]]:
    """Where monitors would start."""
    made = Stage(FirecrackerServer, tmp_path)
    yield made
    await made.close()


@pytest.fixture
def homes(tmp_path: Path) -> Path:
    """Where homes are made; all must be gone at the end of their machines."""
    place = tmp_path / "homes"
    place.mkdir()
    return place


async def test_boot_run_save_restore(stage: Stage[FirecrackerServer], homes: Path, tmp_path: Path) -> None:
    """Every request is one that the document allows, in an order that the monitor takes."""
    driver = Firecracker(stage, program="/usr/bin/firecracker")
    made = parts(tmp_path)
    machine = await driver.boot(made, None)
    assert stage.argv == [["/usr/bin/firecracker", "--api-sock", "api.sock"]]
    asked = [path for _, path, _ in stage.server.requests]
    assert asked == [
        "/machine-config",
        "/boot-source",
        "/drives/root",
        "/drives/scratch",
        "/vsock",
        "/entropy",
        "/actions",
    ]
    drives = {path: body for _, path, body in stage.server.requests if path.startswith("/drives/")}
    assert drives["/drives/root"]["is_read_only"] is True
    assert drives["/drives/scratch"]["is_read_only"] is False
    assert drives["/drives/scratch"]["rate_limiter"]["bandwidth"]["size"] > 0
    assert not any("mmds" in path or "network" in path for path in asked)
    words = stage.server.configured["/boot-source"]["boot_args"].split()
    assert {"tartarus.channel=vsock:1024", "disk.tartarus-root=vda", "disk.tartarus-scratch=vdb"} <= set(words)

    channel = GuestChannel(machine.channel)
    await channel.open()
    await channel.ready()
    assert await said(channel, "booted") == b"booted\n"
    await machine.pause()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(channel.ping(b"?"), 0.2)
    await machine.resume()
    assert await said(channel, "resumed") == b"resumed\n"

    state = os.memfd_create("state")
    await machine.save(state)
    assert os.pread(state, 100, 0).startswith(b"FC-STATE ")
    assert os.pread(made.memory, 12, 4096) == b"guest memory"
    machine.kill()
    await asyncio.wait_for(machine.ended, 10)
    channel.close()

    again = await driver.restore(parts(tmp_path, share=False), state, None)
    ((method, path, body),) = stage.server.requests
    assert (method, path) == ("PUT", "/snapshot/load")
    assert body == {"snapshot_path": "state", "mem_backend": {"backend_type": "File", "backend_path": "memory"},
                    "resume_vm": False}  # fmt: skip
    assert stage.server.state == "Paused"
    channel = GuestChannel(again.channel)
    await channel.open()
    await again.resume()
    await channel.ready()
    assert await said(channel, "restored") == b"restored\n"
    again.kill()
    await asyncio.wait_for(again.ended, 10)
    assert os.listdir(homes) == []


async def test_a_machine_that_is_saved_goes_on_with_the_same_channel(
    stage: Stage[FirecrackerServer], homes: Path, tmp_path: Path
) -> None:
    """The monitor breaks its connection; whoever holds the channel does not notice."""
    driver = Firecracker(stage, program="firecracker")
    machine = await driver.boot(parts(tmp_path), None)
    channel = GuestChannel(machine.channel)
    await channel.open()
    await channel.ready()
    for _ in range(2):
        await machine.pause()
        state = os.memfd_create("state")
        await machine.save_devices(state)
        assert os.fstat(state).st_size > 0
        await machine.resume()
        assert await said(channel, "still here") == b"still here\n"
    machine.kill()
    await machine.ended
    channel.close()


async def test_an_agent_that_takes_its_time(stage: Stage[FirecrackerServer], homes: Path, tmp_path: Path) -> None:
    """Connections that nobody takes yet are tried again."""
    stage.guest.refusals = 5
    machine = await Firecracker(stage, program="firecracker").boot(parts(tmp_path), None)
    assert stage.guest.refusals == 0
    machine.kill()
    await machine.ended
    machine.channel.close()


async def test_refusals_are_passed_on_in_the_monitors_words(
    stage: Stage[FirecrackerServer], homes: Path, tmp_path: Path
) -> None:
    """A bzImage is no kernel to Firecracker; nothing is left."""
    made = parts(tmp_path)
    (tmp_path / "kernel").write_bytes(kernels.bzimage(b"x"))
    before = descriptors()
    with pytest.raises(GuestFailed, match="Invalid Elf magic"):
        await Firecracker(stage, program="firecracker").boot(made, None)
    await asyncio.sleep(0.05)
    assert os.listdir(homes) == []
    await stage.server.close()
    assert descriptors() <= before + 5  # the copies that the stage made of the passed files
    with pytest.raises(Unsupported):
        await Firecracker(stage, program="firecracker").boot(parts(tmp_path, cpus=33), None)


async def slow(_reader: Any, _writer: Any) -> None:
    """It never answers."""
    await asyncio.sleep(1000)


async def closes(_reader: Any, writer: Any) -> None:
    """It hangs up."""
    writer.close()


async def garbage(_reader: Any, writer: Any) -> None:
    """It does not speak HTTP."""
    writer.write(os.urandom(4096))
    await writer.drain()


async def cut(_reader: Any, writer: Any) -> None:
    """It ends in the middle of an answer."""
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{")
    await writer.drain()
    writer.close()


async def huge(_reader: Any, writer: Any) -> None:
    """It never stops answering."""
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        writer.write(b"10000\r\n" + b"x" * 65536 + b"\r\n")
        await writer.drain()


async def huge_header(_reader: Any, writer: Any) -> None:
    """The same before the answer."""
    writer.write(b"HTTP/1.1 200 OK\r\n")
    while True:
        writer.write(b"X-Long: " + b"x" * 65536 + b"\r\n")
        await writer.drain()


async def elsewhere(_reader: Any, writer: Any) -> None:
    """It sends us somewhere else."""
    writer.write(b"HTTP/1.1 307 Temporary Redirect\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n")
    await writer.drain()


async def no_json(_reader: Any, writer: Any) -> None:
    """It answers with something else than JSON."""
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n[[[[[")
    await writer.drain()


async def deep(_reader: Any, writer: Any) -> None:
    """An error that is a tower of brackets."""
    writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 100000\r\n\r\n" + b"[" * 100_000)
    await writer.drain()


@pytest.mark.parametrize("way", [slow, closes, garbage, cut, huge, huge_header, elsewhere, no_json, deep])
@pytest.mark.parametrize("where", ["/boot-source", "/actions"])
async def test_a_monitor_that_misbehaves_is_ended(
    stage: Stage[FirecrackerServer], homes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: Any, where: str
) -> None:
    """Whatever it does: an error that says so, in time, and nothing of it stays."""
    monkeypatch.setattr(vmmapi, "CALL_TIMEOUT_S", 1.0)

    def misbehave(server: FirecrackerServer) -> None:
        server.misbehaves, server.misbehaves_at = way, where

    stage.before = misbehave
    with pytest.raises(GuestFailed) as failed:
        await asyncio.wait_for(Firecracker(stage, program="firecracker").boot(parts(tmp_path), None), 20)
    assert len(str(failed.value)) < 3000
    assert os.listdir(homes) == []
    assert stage.processes[0].wait(5) != 0


@pytest.mark.parametrize("answer", [b"NO\n", b"OK x\n", b"OK 1" + b"1" * 100, b"\n", b"HTTP/1.1 200 OK\r\n"])
async def test_a_handshake_that_is_none(
    stage: Stage[FirecrackerServer], homes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: bytes
) -> None:
    """Only `OK` and a port is a connection."""
    stage.guest.handshake = answer
    with pytest.raises(GuestFailed, match="misbehaves"):
        await Firecracker(stage, program="firecracker").boot(parts(tmp_path), None)


async def test_a_monitor_that_ends_is_told_with_its_last_words(
    stage: Stage[FirecrackerServer], homes: Path, tmp_path: Path
) -> None:
    """While its machine boots, and nobody could ever answer."""
    stage.guest.refusals = 10**9
    booting = asyncio.create_task(Firecracker(stage, program="firecracker").boot(parts(tmp_path), None))
    while not stage.processes or stage.server.state != "Running":
        await asyncio.sleep(0.01)
    stage.processes[0].kill()
    with pytest.raises(GuestFailed, match="monitor ended"):
        await asyncio.wait_for(booting, 10)
    assert os.listdir(homes) == []


async def test_foreign_things_in_a_home_are_refused(homes: Path, tmp_path: Path) -> None:
    """Sockets of others, links, pipes, devices, directories, and files larger than they may be."""
    home = Home(homes)
    home.belong_to(FIRST_UID)
    into = os.memfd_create("into")
    server = await asyncio.start_unix_server(lambda _r, _w: None, str(home.path / "root.sock"))
    (home.path / "link").symlink_to("/etc/passwd")
    (home.path / "directory").mkdir()
    os.mkfifo(home.path / "pipe")
    (home.path / "large").write_bytes(b"x" * 100)
    os.chown(home.path / "large", FIRST_UID, FIRST_UID)
    (home.path / "roots").write_bytes(b"x")
    (home.path / "led.sock").symlink_to(home.path / "root.sock")
    for name in ("root.sock", "led.sock", "large", "pipe"):
        with pytest.raises(GuestFailed, match="not a socket of its own"):
            home.connect(name)
    for name in ("link", "directory", "pipe", "large", "roots", "missing"):
        with pytest.raises(GuestFailed):
            home.take(name, 99, into)
    assert os.fstat(into).st_size == 0
    server.close()
    home.remove()
    assert os.listdir(homes) == []
    assert Path("/etc/passwd").exists()


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("PUT", "/machine-config", {"vcpu_count": 0, "mem_size_mib": 128}),
        ("PUT", "/machine-config", {"vcpu_count": 33, "mem_size_mib": 128}),
        ("PUT", "/machine-config", {"vcpu_count": 1}),
        ("PUT", "/machine-config", {"vcpu_count": 1, "mem_size_mib": "128"}),
        ("PUT", "/machine-config", {"vcpu_count": 1, "mem_size_mib": 128, "ht_enabled": False}),
        ("PUT", "/boot-source", None),
        ("PUT", "/drives/root", {"drive_id": "other", "is_root_device": False}),
        ("PUT", "/drives/root", {"drive_id": "root", "is_root_device": False, "io_engine": "io_uring"}),
        ("PUT", "/vsock", {"guest_cid": 2, "uds_path": "v"}),
        ("PATCH", "/boot-source", {"kernel_image_path": "k"}),
        ("PUT", "/vm", {"state": "Paused"}),
        ("PUT", "/nothing", {}),
    ],
)  # fmt: skip
async def test_the_document_is_strict(method: str, path: str, body: Any) -> None:
    """Or the tests above would prove nothing."""
    with pytest.raises(Breach):
        DOCUMENT.check(method, path, body)
