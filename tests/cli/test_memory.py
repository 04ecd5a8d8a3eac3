"""Snapshots of memory and forks as people type them, with the real daemon and gVisor."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path

import pytest
from tests.cli.kit import refused, start, text

from tartarus.sdk.places import Places

pytestmark = [pytest.mark.usefixtures("clean"), pytest.mark.needs("root", "cgroups", "runsc", "busybox")]
COUNT = "i=0; while [ $i -lt 500 ]; do echo line $i; i=$((i+1)); sleep 0.1; done"


def test_from_a_running_command_to_its_copies(home: Places, tmp_path: Path) -> None:
    text("run", "-d", "--isolation", "gvisor", "--name", "worker", "--", "sh", "-c", COUNT)
    while "line 3" not in text("logs", "worker"):
        time.sleep(0.05)
    made = text("snapshot", "create", "--memory", "worker", "loaded")
    assert re.fullmatch(r"Snapshot 'loaded' created \(ID: snap-\w+, [\d.]+\w+, stood still for \d+ ms\)\n", made)
    # Without a command: what ran goes on, and is read from where it was.
    again = start("run", "--snapshot", "loaded", "--name", "again")
    assert again.stdout is not None
    first = again.stdout.readline()
    assert re.fullmatch(rb"line \d+\n", first)
    assert int(first.split()[1]) > 2
    assert text("exec", "again", "--", "sh", "-c", "echo beside") == "beside\n"
    again.send_signal(signal.SIGINT)
    again.communicate(timeout=60)
    assert text("run", "--snapshot", "loaded", "--", "echo", "another") == "another\n"
    assert "limits" in refused("run", "--snapshot", "loaded", "--memory", "2GiB", "--", "true")
    forked = text("fork", "worker", "-n", "2").splitlines()
    assert [line.split()[1] for line in forked[:-1]] == ["worker-1", "worker-2"]
    assert re.fullmatch(r"2 copies of memory; worker stood still for \d+ ms", forked[-1])
    known = json.loads(text("fork", "worker", "--name", "other", "--json"))
    assert (known["kind"], known["errors"], len(known["sandboxes"])) == ("memory", [], 1)
    assert text("exec", "other-1", "--", "echo", "lives") == "lives\n"
    file = str(tmp_path / "file")
    text("snapshot", "export", "loaded", file)
    text("snapshot", "import", file, "--name", "back")
    assert text("run", "--snapshot", "back", "--", "echo", "back") == "back\n"
    text("snapshot", "delete", "loaded", "back")
    text("kill", "-q", "worker", "worker-1", "worker-2", "other-1")
