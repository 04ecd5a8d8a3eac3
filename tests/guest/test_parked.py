"""A parked interpreter that misbehaves costs its command nothing but a cold start, and the host nothing at all."""

from __future__ import annotations

import asyncio
import signal
import time
from pathlib import Path

import pytest

from tartarus.guest import parked as module
from tartarus.guest.channel import GuestChannel, GuestExec, GuestProcess
from tartarus.guest.parked import HandedOver, Parked, Parking, park
from tartarus.model.errors import GuestFailed, InvalidRequest, TemplateFailed

from .conftest import ENV
from .parking import finish

pytestmark = pytest.mark.anyio
TAKE = "head -c 8 >/dev/null; printf '\\006'; head -c 8 >/dev/null"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ANSWER_S", 0.4)


async def _parked(guest: GuestChannel, tmp_path: Path, script: str, limit_s: float = 10.0) -> Parked:
    """Park a shell script in the place of node; it has to read the messages as far as it cares."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "node"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    env = ENV | {"PATH": f"{tmp_path}/bin:{ENV['PATH']}"}
    parking = Parking(
        kind="node", command="node", imports=(), script="", env=env, cwd=str(tmp_path), scratch=str(tmp_path)
    )
    return await park(guest, parking, limit_s)


def _offer(guest: GuestChannel, waiting: Parked, **how: object) -> tuple[HandedOver, list[GuestProcess]]:
    started: list[GuestProcess] = []

    def cold() -> GuestProcess:
        started.append(guest.exec(GuestExec(argv=("echo", "cold"), env=ENV)))
        return started[-1]

    request = GuestExec(argv=("node", "-e", "1"), env=waiting.parking.env, cwd="/", **how)  # type: ignore[arg-type]
    taken = waiting.offer(request, cold)
    assert taken is not None
    return taken, started


@pytest.mark.parametrize(
    "answer",
    [
        "echo garbage; exec sleep 60",
        "printf '\\025no'; exec sleep 60",
        "printf '\\025no'; trap '' TERM; while :; do echo more; done",
        "exec sleep 60",
        "exit 3",
        "kill -9 $$",
        "while :; do echo flood >&2; done",
        "exec head -c 300000 /dev/zero >&2; exec sleep 60",
        "exec >&-; exec sleep 60",
    ],
)
async def test_no_good_answer_means_a_cold_start_after_its_end(
    guest: GuestChannel, tmp_path: Path, answer: str
) -> None:
    waiting = await _parked(guest, tmp_path, f"echo $$ > pid; {TAKE}; {answer}")
    pid = int((tmp_path / "pid").read_text())
    taken, started = _offer(guest, waiting)
    began = time.monotonic()
    assert not (await taken.started())[1]
    assert not Path(f"/proc/{pid}").exists()
    assert (await finish(taken)).out == "cold\n"
    assert len(started) == 1
    assert time.monotonic() - began < 5


async def test_a_late_yes_is_a_yes(guest: GuestChannel, tmp_path: Path) -> None:
    """Whoever may have begun is not begun again, even if it is killed for being late."""
    script = f"{TAKE}; trap 'printf \"\\006begun\"; exit 0' TERM; sleep 60 & wait"
    waiting = await _parked(guest, tmp_path, script)
    taken, started = _offer(guest, waiting)
    await asyncio.sleep(0.1)
    # The script says yes and ends by itself between the host's decision and its kill; here, a moment before.
    waiting._process.signal(signal.SIGTERM)
    ran = await finish(taken)
    assert (ran.out, started) == ("begun", [])


async def test_output_right_behind_the_answer_is_the_programs(guest: GuestChannel, tmp_path: Path) -> None:
    waiting = await _parked(guest, tmp_path, f"{TAKE}; printf 'err' >&2; printf '\\006\\006out'; exit 5")
    taken, started = _offer(guest, waiting)
    ran = await finish(taken)
    assert (ran.out, ran.err, ran.code, started) == ("\x06out", "err", 5, [])


async def test_words_while_it_waits_break_it(guest: GuestChannel, tmp_path: Path) -> None:
    waiting = await _parked(guest, tmp_path, "printf '\\006'; sleep 0.2; echo hello; exec sleep 60")
    async with asyncio.timeout(5):
        await waiting.broken()
    assert not waiting.waits
    asked = GuestExec(argv=("node", "-e", "1"), env=waiting.parking.env)
    assert waiting.offer(asked, lambda: pytest.fail("cold")) is None


async def test_input_waits_for_the_answer_and_the_end_of_input_follows(guest: GuestChannel, tmp_path: Path) -> None:
    # Reads both messages to their ends: their sizes are in their first four bytes.
    read = "size=$(head -c 4 | od -An -tu4); head -c 4 >/dev/null; head -c $size >/dev/null"
    waiting = await _parked(guest, tmp_path, f"{read}; printf '\\006'; {read}; printf '\\006'; exec cat")
    taken, _ = _offer(guest, waiting, stdin=True)
    await taken.write_stdin(b"in" * 300_000)
    taken.close_stdin()
    assert (await finish(taken)).out == "in" * 300_000


async def test_the_guests_end_is_an_error_and_no_hang(guest: GuestChannel, tmp_path: Path) -> None:
    waiting = await _parked(guest, tmp_path, f"{TAKE}; exec sleep 60")
    taken, _ = _offer(guest, waiting)
    guest.close()
    with pytest.raises(GuestFailed):
        await taken.started()
    with pytest.raises(GuestFailed):
        await taken.read()


async def test_a_cold_start_that_fails_is_the_callers_error(guest: GuestChannel, tmp_path: Path) -> None:
    waiting = await _parked(guest, tmp_path, f"{TAKE}; printf '\\025no such directory'")
    asked = GuestExec(argv=("node", "-e", "1"), env=waiting.parking.env, cwd="/no/such")
    taken = waiting.offer(asked, lambda: guest.exec(asked))
    assert taken is not None
    with pytest.raises(InvalidRequest):
        await taken.started()


@pytest.mark.parametrize("script", ["exit 1", "echo why >&2; exit 1", "exec sleep 60", "while :; do echo flood; done"])
async def test_a_warm_up_that_does_not_park_is_an_error(guest: GuestChannel, tmp_path: Path, script: str) -> None:
    with pytest.raises(TemplateFailed) as failed:
        await _parked(guest, tmp_path, script, limit_s=1.0)
    assert len(failed.value.why) <= module._LAST_WORDS
