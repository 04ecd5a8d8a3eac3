"""Real Landlock domains in real children, and how rulesets shrink on older kernels."""

from __future__ import annotations

import errno
import os
import signal
import socket
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.confine.child import call, error_of, in_child

from tartarus.guest.program import Program
from tartarus.model.template import Template
from tartarus.runtimes.base import RootFs
from tartarus.runtimes.confine import landlock
from tartarus.runtimes.confine.landlock import (
    DEVICE,
    READ,
    RUN,
    WRITE,
    Access,
    PathRule,
    add_landlock,
    handled_access,
    unenforceable,
)
from tartarus.runtimes.container.layout import LANDLOCK_RULES
from tartarus.runtimes.process import paths

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

needs_landlock = pytest.mark.needs("landlock")
ABI = landlock.abi()


def confined(work: Callable[[], Any], rules: Sequence[PathRule], **options: Any) -> Any:
    """`work`'s result in a child inside the domain."""

    def setup(program: Program) -> None:
        program.syscall("prctl", 38, 1, 0, 0, 0)
        add_landlock(program, options.pop("abi", ABI), rules, **options)

    return in_child(work, setup=setup)


def outcome(work: Callable[[], Any]) -> int:
    """The errno that `work` fails with; 0 when it does not."""
    try:
        work()
    except OSError as error:
        return error.errno or -1
    return 0


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("in", "out", "ro"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("text")
        (tmp_path / name / "program").write_bytes(Path("/bin/true").read_bytes())
        (tmp_path / name / "program").chmod(0o755)
        (tmp_path / name / "dir").mkdir()
    return tmp_path


def _run(path: Path) -> None:
    pid = os.fork()
    if pid == 0:
        try:
            os.execv(path, ["program"])
        except OSError as error:
            os._exit(error.errno or 1)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status:
        raise OSError(status, os.strerror(status))


def _mkfifo(path: Path) -> None:
    os.mkfifo(path / "new")


ACTIONS: dict[str, Callable[[Path], Any]] = {
    "read a file": lambda at: (at / "file").read_text(),
    "list": os.listdir,
    "run": lambda at: _run(at / "program"),
    "write a file": lambda at: (at / "file").open("r+").close(),
    "cut a file by path": lambda at: os.truncate(at / "file", 1),
    "cut a file by opening it": lambda at: os.close(os.open(at / "file", os.O_RDONLY | os.O_TRUNC)),
    "create a file": lambda at: (at / "new").touch(),
    "remove a file": lambda at: (at / "file").unlink(),
    "make a directory": lambda at: (at / "new").mkdir(),
    "remove a directory": lambda at: (at / "dir").rmdir(),
    "link softly": lambda at: (at / "new").symlink_to("file"),
    "link": lambda at: os.link(at / "file", at / "new"),
    "rename": lambda at: (at / "file").rename(at / "new"),
    "move": lambda at: (at / "file").rename(at / "dir" / "file"),
    "make a fifo": _mkfifo,
}
READS = {"read a file", "list", "run"}


@needs_landlock
@pytest.mark.parametrize("place", ["in", "ro", "out"])
@pytest.mark.parametrize("action", ACTIONS)
def test_actions(action: str, place: str, tree: Path) -> None:
    rules = [PathRule("/usr", RUN), PathRule("/lib", RUN), PathRule("/lib64", RUN), PathRule("/etc", READ)]
    rules += [PathRule(str(tree / "in"), RUN | WRITE), PathRule(str(tree / "ro"), RUN)]
    found = confined(lambda: outcome(lambda: ACTIONS[action](tree / place)), rules)
    allowed = place == "in" or (place == "ro" and action in READS)
    assert found == 0 if allowed else found in {errno.EACCES, errno.EXDEV}


@needs_landlock
def test_moving_in_and_out(tree: Path) -> None:
    def attempt() -> list[int]:
        return [
            outcome(lambda: (tree / "in/file").rename(tree / "out/stolen")),
            outcome(lambda: (tree / "out/file").rename(tree / "in/stolen")),
            outcome(lambda: os.link(tree / "out/file", tree / "in/stolen")),
            outcome(lambda: os.link(tree / "ro/file", tree / "in/stolen")),
        ]

    rules = [PathRule(str(tree / "in"), RUN | WRITE), PathRule(str(tree / "ro"), RUN)]
    assert all(error in {errno.EACCES, errno.EXDEV} for error in confined(attempt, rules))


@needs_landlock
def test_links_lead_nowhere(tree: Path) -> None:
    (tree / "in/link").symlink_to(tree / "out/file")
    (tree / "in/loop").symlink_to("/proc/self/cwd/../out/file")

    def attempt() -> list[int]:
        os.chdir(tree / "in")
        return [
            outcome(lambda: Path("link").read_text()),
            outcome(lambda: Path("loop").read_text()),
            outcome(lambda: Path("../out/file").read_text()),
            outcome(lambda: os.close(os.open("/proc/self/root/etc/passwd", os.O_RDONLY))),
        ]

    rules = [PathRule(str(tree / "in"), RUN | WRITE)]
    assert confined(attempt, rules) == [errno.EACCES] * 4


@needs_landlock
def test_descriptors_opened_as_paths_open_nothing(tree: Path) -> None:
    def attempt() -> list[int]:
        fd = os.open(tree / "out/file", os.O_PATH)
        directory = os.open(tree / "out", os.O_PATH)
        return [
            outcome(lambda: os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)),
            outcome(lambda: os.open("file", os.O_RDONLY, dir_fd=directory)),
            outcome(lambda: os.listdir(directory)),
        ]

    assert confined(attempt, [PathRule(str(tree / "in"), RUN | WRITE)]) == [errno.EACCES, errno.EACCES, errno.EBADF]


