"""One state directory with a real daemon as a subprocess, and all that it may leave behind on this host.

Every process that descends from a place's daemon or clients carries the place's tag: a limit on pending
signals that nobody else has. Limits are inherited and no part of Tartarus raises this one, so whatever
escapes its parent, its session, its namespaces and its cgroup is still found by its tag.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tartarus.runtimes.cgroups import group_name
from tartarus.sdk import Client, Sandbox
from tartarus.store.database import migrate, open_engine

PATIENCE_S = 45.0
"""How long a test waits for something that happens by itself. Nothing asserts that it takes less."""
LEVELS = ("container", "process")
_tags = itertools.count(1024 + os.getpid() * 37 % 2048)
_CGROUPS = Path("/sys/fs/cgroup")
_DAEMONS_OWN = re.compile(
    r"(daemon\.(lock|log|pid|err)|start\.lock|state\.db(-wal|-shm)?|run(/tartarus\.sock)?|process|gvisor|stage|cache|logs"
    r"|audit(/(lock|key(\.pub)?|log(/(leaves|checkpoints|edge|entries-[0-9]+\.jsonl(\.zst)?))?))?"
    r"|quarantine(/cases|/memory)?"
    r"|seccomp(/[^/]+(/[^/]+\.json)?)?"
    r"|memory(/uid-\d+(/(sets(/snap-[0-9a-z]+(/.+)?)?|packs))?)?"
    r"|cache/templates(/(rootfs|python)-[0-9a-f]+)?|kernels(/.*)?|machine-stage"
    r"|machines(/homes|/[0-9a-z-]+\.(erofs|sha256)|/kept(/[0-9a-f]+(/(memory|devices|scratch|(machine|digests)\.json))?)?)?"
    r"|cache/uploads|cache/wasm(/engine-[0-9a-f]+(/.*)?)?|cache/tenants(/[^/]+(/(layers|modules"
    r"|blobs(/(sha256|partial(/collector)?|holds(/\.lock)?))?|modules/module-[0-9a-f]+-[0-9a-f]+-[0-9a-f]+(/.*)?))?)?)$"
)


def wait_until(what: Callable[[], Any], why: str) -> Any:
    """Look until `what` gives something true; returns it."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := what()):
        if time.monotonic() > deadline:
            raise AssertionError(f"waited in vain: {why}")
        time.sleep(0.01)
    return found


