"""`tartarus kernel` as people use it: without a daemon, on the files of this host."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import pytest
from tests.cli.kit import COMMAND, PATIENCE_S
from tests.microvm import kernels
from tests.needs import kernel_package


def run(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command of a daemon that lies in `home`."""
    environ = dict(os.environ, TARTARUS_HOME=str(home))
    return subprocess.run(
        [*COMMAND, "kernel", *arguments], env=environ, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )


def test_install_list_choose_remove(tmp_path: Path) -> None:
    """The life of a kernel, in both shapes of output."""
    package = tmp_path / "linux-image.deb"
    package.write_bytes(kernels.deb(kernels.tar(kernels.kernel_files())))
    assert run(tmp_path, "list", "--json").stdout == "[]\n"
    assert "no guest kernel" in run(tmp_path, "default").stderr
    done = run(tmp_path, "install", str(package))
    assert done.stdout == f"Kernel {kernels.RELEASE} installed (bzImage, 5 modules)\n"
    (found,) = json.loads(run(tmp_path, "list", "--json").stdout)
    assert (found["release"], found["default"], found["source"]) == (kernels.RELEASE, True, "linux-image.deb")
    assert f"{kernels.RELEASE} *" in run(tmp_path, "list").stdout
    assert run(tmp_path, "default", kernels.RELEASE).stdout == f"{kernels.RELEASE}\n"
    assert run(tmp_path, "remove", kernels.RELEASE).stdout == f"Kernel {kernels.RELEASE} removed\n"
    assert os.listdir(tmp_path / "kernels") == ["default"]


@pytest.mark.parametrize("arguments", [("install", "/etc/passwd"), ("remove", "6.1"), ("default", "../x")])
def test_refusals_say_what_to_do(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    """One line on standard error, status 125."""
    done = run(tmp_path, *arguments)
    assert (done.returncode, done.stdout) == (125, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("tartarus: error[invalid_request]: ")


@pytest.mark.needs("root")
def test_others_than_the_daemons_user_are_refused(tmp_path: Path) -> None:
    """A kernel is what every machine trusts: who installs one must own the daemon's files."""
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    code = "import os, sys; os.setgid(65534); os.setuid(65534); os.execv(sys.argv[1], sys.argv[1:])"
    environ = dict(os.environ, TARTARUS_HOME=str(home))
    done = subprocess.run(
        [COMMAND[0], "-c", code, *COMMAND, "kernel", "install", "/etc/hostname"],
        env=environ, capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert os.listdir(home) == []


@pytest.mark.needs("microvm")
def test_an_installation_that_is_killed(tmp_path: Path) -> None:
    """Whenever it is: there is the kernel, or there is none, and the next command finds nothing in its way."""
    package = kernel_package()
    assert package is not None
    for delay_s in (0.0, 0.3, 0.6):
        environ = dict(os.environ, TARTARUS_HOME=str(tmp_path))
        with subprocess.Popen([*COMMAND, "kernel", "install", str(package)], env=environ, process_group=0) as process:
            while process.poll() is None and not list((tmp_path / "kernels").glob(".installing-*")):
                time.sleep(0.01)
            time.sleep(delay_s)
            process.kill()
        found = json.loads(run(tmp_path, "list", "--json").stdout)
        assert all(one["modules"] > 10 and one["default"] for one in found)
    assert run(tmp_path, "install", str(package)).returncode == 0
    (left,) = os.listdir(tmp_path / "kernels")
    assert left.startswith("6.")