@needs_landlock
def test_a_program_in_memory_runs(tree: Path) -> None:
    """The guest agent is started from a memfd, which no rule names."""
    memfd = os.memfd_create("agent")
    os.write(memfd, Path("/bin/true").read_bytes())

    def attempt() -> int:
        pid = os.fork()
        if pid == 0:
            os.execve(memfd, ["agent"], {})
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    assert confined(attempt, [PathRule("/usr", RUN), PathRule("/lib", RUN), PathRule("/etc", READ)]) == 0


@needs_landlock
def test_a_rule_on_a_file_and_one_on_nothing(tree: Path) -> None:
    rules = [PathRule(str(tree / "out/file"), RUN | WRITE, file=True), PathRule("/there/is/nothing", RUN)]
    found = confined(lambda: [outcome((tree / "out" / name).read_bytes) for name in ("file", "program")], rules)
    assert found == [0, errno.EACCES]


@needs_landlock
def test_a_rule_that_can_not_be_set_fails_by_name(tree: Path) -> None:
    rule = PathRule(str(tree / "out/file"), RUN)  # not said to be a file
    with pytest.raises(AssertionError, match=r"StepFailed: allow /.*/out/file: EINVAL"):
        confined(lambda: None, [rule])


@needs_landlock
def test_no_descriptor_is_left_open(tree: Path) -> None:
    before = in_child(lambda: sorted(os.listdir("/proc/self/fd")))
    rules = [PathRule("/", RUN | WRITE), PathRule("/proc", READ), PathRule("/nothing", READ)]
    assert confined(lambda: sorted(os.listdir("/proc/self/fd")), rules) == before


