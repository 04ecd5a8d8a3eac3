"""The host runs out of something: disk, inodes, descriptors, processes. Errors that say so, and no harm done after."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tartarus.model.errors import TartarusError
from tartarus.runtimes.cgroups import group_name
from tartarus.sdk import Sandbox

from .place import LEVELS, PATIENCE_S, Place, wait_until

pytestmark = pytest.mark.needs("root", "cgroups", "landlock")


@contextlib.contextmanager
def small_disk(home: Place, options: str) -> Iterator[None]:
    """A file system of its own for the place."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"{options},mode=711", "tmpfs", str(home.home)], check=True)
    home.mounts_before = [*home.mounts_before, *mounts_of(home)]
    try:
        yield
    finally:
        home.close()
        subprocess.run(["umount", "-l", str(home.home)], check=True)


def mounts_of(home: Place) -> list[str]:
    with open("/proc/self/mountinfo", encoding="utf-8") as table:
        return [line for line in table if str(home.home) in line]


def fill(path: Path) -> None:
    """Take what the disk has, to the last byte."""
    with open(path, "ab", buffering=0) as filler:
        for size in (1 << 20, 4096, 1):
            with contextlib.suppress(OSError):
                while True:
                    filler.write(b"x" * size)


def fill_inodes(directory: Path) -> None:
    directory.mkdir()
    with contextlib.suppress(OSError):
        for number in range(1_000_000):
            (directory / str(number)).touch()


@pytest.mark.parametrize("level", LEVELS)
def test_the_disk_fills_up_and_is_freed(home: Place, level: str) -> None:
    with small_disk(home, "size=24m"):
        home.start()
        home.works([level])
        talker = home.create("sh", "-c", "while :; do echo output; sleep 0.01; done", level=level, name="talker")
        quiet = home.create(level=level, name="quiet")
        wait_until(lambda: any(entry.data for entry in talker.logs()), "it talks")
        filler = home.home.parent / "h" / "filler"
        fill(filler)
        for _ in range(3):
            with pytest.raises(TartarusError) as refused:  # noqa: PT012
                for number in range(300):  # what the write-ahead log has room for still succeeds
                    home.create("true", level=level, name=f"more-{number}").wait(PATIENCE_S)
            assert refused.value.code == "no_space", str(refused.value)
        assert quiet.run(["echo", "works"]).stdout == "works\n"
        ended = [quiet, talker]
        for sandbox in ended:
            sandbox.kill()
        filler.unlink()
        # What could not be written then is written now.
        wait_until(lambda: not [s for s in home.recorded().values() if s in {"running", "starting"}], "all have ended")
        assert [home.recorded()[sandbox.id] for sandbox in ended] == ["killed", "killed"]
        home.works([level])
        assert b"output" in b"".join(entry.data for entry in talker.logs())
        assert home.end_daemon(signal.SIGTERM) == 0


def test_a_daemon_on_a_full_disk_says_so(home: Place) -> None:
    with small_disk(home, "size=6m"):
        fill(home.home / "filler")
        client = home.cli("run", "--", "true")
        _, err = client.communicate(timeout=PATIENCE_S * 2)
        assert client.returncode == 125
        assert err.count(b"\n") == 1, err
        assert b"space" in err or b"full" in err, err
        (home.home / "filler").unlink()
        home.restart()


@pytest.mark.parametrize("size", ["300k", "700k", "1500k"])
def test_too_small_a_disk(home: Place, size: str) -> None:
    with small_disk(home, f"size={size}"):
        client = home.cli("run", "--", "true")
        _, err = client.communicate(timeout=PATIENCE_S * 2)
        if client.returncode:
            assert client.returncode == 125
            assert err.count(b"\n") == 1, err
        home.settle()


def test_no_inodes_left(home: Place) -> None:
    with small_disk(home, "size=24m,nr_inodes=2000"):
        home.start()
        home.works()
        fill_inodes(home.home / "filler")
        with pytest.raises(TartarusError) as refused:
            home.create("true", level="process")
        assert refused.value.code == "no_space"
        # This one needs no file of its own until it says something, and then does without.
        talker = home.create("sh", "-c", "echo lost; sleep 600", level="container")
        assert talker.run(["echo", "works"]).stdout == "works\n"
        talker.kill()
        for path in (home.home / "filler").iterdir():
            path.unlink()
        (home.home / "filler").rmdir()
        home.works()


@pytest.mark.parametrize("level", LEVELS)
def test_no_descriptors_left(home: Place, level: str) -> None:
    daemon = home.start()
    home.works([level])
    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (192, 192))
    made: list[Sandbox] = []
    with pytest.raises(TartarusError) as refused:  # noqa: PT012
        for number in range(200):
            made.append(home.create("sleep", "600", level=level, name=f"n{number}"))  # noqa: PERF401
    assert refused.value.code in {"no_space", "daemon_unavailable"}, str(refused.value)
    assert len(made) > 20
    for sandbox in made:
        sandbox.kill()
        assert home.end_of(sandbox) == ("killed", "user_request")
    home.works([level])
    assert set(home.recorded().values()) <= {"killed", "failed"}


