"""kill -9 of the daemon, and what is in the audit log then: what was said to be decided is there, and all of it holds."""

from __future__ import annotations

import signal
import threading

import pytest

from tartarus.model.audit import AuditQuery
from tartarus.model.errors import TartarusError
from tartarus.sdk import Audit, Client, Policies

from .place import Place

pytestmark = pytest.mark.needs("root", "cgroups", "landlock")


def test_policies_are_in_the_log_before_they_are_in_force(home: Place) -> None:
    home.start()
    put: list[str] = []

    def change() -> None:
        policies = Policies(Client(str(home.home), start=False))
        while True:
            name = f"p{len(put)}"
            try:
                policies.put(name, f"id: {name}\nresources: {{max_pids: 1000}}\n")
            except (TartarusError, OSError):
                return
            put.append(name)

    thread = threading.Thread(target=change)
    thread.start()
    home.create(name="first").kill()
    home.end_daemon(signal.SIGKILL)
    thread.join()
    home.restart()
    audit = Audit(home.client)
    entries = list(audit.entries(AuditQuery(limit=1000, action="policy.put")))
    written = [one.target for one in entries if one.decision == "allow"][::-1]
    undone = [one.target for one in entries if one.decision == "error"]
    kept = sorted((one.id for one in Policies(home.client).list()), key=lambda name: int(name[1:]))
    assert put
    assert written[: len(put)] == kept[: len(put)] == put
    # None is in force that the log does not have; the last one may be written down and not be done.
    assert len(put) <= len(kept) <= len(written) <= len(put) + 1
    assert undone == written[len(kept) :]  # and then the next daemon says so
    verified = audit.verify()
    assert (verified.findings, verified.first) == ((), 0)
    assert not list((home.home / "audit").glob("broken-*"))
    home.create(name="second").kill()
