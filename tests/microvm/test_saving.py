"""A live machine written down and restored: what it had in memory and in files, what it must not have twice."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from tartarus.guest.channel import GuestExec, GuestProcess
from tartarus.model.errors import GuestFailed, NoSpace
from tartarus.runtimes.base import GuestRequest
from tartarus.runtimes.microvm import kept, saving
from tartarus.runtimes.microvm.guest import MachineGuest
from tartarus.runtimes.microvm.images import Images
from tartarus.runtimes.microvm.runtime import MicrovmRuntime
from tartarus.runtimes.microvm.snapshot import Frozen, MachineSnapshot

from .conftest import RESOURCES, sh, start

pytestmark = [pytest.mark.anyio, pytest.mark.needs("root", "busybox", "microvm")]
# Each file ends in the sum of the rest of it, or is not there: in memory (/dev/shm) and on the disk.
WRITER = """
i=0
while :; do
  i=$((i+1))
  for place in /dev/shm /root; do
    dd if=/dev/urandom of=$place/raw bs=16k count=4 2>/dev/null
    { cat $place/raw; md5sum < $place/raw; } > $place/new
    mv $place/new $place/data$((i%8))
  done
  echo $i > /dev/shm/count.new; mv /dev/shm/count.new /dev/shm/count
done
"""
CHECKER = """
for file in /dev/shm/data* /root/data*; do
  [ "$(head -c 65536 $file | md5sum)" = "$(tail -c +65537 $file)" ] && echo good || echo BAD $file
done
"""


@pytest.fixture
def place(state_dir: Path) -> Iterator[Path]:
    """Where a set of files goes."""
    path = state_dir / "saved"
    path.mkdir(mode=0o700)
    yield path
    shutil.rmtree(path)


def write_on(guest: MachineGuest) -> GuestProcess:
    """Start what writes until it is stopped."""
    return guest.channel.exec(GuestExec(argv=("/bin/sh", "-c", WRITER), env={"PATH": "/bin"}))


async def counted(guest: MachineGuest, wanted: int) -> None:
    """Wait until what writes has been round that often."""
    async with asyncio.timeout(60):
        while int(await sh(guest, "cat /dev/shm/count 2>/dev/null || echo 0")) < wanted:
            await asyncio.sleep(0.05)


async def restored(runtime: MicrovmRuntime, snapshot: MachineSnapshot, place: Path, name: str) -> MachineGuest:
    """A guest that goes on where one was saved, its session begun anew."""
    guest = await runtime.restore(snapshot, place, GuestRequest(name, name, RESOURCES))
    assert isinstance(guest, MachineGuest)
    await guest.ready()
    return guest


async def test_a_busy_machine_is_saved_and_goes_on(
    runtime: MicrovmRuntime, snapshot: MachineSnapshot, place: Path
) -> None:
    """Source and copies have what was written before, whole, and go on writing; each is somebody of its own."""
    source = await start(runtime, snapshot, "save-source")
    write_on(source)
    await counted(source, 4)
    saved = await source.save(place, go_on=True)
    assert saved.needs == runtime.needs(snapshot)
    assert saved.paused_ms > 0
    count = int(await sh(source, "cat /dev/shm/count"))
    copies = [await restored(runtime, snapshot, place, f"save-copy-{index}") for index in range(3)]
    await counted(source, count + 1)
    for guest in (source, *copies):
        said = await sh(guest, "kill -9 -1 2>/dev/null;" + CHECKER)
        assert "BAD" not in said
        assert said.count("good") >= 8, said
    names = [await sh(guest, "cat /etc/machine-id /proc/sys/kernel/random/uuid; hostname") for guest in copies]
    assert len(set(names)) == 3
    await asyncio.gather(*(guest.destroy() for guest in (source, *copies)))


async def test_no_copy_does_anything_before_it_is_somebody_else(
    runtime: MicrovmRuntime, snapshot: MachineSnapshot, place: Path
) -> None:
    """A program that draws random numbers all the time draws none twice, and no name of the source's."""
    source = await start(runtime, snapshot, "draw-source")
    draw = "while :; do echo $(hostname) $(head -c 16 /dev/urandom | od -x) >> /dev/shm/drawn; done"
    source.channel.exec(GuestExec(argv=("/bin/sh", "-c", draw), env={"PATH": "/bin"}))
    async with asyncio.timeout(60):
        while int(await sh(source, "cat /dev/shm/drawn 2>/dev/null | wc -l")) < 3:
            await asyncio.sleep(0.05)
    await source.save(place, go_on=False)
    await source.destroy()
    copies = [await restored(runtime, snapshot, place, f"draw-copy-{index}") for index in range(2)]
    for guest in copies:
        async with asyncio.timeout(60):
            while (await sh(guest, "cat /dev/shm/drawn")).count("draw-copy") < 2:
                await asyncio.sleep(0.05)
    first, second = [(await sh(guest, "cat /dev/shm/drawn")).splitlines() for guest in copies]
    common = set(first) & set(second)
    assert all(line.startswith("draw-source") for line in common)
    # The line that was being put together when the programs stood still may have the old name, and a new number.
    own = [line for line in first if line not in common]
    assert len(own) > 1
    assert all(line.startswith("draw-copy-0") for line in own[1:])
    await asyncio.gather(*(guest.destroy() for guest in copies))


