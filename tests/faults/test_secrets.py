"""kill -9 of a daemon whose sandboxes hold secrets: no byte of them is anywhere, before it and after it."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

from .place import Place, wait_until

pytestmark = pytest.mark.needs("root", "cgroups")
VALUE = b"s3cr3t-V4lue-of-the-dead"


def found(home: Place) -> list[str]:
    """What has the value: files of ours, the daemon's log, and what the kernel tells of processes, ours left out."""
    files = [path for path in home.home.rglob("*") if path.is_file() and not path.is_symlink()]
    shown = [
        process / name
        for process in Path("/proc").glob("[0-9]*")
        if int(process.name) != os.getpid()
        for name in ("environ", "cmdline")
    ]
    hits = []
    for path in (*files, home.home.parent / "daemon.err", *shown):
        try:
            if VALUE in path.read_bytes():
                hits.append(str(path))
        except OSError:
            continue
    return hits


def test_a_secret_dies_with_its_daemon(home: Place) -> None:
    values = home.home.parent / "secrets.env"
    values.write_bytes(b"TOKEN=" + VALUE + b"\n")
    values.chmod(0o600)
    configuration = home.home / "config.yaml"
    configuration.write_text(
        f"secrets:\n  providers:\n    - {{name: env, kind: env-file, options: {{path: {values}}}}}\n"
        '  allow:\n    - {name: token, ref: "env:TOKEN"}\n'
    )
    home.keeps = re.compile("config.yaml$")
    home.start()
    script = "test -s /run/secrets/token && touch /tmp/there && sleep 600"
    sandbox = home.create("sh", "-c", script, secrets=["token"])
    wait_until(lambda: sandbox.run(["test", "-e", "/tmp/there"]).exit_code == 0, "it has its secret")
    assert found(home) == []
    assert home.daemon is not None
    limits = Path(f"/proc/{home.daemon.pid}/limits").read_text()
    (core,) = [line for line in limits.splitlines() if line.startswith("Max core file size")]
    assert core.split()[4:6] == ["1", "1"]  # the one value that also keeps a core dump from a program's hands
    home.end_daemon(signal.SIGKILL)
    wait_until(lambda: not home.processes(), "its processes end")
    assert found(home) == []
    home.restart()
    assert home.end_of(sandbox) == ("lost", "lost")
    assert found(home) == []
