"""What a daemon's start may meet: another daemon, clients in a crowd, the remains of a dead one, damaged files."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tartarus.model.errors import TartarusError

from .place import LEVELS, PATIENCE_S, Place, kind_of, place, wait_until

pytestmark = pytest.mark.needs("root", "cgroups", "landlock")


def daemons(home: Place) -> list[int]:
    """The daemons that this place has, their starters not among them."""
    found = []
    for pid in home.processes(daemons=True):
        try:
            holds = any(str(home.home / "daemon.lock") == os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir())
        except OSError:
            continue
        found += [pid] if holds else []
    return found


def test_two_daemons_race_for_one_place(home: Place) -> None:
    command = [*home.tagged(), sys.executable, "-m", "tartarus.control.daemon", "--foreground"]
    racers = [subprocess.Popen(command, env=home.environ, stderr=subprocess.PIPE) for _ in range(4)]
    wait_until(home.serving, "one serves")
    wait_until(lambda: sum(racer.poll() is None for racer in racers) == 1, "the others gave way")
    home.works()
    (winner,) = [racer for racer in racers if racer.poll() is None]
    for racer in racers:
        if racer is not winner:
            assert racer.returncode == 0
            assert b"a daemon already serves" in racer.communicate()[1]
    winner.terminate()
    winner.communicate(timeout=PATIENCE_S)
    assert winner.returncode == 0
    home.settle()


def test_ten_clients_start_one_daemon(home: Place) -> None:
    clients = [home.cli("run", "--", "echo", f"client {index}") for index in range(10)]
    answers = [client.communicate(timeout=PATIENCE_S * 2) for client in clients]
    assert [out for out, _ in answers] == [f"client {index}\n".encode() for index in range(10)], answers
    (daemon,) = daemons(home)
    assert int((home.home / "daemon.pid").read_text()) == daemon
    stop = home.cli("down")
    stop.communicate(timeout=PATIENCE_S * 2)
    wait_until(lambda: not home.processes(daemons=True), "the daemon ended")
    home.settle()
    assert home.parent_groups() == []


def test_clients_killed_while_they_start_the_daemon(home: Place) -> None:
    clients = [home.cli("run", "--", "sleep", "600") for _ in range(5)]
    wait_until((home.home / "start.lock").exists, "one begins")
    for client in clients:
        client.kill()
        client.communicate()
    out, _ = home.cli("run", "--", "echo", "fine").communicate(timeout=PATIENCE_S * 2)
    assert out == b"fine\n"
    (daemon,) = daemons(home)
    wait_until(lambda: set(home.recorded().values()) <= {"succeeded", "killed"}, str(home.recorded()))
    os.kill(daemon, signal.SIGTERM)
    wait_until(lambda: not home.processes(daemons=True), "the daemon ended")
    home.settle()


def test_a_stale_socket_and_pid_file(home: Place) -> None:
    home.start()
    home.end_daemon(signal.SIGKILL)
    assert home.socket.exists()
    (home.home / "daemon.pid").write_text("1\n")  # a process that lives, but is no daemon
    out, err = home.cli("run", "--", "echo", "again").communicate(timeout=PATIENCE_S * 2)
    assert out == b"again\n", err
    assert int((home.home / "daemon.pid").read_text()) == daemons(home)[0]


def test_something_else_in_the_sockets_place(home: Place) -> None:
    home.socket.parent.mkdir(parents=True)
    home.socket.write_text("precious")
    assert home.start(serving=False).wait(PATIENCE_S) == 125
    assert "is in the way" in home.said()
    assert home.socket.read_text() == "precious"


def test_a_socket_that_nobody_answers(home: Place) -> None:
    home.socket.parent.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(home.socket))
    home.restart()


def test_a_daemon_of_another_version(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import tartarus\ntartarus.__version__ = '0.0.1'\n")
    with place({"PYTHONPATH": str(tmp_path)}) as other:
        other.start()
        del other.environ["PYTHONPATH"]
        client = other.cli("run", "--", "true")
        _, err = client.communicate(timeout=PATIENCE_S)
        assert client.returncode == 125
        assert b"version_mismatch" in err
        assert b"0.0.1" in err
        assert err.count(b"\n") == 1, err
        assert other.recorded() == {}


@pytest.mark.parametrize("damage", ["garbage", "empty header", "truncated", "a directory"])
def test_a_damaged_database_is_refused_in_one_line(home: Place, damage: str) -> None:
    home.start()
    home.create("true")
    home.end_daemon(signal.SIGKILL)
    path = home.home / "state.db"
    for name in ("state.db-wal", "state.db-shm"):
        (home.home / name).unlink(missing_ok=True)
    whole = path.read_bytes()
    if damage == "a directory":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(
            {"garbage": os.urandom(65536), "empty header": bytes(100) + whole[100:], "truncated": whole[:5000]}[damage]
        )
    client = home.cli("run", "--", "true")
    _, err = client.communicate(timeout=PATIENCE_S * 2)
    assert client.returncode == 125, err
    assert str(path).encode() in err
    assert err.count(b"\n") == 1, err
    assert not daemons(home)
    # It says what to do, and doing that helps.
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    home.restart()


@pytest.mark.parametrize("damage", ["nothing in it", "no root", "no manifest", "half made", "a file"])
def test_a_damaged_template_is_made_again_or_named(home: Place, damage: str) -> None:
    home.start()
    home.works()
    home.end_daemon(signal.SIGTERM)
    (made,) = (home.home / "cache" / "templates").glob("rootfs-*")
    if damage == "half made":
        made.rename(made.with_name(f".making-{made.name}"))
        (made.parent / f".lock-{made.name}").touch()
    elif damage == "no manifest":
        (made / "manifest.json").unlink()
    else:
        shutil.rmtree(made / "tree" if damage == "no root" else made)
        if damage == "nothing in it":
            made.mkdir()
        elif damage == "a file":
            made.write_text("")
    home.restart()


def test_a_read_only_place(home: Place) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", str(home.home)], check=True)
    try:
        client = home.cli("run", "--", "true")
        _, err = client.communicate(timeout=PATIENCE_S)
        assert client.returncode == 125
        assert b"Read-only file system" in err
        assert err.count(b"\n") == 1, err
        assert home.start(serving=False).wait(PATIENCE_S) == 125
    finally:
        subprocess.run(["umount", "-l", str(home.home)], check=True)


def test_a_parent_that_keeps_others_out_leaves_the_container_level(home: Place) -> None:
    home.home.parent.chmod(0o700)
    home.start()
    with pytest.raises(TartarusError) as refused:
        home.create(level="process")
    assert refused.value.code == "isolation_unavailable"
    home.works(["container"])


def test_no_cgroups_to_be_had(home: Place) -> None:
    # As in a container whose engine shows them read-only.
    read_only = "for d in /sys/fs/cgroup/*/; do mount --bind $d $d && mount -o remount,bind,ro $d; done; "
    if os.path.exists("/sys/fs/cgroup/cgroup.controllers"):
        read_only = "mount --bind /sys/fs/cgroup /sys/fs/cgroup && mount -o remount,bind,ro /sys/fs/cgroup; "
    home.start(["unshare", "--mount", "sh", "-c", read_only + 'exec "$@"', "sh"])
    for level in LEVELS:
        orphan = "import os, time\nif os.fork() == 0:\n os.setsid()\n if os.fork(): os._exit(0)\n"
        sandbox = home.create("python3", "-c", orphan + "time.sleep(600)", level=level, timeout_s=0.5)
        assert home.end_of(sandbox) == ("timed_out", "timeout")
        home.settle()
        with home.create(level=level) as sandbox:  # its agent does what a freezer would
            sandbox.pause()
            sandbox.resume()
            assert sandbox.run(["true"]).exit_code == 0
    home.works()
    assert home.groups() == []
    sandboxes = [home.create("sh", "-c", "setsid sleep 600 & sleep 600", level=level) for level in LEVELS]
    home.end_daemon(signal.SIGKILL)
    wait_until(lambda: not home.processes(), "all ended")
    home.restart()
    assert [home.end_of(sandbox) for sandbox in sandboxes] == [("lost", "lost")] * 2


def test_many_starts_in_parallel_threads(up: Place) -> None:
    """One template, nothing warm, everybody at once: one nursery and one interpreter for each level."""
    failures: list[TartarusError] = []

    def launch(index: int) -> None:
        try:
            with up.create(level=LEVELS[index % 2]) as sandbox:
                sandbox.run(["python3", "-c", "pass"])
        except TartarusError as error:
            failures.append(error)

    threads = [threading.Thread(target=launch, args=[index]) for index in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert [kind_of(pid) for pid in up.parked()].count("nursery") == len(LEVELS)