async def test_a_session_goes_on_in_the_copy(runtime: MicrovmRuntime, snapshot: MachineSnapshot, place: Path) -> None:
    """What a program says after its machine was saved comes out of the copy."""
    source = await start(runtime, snapshot, "session-source")
    process = source.channel.exec(GuestExec(argv=("/bin/sh", "-c", "echo up; cat; echo end"), env={}, stdin=True))
    assert await process.read() == (1, b"up\n")
    state = await source.channel.quiesce()
    await source.save(place, go_on=True)
    request = GuestRequest("session-copy", "session-copy", RESOURCES, session=state)
    copy = await runtime.restore(snapshot, place, request)
    await copy.ready()
    copy.channel.go_on("detach")
    assert await sh(copy, "hostname") == "session-copy\n"  # type: ignore[arg-type]
    source.channel.go_on()
    await process.write_stdin(b"more\n")
    process.close_stdin()
    said = b""
    while (piece := await process.read()) is not None:
        said += piece[1]
    assert said == b"more\nend\n"
    assert (await process.wait()).shell_status == 0
    await asyncio.gather(source.destroy(), copy.destroy())


async def test_who_was_saved_for_good_may_go_on_after_all(
    runtime: MicrovmRuntime, snapshot: MachineSnapshot, place: Path
) -> None:
    """When its files can't be kept."""
    source = await start(runtime, snapshot, "back-source")
    await source.save(place, go_on=False)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(source.channel.ping(b"?"), 0.3)
    await source.resume()
    assert await sh(source, "echo on") == "on\n"
    await source.destroy()


