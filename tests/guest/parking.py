"""Park a real interpreter below a real agent, and compare what it does with what a fresh one does."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec

from tartarus.guest.channel import GuestChannel, GuestExec, GuestProcess
from tartarus.guest.command_lines import Kind
from tartarus.guest.parked import HandedOver, Parked, Parking, park
from tartarus.model.sandbox import ExitStatus

from .conftest import ENV

HOME_ENV = ENV | {"HOME": "/nonexistent"}
_PROGRAMS: dict[Kind, str] = {"node": "node", "r": "Rscript"}


class Ran(msgspec.Struct):
    """What a command gave."""

    out: str
    err: str
    code: int
    signal: int


async def parked(guest: GuestChannel, tmp_path: Path, kind: Kind, **how: object) -> Parked:
    """A parked interpreter whose working directory is tmp_path."""
    scratch = tmp_path / ".scratch"
    scratch.mkdir(exist_ok=True)
    parking = Parking(
        kind=kind, command=_PROGRAMS[kind], imports=(), script="", env=HOME_ENV, cwd=str(tmp_path), scratch=str(scratch)
    )
    return await park(guest, msgspec.structs.replace(parking, **how))


def request(
    tmp_path: Path, *argv: str, env: dict[str, str] | None = None, cwd: str = "", stdin: bool = False, tty: bool = False
) -> GuestExec:
    return GuestExec(argv=argv, env=HOME_ENV | (env or {}), cwd=cwd or str(tmp_path), stdin=stdin, tty=tty)


def no_cold() -> GuestProcess:
    raise AssertionError("it started cold")


async def finish(process: GuestProcess | HandedOver, stdin: bytes | None = None) -> Ran:
    if stdin is not None:
        await process.write_stdin(stdin)
        process.close_stdin()
    parts = [bytearray(), bytearray()]
    while (piece := await process.read()) is not None:
        parts[piece[0] - 1].extend(piece[1])
    status: ExitStatus = await process.wait()
    return Ran(parts[0].decode(), parts[1].decode(), status.code, status.signal)


async def both(
    guest: GuestChannel,
    tmp_path: Path,
    kind: Kind,
    *argv: str,
    stdin: bytes | None = None,
    env: dict[str, str] | None = None,
    cwd: str = "",
) -> tuple[Ran, Ran]:
    """(the parked interpreter's, a fresh one's) result of the same command."""
    asked = request(tmp_path, *argv, env=env, cwd=cwd, stdin=stdin is not None)
    async with asyncio.TaskGroup() as tasks:
        cold = tasks.create_task(finish(guest.exec(asked), stdin))
        waiting = await parked(guest, tmp_path, kind)
        taken = waiting.offer(asked, no_cold)
        assert taken is not None, waiting.why_not(asked.argv, asked.env, tty=asked.tty)
        assert (await taken.started())[1]
        warm = await finish(taken, stdin)
    return warm, cold.result()