@needs_landlock
def test_signals_stay_inside() -> None:
    outside = os.fork()
    if outside == 0:
        signal.pause()
        os._exit(0)

    def attempt() -> list[int]:
        inside = os.fork()
        if inside == 0:
            signal.pause()
            os._exit(0)
        pidfd = os.pidfd_open(outside)
        errors = [
            outcome(lambda: os.kill(outside, 0)),
            outcome(lambda: os.kill(os.getppid(), signal.SIGCONT)),
            error_of("tgkill", outside, outside, 18),
            error_of("rt_sigqueueinfo", outside, 18, struct.pack("iii", 18, 0, -1) + bytes(116)),
            error_of("pidfd_send_signal", pidfd, 18, 0, 0),
            outcome(lambda: os.kill(inside, signal.SIGKILL)),
        ]
        os.waitpid(inside, 0)
        return errors

    try:
        found = confined(attempt, [])
    finally:
        os.kill(outside, signal.SIGKILL)
        os.waitpid(outside, 0)
    if ABI >= 6:
        assert found == [errno.EPERM] * 5 + [0]
    else:
        assert any("signals" in gap for gap in unenforceable(ABI))


@needs_landlock
def test_abstract_sockets_stay_inside() -> None:
    name = f"\0tartarus-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(name)
        server.listen()
        found = confined(lambda: outcome(lambda: socket.socket(socket.AF_UNIX).connect(name)), [])
    if ABI >= 6:
        assert found == errno.EPERM


@needs_landlock
def test_tcp_is_closed_where_asked() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()

        def attempt() -> list[int]:
            return [
                outcome(lambda: socket.socket().connect(address)),
                outcome(lambda: socket.socket().bind(("127.0.0.1", 0))),
            ]

        closed, left_alone = confined(attempt, [], tcp=False), confined(attempt, [])
    assert left_alone == [0, 0]
    if ABI >= 4:
        assert closed == [errno.EACCES, errno.EACCES]


@needs_landlock
def test_tracing_out_is_refused() -> None:
    outside = os.fork()
    if outside == 0:
        signal.pause()
        os._exit(0)
    try:
        # PTRACE_ATTACH, which would succeed without the domain: same user, and our own child.
        found = confined(lambda: error_of("ptrace", 16, outside, 0, 0), [])
    finally:
        os.kill(outside, signal.SIGKILL)
        os.waitpid(outside, 0)
    assert found == errno.EPERM


@needs_landlock
def test_no_new_mounts() -> None:
    found = confined(lambda: error_of("mount", b"none", b"/mnt", b"tmpfs", 0, 0), [PathRule("/", RUN | WRITE)])
    assert found == errno.EPERM


@needs_landlock
@pytest.mark.parametrize("abi", range(1, ABI + 1))
def test_every_older_ruleset_works_here(abi: int, tree: Path) -> None:
    """A newer kernel takes an older program as it is, so each version's shape can be tried on it."""
    rules = [PathRule(str(tree / "in"), RUN | WRITE | Access.IOCTL_DEV)]

    def attempt() -> list[int]:
        return [
            outcome((tree / "in/new").touch),
            outcome((tree / "out/new").touch),
            outcome(lambda: (tree / "in/file").rename(tree / "in/dir/file")),
        ]

    assert confined(attempt, rules, abi=abi, tcp=False) == [0, errno.EACCES, errno.EXDEV if abi < 2 else 0]


def test_what_each_version_handles() -> None:
    assert [handled_access(abi) for abi in (0, 1, 2, 3, 4, 5, 6, 7, 99)] == [
        0, 0x1FFF, 0x3FFF, 0x7FFF, 0x7FFF, 0xFFFF, 0xFFFF, 0xFFFF, 0xFFFF,
    ]  # fmt: skip


def test_what_each_version_lacks() -> None:
    assert [len(unenforceable(abi)) for abi in range(9)] == [1, 4, 3, 2, 2, 1, 0, 0, 0]
    assert "no Landlock" in unenforceable(0)[0]


def test_nothing_is_added_without_landlock() -> None:
    program = Program()
    add_landlock(program, 0, [PathRule("/", RUN)])
    assert program.steps == []


# The two levels' own domains.


def process_domain(work: Callable[[], Any], home: Path, *, readable: Sequence[str] = (), own_uid: bool = False) -> Any:
    rootfs = RootFs(Template(id="t", name="t"), tuple(Path(path) for path in readable), (), "digest")
    return confined(work, paths.rules(rootfs, home, own_terminals=own_uid), tcp=False)


