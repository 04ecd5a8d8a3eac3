"""One daemon per state directory, and what its caller is told."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tartarus.control.instance import AlreadyRunning, InstanceLock, read_pid, serving
from tartarus.model.errors import DaemonUnavailable
from tartarus.model.settings import Settings

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings.at(tmp_path / "home")


def test_the_lock_is_exclusive_and_freed(settings: Settings) -> None:
    first, second = InstanceLock(settings), InstanceLock(settings)
    first.acquire()
    first.record_pid()
    assert read_pid(settings.pid_file) == os.getpid()
    with pytest.raises(AlreadyRunning, match=f"process {os.getpid()}"):
        second.acquire(handover_s=0)
    first.release()
    assert read_pid(settings.pid_file) is None
    second.acquire(handover_s=0)
    second.release()


def test_a_successor_gives_up_at_once_when_one_is_serving(settings: Settings) -> None:
    first = InstanceLock(settings)
    first.acquire()
    settings.socket.parent.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(settings.socket))
        listener.listen()
        assert serving(settings.socket)
        with pytest.raises(AlreadyRunning):
            InstanceLock(settings).acquire(handover_s=3600)
    assert not serving(settings.socket)
    first.release()


def test_the_kernel_frees_the_lock_of_a_killed_holder(settings: Settings) -> None:
    program = (
        "import sys, pathlib\n"
        "from tartarus.control.instance import InstanceLock\n"
        "from tartarus.model.settings import Settings\n"
        "lock = InstanceLock(Settings.at(pathlib.Path(sys.argv[1])))\n"
        "lock.acquire(); lock.record_pid(); print('held', flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(settings.state_dir)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(AlreadyRunning):
            InstanceLock(settings).acquire(handover_s=0)
        holder.kill()
    lock = InstanceLock(settings)
    lock.acquire(handover_s=0)
    lock.release()


def test_a_directory_that_cannot_be_used_is_refused_clearly(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DaemonUnavailable, match="can't be used"):
        InstanceLock(Settings.at(tmp_path / "file" / "home")).acquire()


def test_a_pid_file_with_nonsense_is_no_pid(tmp_path: Path) -> None:
    (tmp_path / "pid").write_text("many")
    assert read_pid(tmp_path / "pid") is None
