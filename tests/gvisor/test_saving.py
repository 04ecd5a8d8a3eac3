"""A gVisor guest saved to files: it goes on, it is restored beside itself, it is refused where it does not belong."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from tests.node.conftest import TENANT, finish

from tartarus.guest.channel import GuestChannel, GuestExec, GuestProcess, SessionState
from tartarus.model.errors import GuestFailed, ImageRefused, InvalidState, NoSpace, TartarusError, Unsupported
from tartarus.model.sandbox import ExecSpec, Isolation, SandboxSpec
from tartarus.node.service import Node
from tartarus.runtimes.base import Guest, GuestRequest, Saved
from tartarus.runtimes.gvisor import saving
from tartarus.runtimes.gvisor.layout import IMAGE_FILES
from tartarus.runtimes.gvisor.runtime import GvisorRuntime

pytestmark = [pytest.mark.anyio, pytest.mark.needs("root", "cgroups", "runsc")]
MIB = 1024**2
COUNTER = "i=0; while :; do i=$((i+1)); echo $i > /work/count; sleep 0.01; done"


class Place:
    """A node's gVisor runtime, a template's snapshot there, and guests made by hand."""

    def __init__(self, node: Node, directory: Path) -> None:
        self.directory = directory
        runtime = node._levels.runtimes[Isolation.GVISOR]
        assert isinstance(runtime, GvisorRuntime)
        self.runtime = runtime
        assert node._levels.hierarchy is not None
        self.hierarchy = node._levels.hierarchy
        (self.snapshot,) = runtime._snapshots
        self.guests: list[Guest] = []
        self.state: SessionState | None = None

    async def guest(self, *, warm: bool = True) -> Guest:
        guest = await self.runtime.clone(self.snapshot, self.request(), warm=warm)
        self.guests.append(guest)
        await guest.ready()
        return guest

    def request(self, **changes: int) -> GuestRequest:
        resources = msgspec.structs.replace(self.snapshot.rootfs.template.resources, **changes)
        name = f"made-{os.urandom(5).hex()}"
        return GuestRequest(name, name, resources)

    async def save(self, guest: Guest, name: str, *, go_on: bool) -> tuple[Path, Saved]:
        """Save it quiet, as the node does; it is quiet afterwards unless it goes on."""
        where = self.directory / name
        where.mkdir(mode=0o700)
        self.state = await guest.channel.quiesce()
        saved = await guest.save(where, go_on=go_on)

        if go_on:
            guest.channel.go_on()
        return where, saved

    async def settled(self) -> None:
        """Nothing of a guest that ended is left: groups, and what runsc wrote down about it."""
        for guest in self.guests:
            await guest.destroy()
        state = Path(f"/proc/{self.snapshot.nursery.pid}/root/w/state")
        for _ in range(500):
            left = {path.name for path in state.iterdir() if "ready-" not in path.name}
            groups = [name for name in self.hierarchy.existing() if name.startswith("made-")]
            if not left and not groups:
                return
            await asyncio.sleep(0.02)
        raise AssertionError(f"left: {left} {groups}")

    async def restore(self, saved: Path, **changes: int) -> Guest:
        request = msgspec.structs.replace(self.request(**changes), session=self.state)
        guest = await self.runtime.restore(self.snapshot, saved, request)
        self.guests.append(guest)
        await guest.ready()
        guest.channel.go_on("detach")
        return guest


@pytest.fixture
async def place(node: Node, tmp_path: Path) -> AsyncIterator[Place]:
    await finish(
        await node.create(TENANT, SandboxSpec(isolation=Isolation.GVISOR, command=ExecSpec(argv=("python3", "-c", ""))))
    )
    place = Place(node, tmp_path)
    yield place
    for guest in place.guests:
        await guest.destroy()


async def _run(channel: GuestChannel, script: str) -> bytes:
    return await _output(channel.exec(GuestExec(argv=("/bin/sh", "-c", script), env={"PATH": "/usr/bin:/bin"})))


async def _output(process: GuestProcess) -> bytes:
    out = b""
    while (piece := await process.read()) is not None:
        out += piece[1]
    await process.wait()
    return out


async def _counting(guest: Guest) -> None:
    """Let a program of it count in a file, which nobody waits for."""
    script = f"setsid sh -c '{COUNTER}' >/dev/null 2>&1 & while [ ! -s /work/count ]; do sleep 0.01; done"
    await _run(guest.channel, script)


async def _counts_on(guest: Guest) -> None:
    at = await _count(guest)
    while await _count(guest) <= at:
        await asyncio.sleep(0.02)


async def _count(guest: Guest) -> int:
    # Empty for a moment, each time it is written.
    return int(await _run(guest.channel, "while [ ! -s /work/count ]; do :; done; cat /work/count") or 0)


@pytest.mark.parametrize("warm", [True, False])
async def test_a_saved_guest_goes_on_in_the_same_session(place: Place, warm: bool) -> None:
    guest = await place.guest(warm=warm)
    await _counting(guest)
    reader = guest.channel.exec(GuestExec(argv=("cat",), stdin=True))
    await reader.write_stdin(b"before ")
    was = guest.pid
    saved, told = await place.save(guest, "one", go_on=True)
    assert told.paused_ms > 0
    assert told.needs == place.runtime.needs(place.snapshot)
    assert guest.pid == was
    assert {path.name for path in saved.iterdir()} == {*IMAGE_FILES, saving.FILES, saving.FACTS}
    await reader.write_stdin(b"after")
    reader.close_stdin()
    assert await _output(reader) == b"before after"
    await _counts_on(guest)
    again, _ = await place.save(guest, "two", go_on=True)
    await _counts_on(guest)
    assert again != saved
    await guest.pause()
    await guest.resume()
    assert await _run(guest.channel, "echo on") == b"on\n"


async def test_many_are_restored_from_one(place: Place) -> None:
    guest = await place.guest()
    await _counting(guest)
    await _run(guest.channel, "echo own > /etc/machine-id; chmod 444 /etc/machine-id")
    saved, _ = await place.save(guest, "one", go_on=True)
    named = await _run(guest.channel, "hostname; cat /etc/machine-id")
    children = [await place.restore(saved) for _ in range(2)]
    names = [
        await _run(child.channel, "hostname; cat /etc/machine-id; chmod 400 /etc/machine-id") for child in children
    ]
    assert len({name for text in (*names, named) for name in text.split()}) == 6
    for path in saved.iterdir():
        path.unlink()
    for child in children:
        await _counts_on(child)
        await _run(child.channel, "echo $$ > /work/own")
    await _counts_on(guest)
    assert await _run(guest.channel, "ls /work") == b"count\n"


async def test_one_that_wrote_nothing_goes_on_in_a_runsc_that_waits(place: Place) -> None:
    guest = await place.guest()
    saved, _ = await place.save(guest, "one", go_on=True)
    while place.snapshot._ready is None:
        await asyncio.sleep(0.01)
    waiting = place.snapshot._ready.parts
    child = await place.restore(saved)
    assert child.pid == waiting.born.pid
    assert (await _run(child.channel, "echo own > /work/own; cat /work/own")) == b"own\n"
    assert await _run(child.channel, "hostname") != await _run(guest.channel, "hostname")


async def test_what_it_wrote_is_there_again(place: Place) -> None:
    guest = await place.guest()
    made = (
        "cd /work; mkdir -p d/e; echo one > d/a; ln d/a d/b; ln -s a d/l; chmod 751 d/e; echo two > 'sp ace';"
        " touch -d @1000000000 d/a; rm -r /var/tmp; head -c 100000 /dev/urandom > big; mkfifo pipe; rm -rf /srv; mkdir /srv"
    )
    look = (
        "cd /work; cat d/a d/b 'sp ace'; readlink d/l; stat -c '%n %a %u %g %h %F' d/* d pipe big; stat -c %Y d/a; sha256sum big;"
        " ls -d /var/tmp /srv 2>&1"
    )
    await _run(guest.channel, made)
    before = await _run(guest.channel, look)
    assert b"one\none\ntwo\n" in before
    saved, _ = await place.save(guest, "one", go_on=False)
    child = await place.restore(saved)
    assert await _run(child.channel, look) == before


async def test_an_open_deleted_file_is_found_before_it_ends_the_guest(place: Place) -> None:
    guest = await place.guest()
    script = "exec 3<>/work/x; echo kept >&3; rm /work/x; echo up; read go; exec 3>&-; echo closed; read go"
    process = guest.channel.exec(GuestExec(argv=("/bin/sh", "-c", script), stdin=True, env={"PATH": "/usr/bin:/bin"}))
    assert await process.read() == (1, b"up\n")
    with pytest.raises(Unsupported, match="/work/x"):
        await place.save(guest, "one", go_on=True)
    guest.channel.go_on()
    await process.write_stdin(b"go\n")
    assert await process.read() == (1, b"closed\n")
    await place.save(guest, "two", go_on=True)
    await process.write_stdin(b"go\n")
    assert (await process.wait()).code == 0


async def test_one_saved_to_end_can_be_resumed_or_destroyed(place: Place) -> None:
    guest = await place.guest()
    await _counting(guest)
    await place.save(guest, "one", go_on=False)
    changes = guest.changes()
    assert changes is not None
    count = (changes / "work/count").read_text()
    await guest.pause()
    await asyncio.sleep(0.05)
    assert (changes / "work/count").read_text() == count
    assert not guest.ended.done()
    await guest.resume()
    guest.channel.go_on()
    await _counts_on(guest)
    await place.save(guest, "two", go_on=False)
    await asyncio.wait_for(guest.destroy(), 10)
    assert guest.ended.done()


async def test_what_dies_while_it_is_saved_is_not_waited_for(place: Place) -> None:
    guest = await place.guest()
    saving_it = asyncio.ensure_future(place.save(guest, "one", go_on=True))
    while not (place.directory / "one" / "checkpoint.img").exists():
        await asyncio.sleep(0.001)
    os.kill(guest.pid, signal.SIGKILL)
    done = (await asyncio.wait_for(asyncio.gather(saving_it, return_exceptions=True), 30))[0]
    assert isinstance(done, TartarusError | tuple)
    await place.settled()


async def test_destroyed_while_it_is_saved(place: Place) -> None:
    for delay_s in (0.0, 0.03, 0.1):
        guest = await place.guest()
        saving_it = asyncio.ensure_future(place.save(guest, f"after-{delay_s}", go_on=True))
        await asyncio.sleep(delay_s)
        await asyncio.wait_for(guest.destroy(), 20)
        assert isinstance((await asyncio.gather(saving_it, return_exceptions=True))[0], TartarusError | tuple)
        assert guest.ended.done()
    await place.settled()


async def test_a_busy_or_paused_guest_is_not_saved(place: Place) -> None:
    guest = await place.guest()
    with pytest.raises(InvalidState, match="quiet"):
        await guest.save(place.directory, go_on=True)
    await guest.channel.quiesce()
    await guest.pause()
    with pytest.raises(InvalidState):
        await guest.save(place.directory, go_on=True)
    await guest.resume()
    guest.channel.go_on()
    assert await _run(guest.channel, "echo on") == b"on\n"


async def test_no_room_is_found_out_before_anything_ends(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    guest = await place.guest()
    monkeypatch.setattr(saving, "_SPARE_BYTES", 1 << 60)
    with pytest.raises(NoSpace, match="room"):
        await place.save(guest, "one", go_on=True)
    guest.channel.go_on()
    assert await _run(guest.channel, "echo on") == b"on\n"


async def test_a_directory_that_can_not_be_written_to_costs_nothing(place: Place) -> None:
    guest = await place.guest()
    (place.directory / "one").mkdir()
    (place.directory / "one" / "checkpoint.img").write_text("somebody's")
    await guest.channel.quiesce()
    with pytest.raises(GuestFailed, match="can't be saved"):
        await guest.save(place.directory / "one", go_on=True)
    guest.channel.go_on()
    assert await _run(guest.channel, "echo on") == b"on\n"


async def test_files_that_can_not_be_kept_do_not_end_the_guest(place: Place) -> None:
    guest = await place.guest()
    await _run(guest.channel, "echo x > /work/.wh.x")
    with pytest.raises(GuestFailed, match="deletion"):
        await place.save(guest, "one", go_on=False)
    guest.channel.go_on()
    assert await _run(guest.channel, "cat /work/.wh.x") == b"x\n"


@pytest.mark.parametrize("harm", ["cut", "noise", "gone", "link", "facts", "huge facts", "address", "files"])
async def test_a_damaged_set_is_refused_or_its_guest_ends(place: Place, harm: str) -> None:
    guest = await place.guest()
    await _counting(guest)
    saved, _ = await place.save(guest, "one", go_on=False)
    if harm == "cut":
        os.truncate(saved / "pages.img", (saved / "pages.img").stat().st_size // 2)
    elif harm == "noise":
        (saved / "checkpoint.img").write_bytes(os.urandom(200_000))
    elif harm == "gone":
        (saved / "pages_meta.img").unlink()
    elif harm == "link":
        (saved / "pages.img").unlink()
        (saved / "pages.img").symlink_to("/etc/shadow")
    elif harm == "facts":
        (saved / saving.FACTS).write_text('{"pids": 1, "mounts": ["/etc"], "more": 1}')
    elif harm == "address":
        facts = json.loads((saved / saving.FACTS).read_text())
        (saved / saving.FACTS).write_text(json.dumps(facts | {"addresses": ["192.0.2.1", "127.0.0.1"]}))
    elif harm == "huge facts":
        (saved / saving.FACTS).write_bytes(b"[" * 10_000_000)
    else:
        (saved / saving.FILES).write_bytes((saved / saving.FILES).read_bytes().replace(b"count", b"../co"))
    with pytest.raises((ImageRefused, GuestFailed)):
        await place.restore(saved)
    await guest.destroy()
    await place.settled()


async def test_what_can_not_change_is_refused(place: Place) -> None:
    guest = await place.guest()
    await _run(guest.channel, "head -c 9000000 /dev/zero > /work/big")
    saved, _ = await place.save(guest, "one", go_on=False)
    pids = place.snapshot.rootfs.template.resources.pids
    with pytest.raises(Unsupported, match="process limit"):
        await place.restore(saved, pids=pids + 1)
    with pytest.raises(NoSpace):
        await place.restore(saved, disk_bytes=MIB)
    facts = json.loads((saved / saving.FACTS).read_text())
    (saved / saving.FACTS).write_text(json.dumps(facts | {"addresses": ["192.0.2.1"]}))
    with pytest.raises(Unsupported, match="has a network if it had one"):
        await place.restore(saved)