class Place:
    """A TARTARUS_HOME of its own. `directory`: where it lies; `environ`: more variables for its daemon."""

    def __init__(self, directory: Path, environ: Mapping[str, str] | None = None) -> None:
        self.home = directory / "h"
        self.home.mkdir(mode=0o711)
        self.tag = next(_tags)
        self.environ = {**os.environ, "TARTARUS_HOME": str(self.home), **(environ or {})}
        self.daemon: subprocess.Popen[bytes] | None = None
        self.limits: dict[str, int] = {}
        self.keeps = re.compile("$^")  # further files that its daemon keeps for a while
        self.mounts_before = own_mounts(self.home)
        self.client = Client(str(self.home), start=False)

    # The daemon and its clients.

    def start(self, prefix: Sequence[str] = (), *, serving: bool = True) -> subprocess.Popen[bytes]:
        """Start the daemon in the foreground; `prefix` is a command that starts it."""
        daemon = [sys.executable, "-m", "tartarus.control.daemon", "--foreground", "--state-dir", str(self.home)]
        with open(self.home.parent / "daemon.err", "ab") as errors:
            self.daemon = subprocess.Popen(
                [*prefix, *self.tagged(), *daemon], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=errors, env=self.environ, start_new_session=True,
            )  # fmt: skip
        if serving:
            wait_until(self.serving, f"the daemon did not serve: {self.said()[-2000:]}")
        return self.daemon

    def tagged(self) -> list[str]:
        """What starts a program with the tag, and with any limits of the test."""
        limits = {"sigpending": self.tag, **self.limits}
        return ["prlimit", *(f"--{name}={value}:{value}" for name, value in limits.items())]

    def is_running(self) -> bool:
        """Whether it has a daemon, whoever started it."""
        return any(kind_of(pid) == "daemon" for pid in self.processes(daemons=True))

    def serving(self) -> bool:
        """Whether the daemon answers."""
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(PATIENCE_S)
            try:
                probe.connect(str(self.socket))
                probe.sendall(b"GET /readyz HTTP/1.1\r\nHost: t\r\nConnection: close\r\n\r\n")
                return probe.recv(64).startswith(b"HTTP/1.1 200")
            except OSError:
                return False

    def said(self) -> str:
        """What the daemon in the foreground has logged."""
        return (self.home.parent / "daemon.err").read_text(errors="replace")

    def end_daemon(self, number: int) -> int:
        """Send it a signal, wait for its end; returns its exit status."""
        assert self.daemon is not None
        self.daemon.send_signal(number)
        return self.daemon.wait(PATIENCE_S * 2)

    def cli(self, *arguments: str, **options: Any) -> Any:
        """A `tartarus` command with this home."""
        command = [*self.tagged(), sys.executable, "-m", "tartarus.cli.main", *arguments]
        options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
        return subprocess.Popen(command, env=self.environ, start_new_session=True, **options)

    def create(self, *command: str, level: str = "container", **options: Any) -> Sandbox:
        """A sandbox whose main command, if any, is `command`; nobody reads its output."""
        return Sandbox.create(isolation=level, command=command or None, client=self.client, **options)

    def sandboxes(self) -> list[Sandbox]:
        """All of them, ended ones too."""
        from tartarus.model.states import State

        return Sandbox.list(states=list(State), client=self.client)

    def end_of(self, sandbox: Sandbox) -> tuple[str, str]:
        """(state, reason) of a sandbox once it has ended."""
        record = sandbox.wait(PATIENCE_S)
        return record.state.value, record.reason.value if record.reason is not None else ""

    # What the host has of it.

    @property
    def socket(self) -> Path:
        return self.home / "run" / "tartarus.sock"

    def processes(self, *, daemons: bool = False) -> list[int]:
        """Every running process with this place's tag, wherever it ended up; without daemons and clients."""
        running = map(int, filter(str.isdigit, os.listdir("/proc")))
        tagged = [pid for pid in running if tag_of(pid) == self.tag]
        return [pid for pid in tagged if daemons or not _is_ours_to_keep(pid)]

    def inside(self, sandbox: Sandbox, kind: str = "") -> list[int]:
        """The processes of one sandbox, or those of one kind."""
        try:
            members = Path(f"/sys/fs/cgroup/pids/{group_name(self.home)}/{sandbox.id}/cgroup.procs").read_text()
        except OSError:
            return []
        return [pid for pid in map(int, members.split()) if not kind or kind_of(pid) == kind]

    def one(self, kind: str, sandbox: Sandbox | None = None) -> int:
        """The process of that kind, which a test is going to harm."""
        found: list[int] = []

        def alone() -> bool:
            """A process that is being forked, or has just ended, looks like its parent for a moment."""
            found[:] = self.inside(sandbox, kind) if sandbox else [p for p in self.processes() if kind_of(p) == kind]
            return len(found) == 1

        wait_until(alone, f"there is one {kind}")
        return found[0]

    def groups(self) -> list[str]:
        """The cgroups of its sandboxes and nurseries."""
        return [str(path) for path in _CGROUPS.glob(f"*/{group_name(self.home)}/*") if path.is_dir()]

    def parent_groups(self) -> list[str]:
        """The cgroups above them."""
        return [str(path) for path in _CGROUPS.glob(f"*/{group_name(self.home)}")]

    def files(self) -> list[str]:
        """Files and directories in it, but for those that a daemon keeps and the logs of sandboxes it knows."""
        known = self.recorded()
        running = self.is_running()
        found = []
        for folder, directories, names in os.walk(self.home):
            for name in [*directories, *names]:
                path = os.path.relpath(os.path.join(folder, name), self.home)
                is_log = path.startswith("logs/sbx-") and path.removeprefix("logs/").split(".")[0] in known
                is_warm_up = running and path.startswith("process/warm-")
                if not (is_log or is_warm_up or _DAEMONS_OWN.match(path) or self.keeps.match(path)):
                    found.append(path)
            if os.path.relpath(folder, self.home).startswith("cache/templates/"):
                directories.clear()
        return [path for path in found if not re.match(r"cache/templates/(rootfs|python)-[0-9a-f]+/", path)]

    def recorded(self) -> dict[str, str]:
        """The state of every sandbox, by id, as the database says."""
        path = self.home / "state.db"
        if not path.exists():
            return {}
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
            return dict(database.execute("SELECT id, state FROM sandboxes"))

    def leftovers(self) -> dict[str, object]:
        """Everything on the host that an idle daemon of this place, if one runs, should not have."""
        keep = self.parked() if self.is_running() else []
        found = {
            "processes": [describe(pid) for pid in self.processes() if pid not in keep],
            "groups": [path for path in self.groups() if not keep or not _AHEAD.search(path)],
            "mounts": sorted(set(own_mounts(self.home)) - set(self.mounts_before)),
            "files": self.files(),
            "alive": [name for name, state in self.recorded().items() if state not in _TERMINAL],
        }
        return {name: what for name, what in found.items() if what}

    def parked(self) -> list[int]:
        """Nurseries, warm interpreters and what was started ahead: a running daemon keeps those, a dead one does not."""
        return [pid for pid in self.processes() if kind_of(pid) in {"nursery", "zygote"} or _stands_ahead(pid)]

    def settle(self) -> None:
        """Wait until nothing is left that should not be; fail naming it."""
        try:
            wait_until(lambda: not self.leftovers(), "")
        except AssertionError:
            raise AssertionError(f"left behind: {self.leftovers()}") from None

    def works(self, levels: Sequence[str] = LEVELS) -> None:
        """A fresh run at each level, under a name that the dead may have had."""
        for level in levels:
            with self.create(level=level, name="phoenix") as fresh:
                assert fresh.run(["echo", "risen"]).stdout == "risen\n"
        self.settle()

    def restart(self) -> None:
        """What the next start of the daemon makes of what is there."""
        self.start()
        self.settle()
        self.works()

    def close(self) -> None:
        """End whatever a failed test left, by its tag."""
        for pid in self.processes(daemons=True):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                os.kill(pid, signal.SIGCONT)
        for frozen in _CGROUPS.glob(f"freezer/{group_name(self.home)}/*/freezer.state"):
            frozen.write_text("THAWED")
        if self.daemon is not None:
            self.daemon.wait(PATIENCE_S)
        for _ in range(500):
            for path in [*self.groups(), *self.parent_groups()]:
                with contextlib.suppress(OSError):
                    os.rmdir(path)
            if not self.parent_groups():
                break
            time.sleep(0.01)


