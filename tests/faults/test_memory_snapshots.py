"""kill -9 of the daemon while it saves sandboxes or forks them: every snapshot that it knows is whole, nothing leaks."""

from __future__ import annotations

import contextlib
import random
import signal
import threading
import time

import pytest

from tartarus.model.errors import TartarusError
from tartarus.sdk import Sandbox, Snapshot

from .place import Place

pytestmark = pytest.mark.needs("root", "cgroups", "landlock", "runsc", "busybox")


def test_killed_while_it_saves_and_forks(home: Place) -> None:
    chance = random.Random(99)
    home.start()
    for turn in range(4):
        source = home.create(
            "sh", "-c", "while :; do date >>/tmp/dates; sleep 0.01; done", level="gvisor", timeout_s=300
        )

        def work(source: Sandbox = source, turn: int = turn) -> None:
            with contextlib.suppress(TartarusError, OSError):
                for number in range(20):
                    source.snapshot(name=f"s-{turn}-{number}", memory=True)
                    source.fork(2)

        worker = threading.Thread(target=work)
        worker.start()
        time.sleep(0.2 + chance.random() * 1.5)
        home.end_daemon(signal.SIGKILL)
        worker.join(60)
        home.restart()
        assert {home.end_of(sandbox)[0] for sandbox in home.sandboxes()} <= {"lost", "killed", "failed"}
        known = Snapshot.list(client=home.client)
        kept = {path.name for path in (home.home / "memory").glob("uid-*/sets/*")}
        assert kept == {snapshot.id for snapshot in known}
        assert not [path for path in (home.home / "memory").rglob("*") if path.name.startswith(".")]
        for snapshot in known[:1]:
            with Sandbox.create(snapshot=snapshot.id, client=home.client) as again:
                assert again.run(["tail", "-n", "1", "/tmp/dates"]).stdout
    for snapshot in Snapshot.list(client=home.client):
        snapshot.delete()
