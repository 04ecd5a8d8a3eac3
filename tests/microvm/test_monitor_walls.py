"""What a monitor that is told paths can reach, with a program in its place that tries."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tartarus.guest.channel import channel_pair
from tartarus.model.errors import GuestFailed
from tartarus.runtimes.descriptors import close_all
from tartarus.runtimes.microvm import memory
from tartarus.runtimes.microvm.launcher import FIRST_UID, Ends, Launcher
from tartarus.runtimes.microvm.monitor import Confined, Monitor
from tartarus.runtimes.microvm.vmmapi import VmmApi

pytestmark = [pytest.mark.anyio, pytest.mark.needs("root", "landlock", "system-python")]
STAND_IN = Path(__file__).parent / "contract" / "standin.py"


@pytest.fixture
def place() -> Iterator[Path]:
    """Where homes are made, with the program beside them; its parents let every user through."""
    path = Path(tempfile.mkdtemp(prefix="tartarus-walls-", dir="/var/tmp"))
    path.chmod(0o711)
    (path / "homes").mkdir(mode=0o700)
    shutil.copy(STAND_IN, path / "firecracker")
    (path / "firecracker").chmod(0o755)
    (path / "secret").write_text("of the host")
    yield path
    assert os.listdir(path / "homes") == []
    shutil.rmtree(path)


@pytest.fixture
async def launcher() -> AsyncIterator[Launcher]:
    """The nursery of monitors."""
    made = await Launcher.open()
    yield made
    await made.close()


def files(place: Path) -> dict[str, int]:
    """What it is given: two memory files, a disk to read, a disk to write."""
    (place / "root.erofs").write_bytes(b"erofs image")
    (place / "root.erofs").chmod(0o444)
    sealed = memory.create(4096)
    os.pwrite(sealed, b"memory ", 0)
    memory.seal(sealed)
    scratch = os.open(place / "homes", os.O_TMPFILE | os.O_RDWR, 0o600)
    os.write(scratch, b"scratch")
    kernel = os.memfd_create("kernel", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(kernel, b"kernel!")
    memory.seal(kernel)
    return {"kernel": kernel, "scratch": scratch, "root": os.open(place / "root.erofs", os.O_RDONLY), "memory": sealed}


async def test_a_monitor_reaches_its_own_alone(place: Path, launcher: Launcher) -> None:
    """Its directory and what it was given, by name; no other file, no network, no rights, no other user."""
    given = files(place)
    argv = [str(place / "firecracker"), "--api-sock", "api.sock", str(place / "secret")]
    monitor = await Monitor.start(Confined(launcher, place / "homes"), argv, given, None)
    api = VmmApi(monitor.home, "api.sock")
    assert await api.call("GET", "/version") == {}
    into = os.memfd_create("found")
    monitor.home.take("found.json", 1024**2, into)
    found: dict[str, Any] = json.loads(os.pread(into, 1024**2, 0))
    uid = found["uid"][0]
    assert found["uid"] == [uid, uid, uid]
    assert uid >= FIRST_UID
    assert found["reads"] == {"kernel": "kernel!", "scratch": "scratch", "root": "erofs i", "memory": "memory "}
    assert found["writes"].pop("scratch") == "written"
    assert all(way == "PermissionError" for way in found["writes"].values())
    assert os.pread(given["scratch"], 7, 0) == b"monitor"
    assert set(found["foreign"].values()) == {"PermissionError"}
    assert found["makes"] == {"own-file": "made", "/var/tmp/tartarus-standin": "PermissionError"}
    assert found["above"] == "PermissionError"
    assert set(found["interfaces"]) <= {"lo", "sit0", "tunl0"}
    status = dict(line.split(":\t", 1) for line in found["status"].splitlines() if ":\t" in line)
    assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == int(status["CapBnd"], 16) == 0
    assert status["NoNewPrivs"] == "1"
    assert "the stand-in speaks" in monitor.output.text()
    assert await api.call("GET", "/make/early") == {"made": "made"}
    monitor.home.close_to_monitor()
    assert await api.call("GET", "/make/late") == {"made": "PermissionError"}
    monitor.home.open_to_monitor()
    assert await api.call("GET", "/make/asked-for") == {"made": "made"}
    assert await api.call("GET", "/grow") == {"grown": "OSError"}
    assert os.fstat(given["scratch"]).st_size < 1024
    await api.close()
    await monitor.end()


REOPENS = """
import os, socket, sys
def tried(number):
    try:
        with open(f"/proc/self/fd/{number}", "r+b") as file:
            file.write(b"theirs")
        return "written"
    except OSError as error:
        return type(error).__name__