async def test_a_save_that_fails_leaves_the_guest_running(
    runtime: MicrovmRuntime, snapshot: MachineSnapshot, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk is said, and nothing stands still for it."""
    source = await start(runtime, snapshot, "full-source")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(saving.Pages, "copy_stopped", full)
    with pytest.raises(NoSpace):
        await source.save(place, go_on=True)
    assert await sh(source, "echo on") == "on\n"
    await source.destroy()


@pytest.mark.parametrize("broken", ["memory", "scratch", "devices", "machine.json", "gone", "lie", "nonsense"])
async def test_files_that_do_not_fit_together_are_refused(
    runtime: MicrovmRuntime, snapshot: MachineSnapshot, place: Path, broken: str
) -> None:
    """Before a machine is made of them."""
    guest = await start(runtime, snapshot, f"refused-{broken.partition('.')[0]}")
    await guest.save(place, go_on=False)
    await guest.destroy()
    if broken == "gone":
        (place / "memory").unlink()
    elif broken == "lie":
        facts = saving.read_facts(place)
        lie = msgspec.structs.replace(facts.hardware, memory_bytes=facts.hardware.memory_bytes * 2)
        (place / "machine.json").write_bytes(msgspec.json.encode(msgspec.structs.replace(facts, hardware=lie)))
    elif broken == "nonsense":
        (place / "devices").write_bytes(os.urandom(5000))
    else:
        os.truncate(place / broken, 0)
    with pytest.raises(GuestFailed):
        await restored(runtime, snapshot, place, "refused")


async def test_copies_share_what_was_saved(runtime: MicrovmRuntime, snapshot: MachineSnapshot, place: Path) -> None:
    """What of the saved memory four copies have mapped counts a quarter for each (PSS)."""
    source = await start(runtime, snapshot, "share-source")
    await sh(source, "dd if=/dev/urandom of=/dev/shm/big bs=1M count=30 2>/dev/null")
    await source.save(place, go_on=False)
    await source.destroy()
    copies = [await restored(runtime, snapshot, place, f"share-copy-{index}") for index in range(4)]
    assert len({await sh(guest, "md5sum < /dev/shm/big") for guest in copies}) == 1
    for guest in copies:
        status = Path(f"/proc/{guest.pid}/status").read_text()
        shared_kib = int(status.split("RssShmem:")[1].split()[0])
        rollup = Path(f"/proc/{guest.pid}/smaps_rollup").read_text()
        assert shared_kib > 30 * 1024
        assert int(rollup.split("Pss_Shmem:")[1].split()[0]) < 0.4 * shared_kib
    await asyncio.gather(*(guest.destroy() for guest in copies))


def mapped(guest: MachineGuest) -> set[str]:
    """The files in which its monitor has the machine's memory."""
    lines = Path(f"/proc/{guest.pid}/maps").read_text().splitlines()
    return {line.split(maxsplit=5)[5] for line in lines if "tartarus-machine" in line or saving.MEMORY in line}


@pytest.mark.parametrize("told", [True, False], ids=["mapped", "copied"])
async def test_who_goes_on_alone(
    runtime: MicrovmRuntime,
    snapshot: MachineSnapshot,
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    told: bool,
) -> None:
    """It maps the file that it was lent, keeps it when that is removed, and can be saved again; or gets a copy."""
    if not told:  # as on file systems whose mappings can't be told
        monkeypatch.setattr(saving, "tells_mapping", lambda _: False)

    def lend(name: str) -> int:
        fd = os.open(place / name, os.O_RDONLY | os.O_CLOEXEC)
        os.fchmod(fd, 0o666)
        return fd

    source = await start(runtime, snapshot, "alone-source")
    await sh(source, "echo one >/dev/shm/kept; echo disk >/root/kept")
    await source.save(place, go_on=False)
    await source.destroy()
    before = (place / saving.MEMORY).read_bytes()
    guest = await runtime.restore(snapshot, place, GuestRequest("alone", "alone", RESOURCES, lend=lend))
    assert isinstance(guest, MachineGuest)
    await guest.ready()
    assert mapped(guest) == {str(place / saving.MEMORY)} if told else "memfd" in "".join(mapped(guest))
    assert await sh(guest, "cat /dev/shm/kept /root/kept; echo two >/dev/shm/kept") == "one\ndisk\n"
    assert (place / saving.MEMORY).read_bytes() == before
    shutil.rmtree(place)
    place.mkdir(mode=0o700)
    assert await sh(guest, "cat /dev/shm/kept") == "two\n"
    await guest.save(place, go_on=False)
    await guest.destroy()
    again = await restored(runtime, snapshot, place, "alone-again")
    assert await sh(again, "cat /dev/shm/kept /root/kept") == "two\ndisk\n"
    await again.destroy()


async def test_memory_that_can_not_be_read_to_its_end(
    runtime: MicrovmRuntime, snapshot: MachineSnapshot, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The monitor that was started meanwhile ends, nothing is kept of it, and the next attempt reads anew."""
    guest = await start(runtime, snapshot, "machine-unread")
    await guest.save(place, go_on=False)
    await guest.destroy()
    begin_to_read = kept.begin_to_read

    def breaking(directory: Path, images: Images) -> tuple[Frozen, Callable[[], None]]:
        def fill() -> None:
            raise GuestFailed("a saved machine can't be read", why="its disk broke")

        return begin_to_read(directory, images)[0], fill

    monkeypatch.setattr(kept, "begin_to_read", breaking)
    with pytest.raises(GuestFailed, match="disk broke"):
        await restored(runtime, snapshot, place, "machine-unread-copy")
    monkeypatch.undo()
    async with asyncio.timeout(60):
        while runtime._loaded:
            await asyncio.sleep(0.01)
    if runtime._hierarchy is not None:
        assert "machine-unread-copy" not in runtime._hierarchy.existing()
    copy = await restored(runtime, snapshot, place, "machine-unread-copy")
    assert await sh(copy, "hostname") == "machine-unread-copy\n"
    await copy.destroy()
