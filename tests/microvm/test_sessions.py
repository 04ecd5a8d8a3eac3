"""Commands in a machine that is saved: they go on where it is restored, for whoever meets it there, at the same byte."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tartarus.guest.channel import GuestExec
from tartarus.guest.process import GuestProcess
from tartarus.model.errors import GuestFailed
from tartarus.runtimes.base import GuestRequest
from tartarus.runtimes.microvm.guest import MachineGuest
from tartarus.runtimes.microvm.runtime import MicrovmRuntime
from tartarus.runtimes.microvm.snapshot import MachineSnapshot

from .conftest import RESOURCES, sh, start

pytestmark = [pytest.mark.anyio, pytest.mark.needs("root", "busybox", "microvm")]
SCRIPT = 'i=0; while [ $i -lt 5000 ]; do echo line $i; i=$((i+1)); done; read last; echo "$last"; exit 9'
LINES = b"".join(b"line %d\n" % number for number in range(5000))


async def begin(guest: MachineGuest) -> tuple[GuestProcess, bytes]:
    """A command in the middle of its output."""
    process = guest.channel.exec(GuestExec(argv=("/bin/sh", "-c", SCRIPT), env={}, stdin=True))
    said = b""
    while len(said) < 2000:
        piece = await process.read()
        assert piece is not None
        said += piece[1]
    return process, said


async def rest_of(process: GuestProcess, last: bytes) -> tuple[bytes, int]:
    await process.write_stdin(last + b"\n")
    said = b""
    while (piece := await process.read()) is not None:
        said += piece[1]
    return said, (await process.wait()).code


async def test_the_hosts_end_outlives_the_machine(
    runtime: MicrovmRuntime, snapshot: MachineSnapshot, tmp_path: Path
) -> None:
    guest = await start(runtime, snapshot, "machine-before")
    process, said = await begin(guest)
    channel = guest.channel
    state = await channel.quiesce()
    await guest.save(tmp_path, go_on=False)
    asked = asyncio.create_task(sh(guest, "hostname"))
    await asyncio.sleep(0)
    guest.channel = channel.unplug()
    await guest.destroy()
    again = await runtime.restore(
        snapshot, tmp_path, GuestRequest("machine-after", "machine-after", RESOURCES, session=state)
    )
    await again.ready()
    channel.plug(again.channel)
    again.channel = channel
    channel.go_on()
    assert await asked == "machine-after\n"
    out, code = await rest_of(process, b"the end")
    assert (said + out, code) == (LINES + b"the end\n", 9)
    await again.destroy()


async def test_copies_beside_their_source(runtime: MicrovmRuntime, snapshot: MachineSnapshot, tmp_path: Path) -> None:
    """Each goes on by itself; nothing of one is heard by another."""
    source = await start(runtime, snapshot, "machine-source")
    process, said = await begin(source)
    state = await source.channel.quiesce()
    kept = process.state()
    await source.save(tmp_path, go_on=True)
    source.channel.go_on()
    copies = []
    for name in ("machine-copy-1", "machine-copy-2"):
        copy = await runtime.restore(snapshot, tmp_path, GuestRequest(name, name, RESOURCES, session=state))
        await copy.ready()
        copied = GuestProcess.restored(copy.channel, kept)
        copy.channel.go_on("detach")
        copies.append((copy, copied))
    ends = await asyncio.gather(
        *(rest_of(one, b"%d" % at) for at, one in enumerate([process, *(copied for _, copied in copies)]))
    )
    assert [(said + out, code) for out, code in ends] == [(LINES + b"%d\n" % at, 9) for at in range(3)]
    await asyncio.gather(*(guest.destroy() for guest in (source, *(copy for copy, _ in copies))))


async def test_a_state_that_is_not_the_machines(
    runtime: MicrovmRuntime, snapshot: MachineSnapshot, tmp_path: Path
) -> None:
    guest = await start(runtime, snapshot, "machine-source")
    process, _ = await begin(guest)
    await guest.channel.quiesce()
    await guest.save(tmp_path, go_on=True)
    guest.channel.go_on()
    later = guest.channel.exec(GuestExec(argv=("/bin/sleep", "1000"), env={}))
    await later.started()
    state = await guest.channel.quiesce()
    copy = await runtime.restore(
        snapshot, tmp_path, GuestRequest("machine-copy", "machine-copy", RESOURCES, session=state)
    )
    with pytest.raises(GuestFailed):
        await copy.ready()
    assert process.id
    await asyncio.gather(copy.destroy(), guest.destroy())
