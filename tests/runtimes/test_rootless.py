"""The whole product as a user without privileges: installed from this checkout, run as nobody."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = [pytest.mark.needs("root", "system-python", "user-namespaces"), pytest.mark.timeout(300)]
ROOT = Path(__file__).parents[2]
NOBODY = 65534


class Rootless:
    """The `tartarus` command of an installation that nobody may use, with a home of nobody's."""

    def __init__(self, base: Path) -> None:
        self.home = base / "home"
        self.command = base / "venv" / "bin" / "tartarus"

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {"HOME": str(self.home), "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"}
        return subprocess.run(
            [str(self.command), *arguments], user=NOBODY, group=NOBODY, extra_groups=[], env=environment,
            cwd=self.home, capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip


@pytest.fixture(scope="module")
def tartarus() -> Iterator[Rootless]:
    base = Path(tempfile.mkdtemp(prefix="tartarus-rootless-", dir="/var/tmp"))
    base.chmod(0o755)
    venv = base / "venv"
    uv = [sys.executable, "-m", "uv", "-q"]
    subprocess.run([*uv, "venv", "--python", "/usr/bin/python3", str(venv)], check=True)
    subprocess.run([*uv, "pip", "install", "--python", str(venv / "bin/python"), str(ROOT)], check=True)
    home = base / "home"
    home.mkdir()
    os.chown(home, NOBODY, NOBODY)
    command = Rootless(base)
    yield command
    command("down")
    shutil.rmtree(base, ignore_errors=True)


@pytest.mark.parametrize("level", ["process", "container"])
def test_commands_run(tartarus: Rootless, level: str) -> None:
    done = tartarus("run", "--isolation", level, "--", "python3", "-c", "print(6*7)")
    assert (done.returncode, done.stdout, done.stderr) == (0, "42\n", "")


def test_container_has_its_own_root_and_network(tartarus: Rootless) -> None:
    script = "id -u; ls /sys/class/net 2>/dev/null; cat /proc/net/dev | grep -c :; echo x > /usr/x || echo read-only"
    done = tartarus("run", "--isolation", "container", "--", "/bin/sh", "-c", script)
    assert done.stdout.split() == ["0", "1", "read-only"]


def test_a_users_directory_can_be_mounted(tartarus: Rootless) -> None:
    data = tartarus.home / "data"
    data.mkdir(exist_ok=True)
    os.chown(data, NOBODY, NOBODY)
    done = tartarus("run", "--mount", f"{data}:/data", "--", "/bin/sh", "-c", "echo new > /data/out")
    assert done.returncode == 0, done.stderr
    assert (data / "out").read_text() == "new\n"
    assert (data / "out").stat().st_uid == NOBODY
    assert tartarus("run", "--mount", f"{data}:/data:ro", "--", "touch", "/data/x").returncode != 0


@pytest.mark.parametrize("level", ["process", "container"])
def test_memory_is_bounded_without_cgroups(tartarus: Rootless, level: str) -> None:
    done = tartarus("run", "--isolation", level, "--memory", "64MiB", "--", "python3", "-c", "bytearray(200 << 20)")
    assert "MemoryError" in done.stderr


@pytest.mark.parametrize("level", ["process", "container"])
def test_orphans_end_with_the_sandbox(tartarus: Rootless, level: str) -> None:
    marker = f"tartarus-orphan-{level}"
    code = f"import os,time\nif os.fork()==0:\n os.setsid()\n if os.fork()==0:\n  os.execvp('python3',['{marker}','-c','import time;time.sleep(300)'])\n os._exit(0)\nos.wait(); time.sleep(0.2)"
    assert tartarus("run", "--isolation", level, "--", "python3", "-c", code).returncode == 0
    running = [path for path in Path("/proc").glob("[0-9]*/cmdline") if marker.encode() in _read(path).split(b"\0")[:1]]
    assert running == []


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


@pytest.mark.parametrize("level", ["process", "container"])
def test_files_of_its_own_can_change_their_modes(tartarus: Rootless, level: str) -> None:
    script = "printf '#!/bin/sh\\necho ran' > tool && chmod 755 tool && ./tool && mkdir -m 0 locked"
    assert tartarus("run", "--isolation", level, "--", "/bin/sh", "-c", script).stdout == "ran\n"
    homes = tartarus.home / ".local/state/tartarus/process"
    assert list(homes.glob("sbx-*")) == []


def test_files_of_the_user_keep_theirs(tartarus: Rootless) -> None:
    private = tartarus.home / "private"
    private.write_text("x")
    private.chmod(0o600)
    os.chown(private, NOBODY, NOBODY)
    done = tartarus("run", "--isolation", "process", "--", "chmod", "666", str(private))
    assert done.returncode != 0
    assert private.stat().st_mode & 0o777 == 0o600


def test_what_is_weaker_is_said(tartarus: Rootless) -> None:
    tartarus("run", "--name", "weaker", "--", "true")
    record = json.loads(tartarus("inspect", "weaker").stdout)[0]
    if not os.access("/sys/fs/cgroup/cgroup.controllers", os.R_OK):
        assert "no memory cgroup" in record["isolation_reason"]


def test_another_user_is_refused(tartarus: Rootless) -> None:
    tartarus("run", "--", "true")
    socket = tartarus.home / ".local/state/tartarus/run/tartarus.sock"
    assert socket.exists()
    script = f"import socket; s=socket.socket(socket.AF_UNIX); s.connect({str(socket)!r})"
    done = subprocess.run(
        ["/usr/bin/python3", "-c", script],
        user=NOBODY - 1,
        group=NOBODY - 1,
        extra_groups=[],
        check=False,
        capture_output=True,
    )
    assert b"PermissionError" in done.stderr


@pytest.mark.parametrize("level", ["process", "container"])
def test_pause_without_cgroups(tartarus: Rootless, level: str) -> None:
    """Each process is stopped; that they stand still shows in what they write."""
    script = "setsid sh -c 'while :; do echo x; sleep 0.01; done' & wait"
    name = f"still-{level}"
    done = tartarus("run", "--detach", "--isolation", level, "--name", name, "--", "/bin/sh", "-c", script)
    assert done.returncode == 0, done.stderr
    assert tartarus("pause", name).returncode == 0
    time.sleep(0.2)
    size = len(tartarus("logs", name).stdout)
    time.sleep(0.2)
    assert len(tartarus("logs", name).stdout) == size
    assert tartarus("resume", name).returncode == 0
    time.sleep(0.2)
    assert len(tartarus("logs", name).stdout) > size
    assert tartarus("pause", name).returncode == 0
    assert tartarus("kill", name).returncode == 0
    assert not _of_nobody("setsid sh -c")


@pytest.mark.parametrize("level", ["process", "container"])
def test_a_daemon_killed_while_a_sandbox_is_paused_leaves_nothing(tartarus: Rootless, level: str) -> None:
    marker = f"sleep 98765.{len(level)}"
    done = tartarus("run", "--detach", "--isolation", level, "--", "/bin/sh", "-c", f"{marker} & exec {marker}")
    assert done.returncode == 0, done.stderr
    found = json.loads(tartarus("ps", "--json").stdout)
    assert tartarus("pause", found[-1]["id"] if isinstance(found, list) else found["items"][-1]["id"]).returncode == 0
    assert _of_nobody(marker)
    (daemon,) = _of_nobody("tartarus.control") or _of_nobody("tartarus daemon")
    os.kill(daemon, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while _of_nobody(marker):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _of_nobody(words: str) -> list[int]:
    """Processes of nobody's whose command line holds these words."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            if entry.name.isdigit() and entry.stat().st_uid == NOBODY and words in line:
                found.append(int(entry.name))
        except OSError:
            continue
    return found


@pytest.fixture(scope="module")
def docker_image() -> Iterator[str]:
    """An image with nothing but the links a merged /usr needs; the host's /usr is mounted into its containers."""
    name = f"tartarus-test-{os.getpid()}"
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for directory in ("proc", "sys", "dev", "tmp", "etc", "usr", "var/tmp", "home"):
            (root / directory).mkdir(parents=True)
        (root / "tmp").chmod(0o1777)
        for link in ("bin", "sbin", "lib", "lib64"):
            (root / link).symlink_to(f"usr/{link}")
        for file in ("passwd", "group", "ld.so.cache"):
            shutil.copy(f"/etc/{file}", root / "etc" / file)
        archive = subprocess.run(["tar", "-C", folder, "-c", "."], check=True, capture_output=True).stdout
    subprocess.run(["docker", "import", "-", name], input=archive, check=True, capture_output=True)
    yield name
    subprocess.run(["docker", "rmi", "-f", name], check=False, capture_output=True)


@pytest.mark.needs("docker")
@pytest.mark.parametrize("user", ["0", str(NOBODY)])
def test_an_ordinary_docker_container_gives_the_process_level(tartarus: Rootless, docker_image: str, user: str) -> None:
    venv = tartarus.command.parent.parent
    script = (
        f"T={tartarus.command}; $T run -- python3 -c 'print(6*7)'; $T run --isolation process -- echo asked; "
        "$T run --isolation container -- true; echo status $?"
    )
    argv = ["docker", "run", "--rm", "--network=none", "--user", f"{user}:{user}", "-e", "TARTARUS_HOME=/tmp/home"]
    argv += ["-v", "/usr:/usr:ro", "-v", f"{venv}:{venv}:ro", docker_image, "/bin/sh", "-c", script]
    done = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=120)
    assert done.stdout == "42\nasked\nstatus 125\n", done.stderr
    assert "isolation_unavailable" in done.stderr


@pytest.mark.needs("busybox")
def test_a_template_is_built_imported_and_removed(tartarus: Rootless) -> None:
    busybox = shutil.which("busybox")
    assert busybox
    context = tartarus.home / "context"
    context.mkdir()
    shutil.copy(busybox, context / "busybox")
    (context / "Dockerfile").write_text(
        "FROM scratch\nCOPY busybox /bin/busybox\n"
        'RUN ["/bin/busybox", "--install", "-s", "/bin"]\n'
        "RUN mkdir -p /srv/a/b && echo built >/srv/a/b/c && chmod 0 /srv/a && id -u >/srv/id\n"
    )
    done = tartarus("template", "build", str(context), "--name", "mine")
    assert done.returncode == 0, done.stderr
    done = tartarus("run", "--template", "mine", "--", "sh", "-c", "chmod 755 /srv/a && cat /srv/a/b/c /srv/id")
    assert (done.returncode, done.stdout) == (0, "built\n0\n"), done.stderr
    done = tartarus("template", "build", str(context), "--name", "connected", "--network", "open", "--no-cache")
    assert "only root" in done.stderr
    tartarus("run", "--detach", "--name", "live", "--template", "mine", "--", "sleep", "60")
    assert "runs as root" in tartarus("snapshot", "create", "live").stderr
    tartarus("kill", "live")
    assert tartarus("template", "rm", "mine").returncode == 0


def test_a_module_runs(tartarus: Rootless) -> None:
    from tests.wasm.modules import HELLO

    module = tartarus.home / "hello.wasm"
    module.write_bytes(HELLO)
    for _ in range(2):
        done = tartarus("run", "./hello.wasm")
        assert (done.returncode, done.stdout, done.stderr) == (7, "hello\n", "")


def test_a_users_own_secret_reaches_a_container(tartarus: Rootless) -> None:
    configuration = tartarus.home / ".config" / "tartarus" / "config.yaml"
    configuration.parent.mkdir(parents=True)
    values = tartarus.home / "secrets.env"
    values.write_text("TOKEN=v4lue\n")
    configuration.write_text(
        f"secrets:\n  providers:\n    - {{name: env, kind: env-file, options: {{path: {values}}}}}\n"
        '  allow:\n    - {name: token, ref: "env:TOKEN"}\n'
    )
    for path in (values, configuration):
        path.chmod(0o600)
    for path in (*configuration.parents[:2], configuration, values):
        os.chown(path, NOBODY, NOBODY)
    tartarus("down")
    script = "cat /run/secrets/token; stat -f -c %T /run/secrets; stat -c %a /run/secrets/token"
    done = tartarus("run", "--isolation", "container", "--secret", "token", "--", "sh", "-c", script)
    configuration.unlink()
    tartarus("down")
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, ["v4luetmpfs", "400"], "")