_AHEAD = re.compile(r"/(nursery|ready)-[^/]*$")


def _stands_ahead(pid: int) -> bool:
    """Whether a process is of a guest that waits to be given away."""
    try:
        return "/ready-" in Path(f"/proc/{pid}/cgroup").read_text()
    except OSError:
        return False


_TERMINAL = {"succeeded", "failed", "killed", "timed_out", "lost"}


@contextlib.contextmanager
def place(environ: Mapping[str, str] | None = None) -> Iterator[Place]:
    """A place that other users can reach, as process-level sandboxes need; gone at the end."""
    directory = Path(tempfile.mkdtemp(prefix="tartarus-faults-", dir="/var/tmp"))
    directory.chmod(0o711)
    made = Place(directory, environ)
    database = made.home / "state.db"
    database.write_bytes(_empty_database())
    database.chmod(0o600)
    try:
        yield made
    finally:
        made.close()
        shutil.rmtree(directory, ignore_errors=True)


@functools.cache
def _empty_database() -> bytes:
    """With its tables: to make them anew takes each daemon a third of its start, and other tests see to that."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "state.db"
        engine = open_engine(path)
        migrate(engine, path)
        engine.dispose()
        return path.read_bytes()


def tag_of(pid: int) -> int:
    """The limit on pending signals of a process; -1 when it is gone or only waits to be reaped."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            if stat.read().rpartition(b")")[2].split()[0] in {b"Z", b"X"}:
                return -1
        with open(f"/proc/{pid}/limits", encoding="ascii") as limits:
            for line in limits:
                if line.startswith("Max pending signals"):
                    word = line.split()[3]
                    return int(word) if word.isdigit() else -1
    except OSError:
        return -1
    return -1


def argv_of(pid: int) -> list[str]:
    """A process' command line; empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    except OSError:
        return []


def kind_of(pid: int) -> str:
    """What part of Tartarus a process is."""
    argv = argv_of(pid)
    if any("tartarus.control.daemon" in word for word in argv):
        return "daemon"
    if any("tartarus.cli.main" in word for word in argv):
        return "client"
    try:
        is_guest_binary = "memfd:tartarus-guest" in os.readlink(f"/proc/{pid}/exe")
        # What a nursery or zygote forks keeps its maker's command line until it executes something else.
        in_sandbox = "/sbx-" in Path(f"/proc/{pid}/cgroup").read_text()
        parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
    except OSError:
        return "gone"
    if is_guest_binary:
        return "agent" if in_sandbox or argv_of(int(parent))[:2] == ["tartarus-guest", "nursery"] else "nursery"
    if argv and argv[0].endswith("/qemu-system-x86_64"):
        return "monitor"
    if any(word.endswith("/runner.py") for word in argv) and "zygote" in argv:
        return "runner" if in_sandbox else "zygote"
    return "guest"


def _is_ours_to_keep(pid: int) -> bool:
    return kind_of(pid) in {"daemon", "client"}


def describe(pid: int) -> str:
    """For a failure's message."""
    return f"{pid} {kind_of(pid)} {argv_of(pid)}"


def own_mounts(home: Path) -> list[str]:
    """Lines of this host's mount table that concern a directory or hold a namespace."""
    with open("/proc/self/mountinfo", encoding="utf-8") as table:
        # A container engine's own namespaces come and go beside us.
        return [line for line in table if str(home) in line or (" nsfs " in line and "docker" not in line)]