def test_more_clients_than_descriptors(home: Place) -> None:
    daemon = home.start()
    home.works()
    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (96, 96))
    clients = [home.cli("run", "--", "sh", "-c", "echo in; sleep 1") for _ in range(50)]
    outcomes = [client.communicate(timeout=PATIENCE_S * 4) for client in clients]
    for client, (out, err) in zip(clients, outcomes, strict=True):
        assert (client.returncode, out) == (0, b"in\n") or client.returncode == 125, (out, err)
    home.works()


def pids_limit(home: Place, value: str) -> None:
    Path(f"/sys/fs/cgroup/pids/{group_name(home.home)}/pids.max").write_text(value)


@pytest.mark.parametrize("level", LEVELS)
def test_no_processes_left(up: Place, level: str) -> None:
    sandbox = up.create("sleep", "600", level=level, name="before")
    up.create("python3", "-c", "pass", level=level).wait(PATIENCE_S)
    pids_limit(up, "1")
    for command in (["true"], ["python3", "-c", "pass"]):
        with pytest.raises(TartarusError) as refused:
            up.create(*command, level=level).wait(PATIENCE_S)
        assert refused.value.code == "no_space", str(refused.value)
    with pytest.raises(TartarusError) as refused:
        sandbox.run(["true"])
    assert refused.value.code == "no_space", str(refused.value)
    pids_limit(up, "max")
    assert sandbox.run(["echo", "again"]).stdout == "again\n"
    sandbox.kill()
    up.works([level])


@pytest.mark.parametrize("level", LEVELS)
def test_the_nursery_and_the_interpreter_cant_be_forked(up: Place, level: str) -> None:
    pids_limit(up, "0")
    for _ in range(3):
        with pytest.raises(TartarusError) as refused:
            up.create("python3", "-c", "pass", level=level)
        assert refused.value.code in {"no_space", "template_failed", "isolation_unavailable"}, str(refused.value)
    pids_limit(up, "2")
    with pytest.raises(TartarusError):
        up.create("python3", "-c", "pass", level=level)
    pids_limit(up, "max")
    up.works([level])


def test_no_threads_to_be_had(home: Place) -> None:
    """The daemon's own fork and threads fail: its group is full."""
    group = Path(f"/sys/fs/cgroup/pids/faults-{home.tag}")
    group.mkdir()
    try:
        daemon = home.start()
        (group / "cgroup.procs").write_text(str(daemon.pid))
        (group / "pids.max").write_text("1")
        for level in LEVELS:
            with pytest.raises(TartarusError) as refused:
                home.create("true", level=level)
            assert refused.value.code in {"no_space", "guest_failed", "internal", "template_failed"}, str(refused.value)
        (group / "pids.max").write_text("max")
        home.works()
        assert home.end_daemon(signal.SIGTERM) == 0
        home.settle()
    finally:
        home.close()
        group.rmdir()


def test_the_output_log_of_a_flood_stays_small(up: Place) -> None:
    flood = up.create("sh", "-c", "head -c 200000000 /dev/zero; echo; echo end")
    assert up.end_of(flood) == ("succeeded", "completed")
    kept = sum(path.stat().st_size for path in (up.home / "logs").glob(f"{flood.id}*"))
    assert kept < 20 * 1024**2
    assert b"".join(entry.data for entry in flood.logs()).endswith(b"\nend\n")


def test_a_log_that_cant_be_written_stops_nothing(up: Place) -> None:
    up.works(["container"])
    logs = up.home / "logs"
    if logs.exists():
        for path in logs.iterdir():
            path.unlink()
        logs.rmdir()
    logs.write_text("in the way")
    sandbox = up.create("sh", "-c", "echo unheard; exit 3")
    assert up.end_of(sandbox) == ("failed", "completed")
    assert sandbox.info.exit_code == 3
    client = up.cli("run", "--", "echo", "heard")
    assert client.communicate(timeout=PATIENCE_S)[0] == b"heard\n"
    logs.unlink()
    up.works(["container"])


def test_memory_pressure_is_the_guests_own(up: Place) -> None:
    """A bomb in each of several sandboxes at once: each ends by its own limit, and nobody else does."""
    bomb = "x = []\nwhile True: x.append(bytearray(1 << 20))"
    bystander = up.create("sleep", "600", memory="32MiB")
    ends: list[tuple[str, str]] = []

    def explode(level: str) -> None:
        ends.append(up.end_of(up.create("python3", "-c", bomb, level=level, memory="64MiB")))

    threads = [threading.Thread(target=explode, args=[level]) for level in LEVELS * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {state for state, _ in ends} == {"failed"}
    assert bystander.run(["echo", "alive"]).stdout == "alive\n"
    assert os.path.exists(f"/proc/{up.daemon.pid}")  # type: ignore[union-attr]
    bystander.kill()
