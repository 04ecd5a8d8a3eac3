"""Real machines: booted once, saved, cloned; what clones share and what they must not."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import msgspec
import pytest

from tartarus.guest.channel import GuestExec
from tartarus.guest.protocol import BadFrame
from tartarus.model.errors import GuestFailed, Unsupported
from tartarus.model.sandbox import Mount
from tartarus.model.template import RunAs, Template
from tartarus.runtimes.base import GuestRequest, RootFs
from tartarus.runtimes.idmap import PRIVILEGED_BASE
from tartarus.runtimes.microvm.guest import MachineGuest
from tartarus.runtimes.microvm.launcher import FIRST_UID
from tartarus.runtimes.microvm.runtime import MicrovmRuntime
from tartarus.runtimes.microvm.snapshot import MachineSnapshot

from .conftest import RESOURCES, sh, start

pytestmark = [pytest.mark.anyio, pytest.mark.needs("root", "busybox", "microvm")]


async def test_a_guest_has_a_kernel_and_the_templates_files(runtime: MicrovmRuntime, snapshot: MachineSnapshot) -> None:
    """Layers lie over each other, ids are the sandbox's, what is written stays in the machine."""
    guest = await start(runtime, snapshot, "machine-files")
    assert await sh(guest, "cat /etc/motd; id -u") == "above0\n"
    assert "cloud" in await sh(guest, "cat /proc/version")
    assert (await sh(guest, "ls -n /bin/busybox")).split()[2:4] == ["0", "0"]
    assert await sh(guest, "echo new > /etc/motd; cat /etc/motd") == "new\n"
    assert (snapshot.rootfs.layers[0] / "etc" / "motd").read_text() == "above"
    await guest.destroy()


async def test_clones_have_names_randomness_and_time_of_their_own(
    runtime: MicrovmRuntime, snapshot: MachineSnapshot
) -> None:
    """Two clones of one saved machine must not draw the same random numbers."""
    first = await start(runtime, snapshot, "machine-one")
    second = await start(runtime, snapshot, "machine-two")
    # Several times: a generator that is not reseeded at once goes on in step with its twin only at first.
    for _ in range(3):
        for file in ("/etc/machine-id", "/proc/sys/kernel/random/uuid"):
            assert await sh(first, f"cat {file}") != await sh(second, f"cat {file}")
        script = "head -c 16 /dev/urandom | od -x"
        assert await sh(first, script) != await sh(second, script)
    assert await sh(first, "hostname") == "machine-one\n"
    assert await sh(second, "hostname") == "machine-two\n"
    await asyncio.gather(first.destroy(), second.destroy())


async def test_what_one_clone_writes_no_other_sees(runtime: MicrovmRuntime, snapshot: MachineSnapshot) -> None:
    """Neither in files nor in memory, not even clones made afterwards."""
    first = await start(runtime, snapshot, "machine-writer")
    await sh(first, "echo secret > /root/file; dd if=/dev/zero of=/dev/shm/big bs=1M count=20 2>/dev/null")
    second = await start(runtime, snapshot, "machine-reader")
    assert await sh(second, "ls /root /dev/shm") == "/dev/shm:\n\n/root:\n"
    await asyncio.gather(first.destroy(), second.destroy())


async def test_a_terminal_and_a_shutdown(runtime: MicrovmRuntime, snapshot: MachineSnapshot) -> None:
    """The channel's usual services, and the end that is asked for."""
    guest = await start(runtime, snapshot, "machine-tty")
    process = guest.channel.exec(GuestExec(argv=("/bin/stty", "size"), env={}, tty=True, rows=33, cols=77))
    piece = await process.read()
    assert piece is not None
    assert piece[1].split() == [b"33", b"77"]
    await process.wait()
    await guest.channel.shutdown(2.0)
    await asyncio.wait_for(guest.ended, 10)


async def test_much_output_arrives_whole(runtime: MicrovmRuntime, snapshot: MachineSnapshot) -> None:
    """Through the console port, which takes less at a time than a socket."""
    guest = await start(runtime, snapshot, "machine-output")
    assert await sh(guest, "dd if=/dev/zero bs=64k count=64 2>/dev/null | wc -c") == f"{64 * 65536}\n"
    assert len(await sh(guest, "dd if=/dev/zero bs=64k count=64 2>/dev/null")) == 64 * 65536
    await guest.destroy()