socket.socket(fileno=3).send(" ".join(map(tried, sys.argv[1:])).encode())
"""


async def test_a_monitor_opens_again_only_what_it_is_to(place: Path, launcher: Launcher) -> None:
    """Its memory, when that was lent to it: not what it shares with others, and no disk."""
    names = ("lent", "own", "passed", "another")
    for name in names:
        (place / name).write_bytes(b"before")
        (place / name).chmod(0o600 if name == "own" else 0o666)
    sealed = memory.sealed("shared", b"before")
    fds = [*(os.open(place / name, os.O_RDONLY) for name in names), sealed]
    ends = Ends(*channel_pair())

    def arguments(numbers: list[int]) -> list[str]:
        return ["/usr/bin/python3", "-I", "-c", REOPENS, *map(str, numbers)]

    born = await launcher.start(arguments, ends, fds, None, reopened=[fds[0], fds[1], sealed])
    ends.theirs.close()
    ends.ours.settimeout(60)
    said = (await asyncio.to_thread(ends.ours.recv, 4096)).decode().split()
    assert said == ["written", "PermissionError", "PermissionError", "PermissionError", "PermissionError"]
    assert [os.pread(fd, 6, 0) for fd in fds] == [b"theirs", *[b"before"] * 4]
    ends.ours.close()
    close_all((born.pidfd, *fds))


async def test_each_monitor_is_another_user(place: Path, launcher: Launcher) -> None:
    """And what it leaves goes with it."""
    argv = [str(place / "firecracker"), str(place / "secret")]
    monitors = [await Monitor.start(Confined(launcher, place / "homes"), argv, {}, None) for _ in range(2)]
    assert len({monitor.home.uid for monitor in monitors}) == 2
    for monitor in monitors:
        (monitor.home.path / "left").mkdir()
        await monitor.end()


async def test_what_can_not_be_started(place: Path, launcher: Launcher) -> None:
    """A program that is missing, one that ends at once, one that never listens: told, and nothing stays."""
    with pytest.raises(GuestFailed, match="No such file"):
        await Monitor.start(Confined(launcher, place / "homes"), [str(place / "missing")], {}, None)
    argv = ["/bin/sh", "-c", "echo no such option: --api-sock; exit 1"]
    with pytest.raises(GuestFailed, match="no such option"):
        await Monitor.start(Confined(launcher, place / "homes"), argv, {}, None)
    starting = asyncio.create_task(Monitor.start(Confined(launcher, place / "homes"), ["/bin/sleep", "1000"], {}, None))
    await asyncio.sleep(0.2)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting


async def test_a_console_that_never_stops_is_bounded(place: Path, launcher: Launcher) -> None:
    """Its last words are kept, at a pace that costs the host little."""
    listen = "import socket; s = socket.socket(1); s.bind('api.sock'); s.listen(); s.accept()"
    script = f'exec 2>&1; /usr/bin/python3 -I -c "{listen}" & exec yes 0123456789abcdef'
    monitor = await Monitor.start(Confined(launcher, place / "homes"), ["/bin/sh", "-c", script], {}, None)
    await asyncio.sleep(0.3)
    assert 0 < len(monitor.output.text()) <= 4000
    assert len(monitor.output._held) <= 64 * 1024
    await monitor.end()
