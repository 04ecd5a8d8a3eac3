"""The daemon ends while it holds sandboxes in quarantine, or collects evidence: cases stay, processes don't."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from tartarus.model.errors import InvalidState, Quarantined, TartarusError
from tartarus.model.quarantine import CaseStatus
from tartarus.model.states import State
from tartarus.sdk import Quarantine

from .place import PATIENCE_S, Place, place, wait_until

pytestmark = pytest.mark.needs("root", "cgroups", "landlock")
TALK = "echo taken >/tmp/loot; while :; do echo on; sleep 0.01; done"


@pytest.fixture(scope="module")
def stands() -> Iterator[Place]:
    """One daemon after the other for all tests here: to start one takes longer than what is done to it."""
    with place() as made:
        made.start()
        yield made


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_case_outlives_the_daemon_and_its_processes_do_not(stands: Place, number: int) -> None:
    home = stands
    sandbox = home.create("sh", "-c", TALK, level="container", name="suspect")
    quarantine = Quarantine(home.client)
    case = quarantine.take(sandbox.id, detail="talks too much")
    with pytest.raises(Quarantined):
        sandbox.kill()
    wait_until(lambda: quarantine.get(case.id).complete, "evidence is there")
    home.end_daemon(number)
    if number == signal.SIGTERM:
        wait_until(lambda: not home.processes(), "its processes end with the daemon")
    home.start()  # what is kept is no leftover: that is looked for once the case is destroyed
    found = quarantine.get("suspect")
    assert (found.status, found.complete, found.evidence) == (
        CaseStatus.DEAD, True, quarantine.get(case.id).evidence,
    )  # fmt: skip
    assert "ended with the daemon" in found.trouble
    assert sandbox.refresh().state is State.QUARANTINED
    with pytest.raises(InvalidState):
        quarantine.release(case.id)
    quarantine.destroy(case.id)
    assert sandbox.refresh().state is State.KILLED
    assert quarantine.list() == []
    home.settle()
    home.works()


def _take(quarantine: Quarantine, sandbox: str) -> None:
    with contextlib.suppress(TartarusError, OSError):  # the daemon is killed meanwhile
        quarantine.take(sandbox)


def test_killed_at_any_moment_of_taking_one_a_case_is_whole_or_says_so(stands: Place) -> None:
    home = stands
    for delay_s in (0.01, 0.05):
        sandbox = home.create("sh", "-c", TALK, level="container")
        quarantine = Quarantine(home.client)
        taking = threading.Thread(target=_take, args=(quarantine, sandbox.id))
        taking.start()
        time.sleep(delay_s)
        home.end_daemon(signal.SIGKILL)
        taking.join()
        home.start()
        state = sandbox.refresh().state
        cases = [case for case in quarantine.list() if case.sandbox_id == sandbox.id]
        assert state in {State.QUARANTINED, State.LOST}
        assert len(cases) == 1 or state is State.LOST
        for case in cases:
            assert case.status is CaseStatus.DEAD
            assert case.complete == bool(case.evidence)
            quarantine.destroy(case.id)
        assert sandbox.refresh().state in {State.KILLED, State.LOST}
        home.settle()


def test_whoever_runs_one_in_the_foreground_is_told(stands: Place) -> None:
    home = stands
    client = home.cli("run", "--isolation", "container", "--name", "watched", "--", "sh", "-c", "echo begun; sleep 600")
    assert client.stdout.readline() == b"begun\n"
    Quarantine(home.client).take("watched", detail="looked odd")
    _, said = client.communicate(timeout=PATIENCE_S)
    assert client.returncode == 125
    assert b"was quarantined: looked odd" in said
    Quarantine(home.client).destroy("watched")
    home.settle()