async def test_a_paused_machine_stands_still(runtime: MicrovmRuntime, snapshot: MachineSnapshot) -> None:
    """It answers nothing until it is resumed."""
    guest = await start(runtime, snapshot, "machine-pause")
    await guest.pause()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(guest.channel.ping(b"?"), 0.3)
    await guest.resume()
    assert await sh(guest, "echo on") == "on\n"
    await guest.destroy()


async def test_a_monitor_is_nobody(runtime: MicrovmRuntime, snapshot: MachineSnapshot) -> None:
    """A user of its own, no capabilities, a seccomp filter, no network but loopback, no files open but its own."""
    first = await start(runtime, snapshot, "machine-nobody-1")
    second = await start(runtime, snapshot, "machine-nobody-2")
    users = set()
    for guest in (first, second):
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{guest.pid}/status").read_text().splitlines())
        users.add(status["Uid"])
        assert int(status["Uid"].split()[0]) >= FIRST_UID > PRIVILEGED_BASE
        assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0
        assert status["NoNewPrivs"] == "1"
        assert status["Seccomp"] == "2"
        assert len(Path(f"/proc/{guest.pid}/net/dev").read_text().splitlines()) == 3
        open_files = {os.readlink(f"/proc/{guest.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{guest.pid}/fd")}
        outside = {path for path in open_files if path.startswith("/") and not path.startswith(("/dev/", "/memfd:"))}
        assert {path.rpartition("/")[0] for path in outside} == {str(runtime.place)}
    assert len(users) == 2
    await asyncio.gather(first.destroy(), second.destroy())


async def test_the_memory_that_clones_start_from_is_sealed(runtime: MicrovmRuntime, snapshot: MachineSnapshot) -> None:
    """A monitor that its guest took over holds a descriptor of it, and can do nothing with it."""
    guest = await start(runtime, snapshot, "machine-sealed")
    for fd in snapshot.saved_memory():
        again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
        with pytest.raises(PermissionError):
            os.pwrite(again, b"x", 0)
        with pytest.raises(PermissionError):
            os.ftruncate(again, 0)
        os.close(again)
    await guest.destroy()


async def test_clones_share_the_saved_memory(runtime: MicrovmRuntime, snapshot: MachineSnapshot) -> None:
    """What of the saved memory two clones have mapped counts half for each (PSS)."""
    guests = [await start(runtime, snapshot, f"machine-share-{index}") for index in range(2)]
    for guest in guests:
        rollup = Path(f"/proc/{guest.pid}/smaps_rollup").read_text().splitlines()[1:]
        sizes = {name: int(rest.split()[0]) for name, rest in (line.split(":") for line in rollup)}
        assert sizes["Pss_Shmem"] < 0.75 * int(
            Path(f"/proc/{guest.pid}/status").read_text().split("RssShmem:")[1].split()[0]
        )
    await asyncio.gather(*(guest.destroy() for guest in guests))


async def test_what_the_machines_kernel_kills_is_told(runtime: MicrovmRuntime, snapshot: MachineSnapshot) -> None:
    """And what anybody else kills is not counted."""
    guest = await start(runtime, snapshot, "machine-memory")
    for script, kills in (("exec dd if=/dev/zero of=/dev/null bs=140M", 1), ("kill -9 $$", 1)):
        process = guest.channel.exec(GuestExec(argv=("/bin/sh", "-c", script), env={"PATH": "/bin"}))
        assert (await process.wait()).signal == 9
        assert guest.stats().oom_kills == kills
    await guest.destroy()


async def test_a_killed_monitor_ends_its_guest(runtime: MicrovmRuntime, snapshot: MachineSnapshot) -> None:
    """Whatever waited fails, and nothing of it is left."""
    guest = await start(runtime, snapshot, "machine-killed")
    waiting = guest.channel.exec(GuestExec(argv=("/bin/sleep", "100"), env={}))
    os.kill(guest.pid, 9)
    with pytest.raises(GuestFailed):
        await waiting.wait()
    await asyncio.wait_for(guest.ended, 5)


async def test_what_it_can_not_do_is_refused(runtime: MicrovmRuntime, snapshot: MachineSnapshot) -> None:
    """Mounts of the host need a file server that this level has not."""
    request = GuestRequest("machine-mounts", "m", RESOURCES, mounts=(Mount(source="/tmp", target="/mnt"),))
    with pytest.raises(Unsupported):
        await runtime.clone(snapshot, request, warm=False)