@needs_landlock
@pytest.mark.parametrize(
    "path",
    [
        "/etc/shadow", "/etc/machine-id", "/etc/hostname", "/etc/fstab", "/root", "/home", "/var/log", "/run", "/boot",
        "/proc", "/proc/1/cmdline", "/proc/1/status", "/proc/self/maps", "/proc/self/environ", "/proc/mounts",
        "/proc/net/tcp", "/proc/kallsyms", "/sys", "/sys/class/net", "/sys/kernel/debug", "/dev", "/dev/shm",
        "/dev/pts", "/dev/mem", "/dev/kmsg", "/tmp", "/var/tmp", "/", "/mnt", "/srv", "/media",
    ],
)  # fmt: skip
def test_process_level_does_not_see(path: str, tmp_path: Path) -> None:
    if not Path(path).exists():
        return  # nothing to hide here
    found = process_domain(lambda: outcome(lambda: os.close(os.open(path, os.O_RDONLY))), tmp_path)
    assert found == errno.EACCES


@needs_landlock
@pytest.mark.parametrize(
    "path",
    ["/usr/bin/env", "/usr/lib", "/etc/passwd", "/etc/ld.so.cache", "/dev/null", "/dev/urandom", "/proc/meminfo"],
)
def test_process_level_sees(path: str, tmp_path: Path) -> None:
    assert process_domain(lambda: outcome(lambda: os.close(os.open(path, os.O_RDONLY))), tmp_path) == 0


@needs_landlock
def test_process_level_writes_only_at_home(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "layer").mkdir()

    def attempt() -> list[int]:
        return [
            outcome((tmp_path / place / "new").touch)
            for place in ("home", "layer", "/usr", "/tmp", "/etc", "/dev/shm", "/var/tmp")
        ] + [outcome(lambda: Path("/dev/null").write_text("x"))]

    found = process_domain(attempt, tmp_path / "home", readable=[str(tmp_path / "layer")])
    assert found[0] == 0
    assert found[-1] == 0
    assert set(found[1:-1]) <= {errno.EACCES, errno.EROFS}


@needs_landlock
@pytest.mark.parametrize("own_uid", [True, False])
def test_terminals_need_a_user_id_of_ones_own(own_uid: bool, tmp_path: Path) -> None:
    found = process_domain(lambda: outcome(lambda: [os.close(fd) for fd in os.openpty()]), tmp_path, own_uid=own_uid)
    assert found == (0 if own_uid else errno.EACCES)


@needs_landlock
def test_container_domain(tmp_path: Path) -> None:
    # Here /dev/ptmx is a device; in the container's /dev it is a link into its own devpts.
    rules = [*LANDLOCK_RULES, PathRule("/dev/ptmx", DEVICE, file=True)]

    def attempt() -> list[int]:
        master, slave = os.openpty()
        return [
            outcome((tmp_path / "new").touch),
            outcome(lambda: _run(Path("/bin/true"))),
            outcome(lambda: os.mkfifo(tmp_path / "fifo")),
            outcome(lambda: os.get_terminal_size(slave)),
            error_of("mknodat", -100, bytes(tmp_path / "device"), 0o020666, 0x103),
            error_of("mknodat", -100, bytes(tmp_path / "device"), 0o060666, 0x800),
            call("ioctl", master, 0x5413, b"\0" * 8)[1],
        ]

    assert confined(attempt, rules) == [0, 0, 0, 0, errno.EACCES, errno.EACCES, 0]


@needs_landlock
def test_devices_elsewhere_take_no_commands() -> None:
    """The right to device commands is found when the device is opened."""
    if ABI < 5:
        assert any("ioctl" in gap for gap in unenforceable(ABI))
        return
    rules = [PathRule("/dev", DEVICE & ~Access.IOCTL_DEV | READ)]

    def attempt() -> int:
        with open("/dev/urandom", "rb") as device:
            return error_of("ioctl", device.fileno(), 0x80045200, b"\0" * 4)

    assert confined(attempt, rules) == errno.EACCES