async def test_programs_run_as_the_templates_user(runtime: MicrovmRuntime, rootfs: RootFs) -> None:
    """Theirs are the files that they and the host make; process 1 is not theirs, nor is what holds them."""
    user = RunAs(uid=1000, gid=1001, groups=(50,), name="user", home="/tmp")
    template = Template(id="busybox-user", name="user", user=user)
    made = await runtime.snapshot(msgspec.structs.replace(rootfs, template=template))
    assert isinstance(made, MachineSnapshot)
    guest = await start(runtime, made, "machine-user")
    assert (await sh(guest, "id -u; id -g; id -G")).split() == ["1000", "1001", "1001", "50"]
    await guest.channel.write("/tmp/by-host", b"text")
    assert (await sh(guest, "touch /tmp/own; ls -n /tmp/by-host /tmp/own | cut -c 1-40")).count("1000") == 2
    tries = (
        "echo 100000 > /sys/fs/cgroup/sandbox/pids.max", "kill -9 1", "reboot -f", "mount -t tmpfs none /tmp",
        "echo b > /proc/sysrq-trigger", "head -c 1 /proc/1/environ", "cat /dev/vda", "hostname other", "date -s @0",
    )  # fmt: skip
    for attempt in tries:
        assert await sh(guest, f"({attempt}) 2>&1 >/dev/null | head -c 1") != "", attempt
    assert "NoNewPrivs:\t1" in await sh(guest, "cat /proc/self/status")
    await guest.destroy()
    await made.close()


async def test_limits_hold_inside(runtime: MicrovmRuntime, snapshot: MachineSnapshot) -> None:
    """Of tasks and of memory, as they were asked for; and others, once they are changed."""
    few = msgspec.structs.replace(RESOURCES, pids=20, memory_bytes=100 * 1024**2)
    guest = await runtime.clone(snapshot, GuestRequest("machine-limits", "limits", few), warm=False)
    assert isinstance(guest, MachineGuest)
    await guest.ready()
    assert "can't fork" in await sh(guest, "for i in $(seq 100); do sleep 30 & done 2>&1; echo")
    assert await sh(guest, "cat /sys/fs/cgroup/sandbox/memory.max") == f"{100 * 1024**2}\n"
    guest.limit(msgspec.structs.replace(few, pids=300))
    await guest.channel.ping()
    assert await sh(guest, "cat /sys/fs/cgroup/sandbox/pids.max") == "300\n"
    await guest.destroy()


@pytest.mark.parametrize(
    ("how", "why"),
    [("reboot -f", "rebooted"), ("echo c > /proc/sysrq-trigger", "panicked"), ("poweroff -f", "itself off")],
)
async def test_a_machine_that_ends_itself(
    runtime: MicrovmRuntime, snapshot: MachineSnapshot, how: str, why: str
) -> None:
    """And says how."""
    guest = await start(runtime, snapshot, f"machine-ends-{why.split(maxsplit=1)[0]}")
    guest.channel.exec(GuestExec(argv=("/bin/sh", "-c", how), env={"PATH": "/bin"}))
    await asyncio.wait_for(guest.ended, 20)
    assert why in guest.why_ended


async def test_a_machine_that_hangs_is_ended(
    runtime: MicrovmRuntime, snapshot: MachineSnapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One whose agent answers no more; a paused one is left alone."""
    monkeypatch.setattr("tartarus.runtimes.microvm.guest.HEARTBEAT_S", 0.4)
    guest = await start(runtime, snapshot, "machine-hangs")
    await guest.pause()
    await asyncio.sleep(3)
    assert not guest.ended.done()
    guest._paused = False  # as if its own kernel had stopped it
    await asyncio.wait_for(guest.ended, 20)
    assert "stopped answering" in guest.why_ended


async def test_one_that_breaks_the_protocol_is_ended(runtime: MicrovmRuntime, snapshot: MachineSnapshot) -> None:
    """The host end gives up, and no machine is left that nobody can reach."""
    guest = await start(runtime, snapshot, "machine-breach")
    guest.channel.breach(BadFrame("nonsense"))
    await asyncio.wait_for(guest.ended, 20)
    assert "nonsense" in guest.why_ended
