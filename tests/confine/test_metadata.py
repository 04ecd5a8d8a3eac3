"""The broker changes metadata for a sandbox inside its directory, and nothing anywhere else."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import mmap
import os
import select
import signal
import socket
import struct
import subprocess
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.confine.child import error_of, execute

from tartarus.guest.program import Fd, Program
from tartarus.guest.syscalls import machine
from tartarus.model.sandbox import Isolation
from tartarus.model.template import Template
from tartarus.runtimes.base import RootFs
from tartarus.runtimes.confine import landlock
from tartarus.runtimes.confine.metadata import BROKERED, MetadataBroker, serve_one
from tartarus.runtimes.confine.seccomp import add_seccomp
from tartarus.runtimes.process import paths

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.needs("landlock")

CWD, EMPTY_PATH, NOFOLLOW = -100, 0x1000, 0x100
TIMES = struct.pack("4q", 11, 0, 22, 0)


def start(work: Callable[[], int], home: Path, link: socket.socket) -> int:
    """Fork a child that works in `home` as a process-level guest with a broker; its status is `work`'s result."""
    program = Program()
    program.syscall("prctl", 38, 1, 0, 0, 0)
    rootfs = RootFs(Template(id="t", name="t"), (), (), "digest")
    landlock.add_landlock(program, landlock.abi(), paths.rules(rootfs, home, own_terminals=False), tcp=False)
    add_seccomp(program, Isolation.PROCESS, landlock_abi=landlock.abi(), broker=Fd(0))
    pid = os.fork()
    if pid == 0:
        status = 255
        try:
            os.chdir(home)
            execute(program, [link.fileno()])
            status = work()
        finally:
            os._exit(status)
    link.close()
    return pid


def serve_all(ours: socket.socket, home: Path) -> None:
    """Serve until the last process behind the filter has ended."""
    _data, fds, _flags, _address = socket.recv_fds(ours, 1, 1)
    poll = select.poll()
    poll.register(fds[0], select.POLLIN)
    while poll.poll()[0][1] & select.POLLIN:
        serve_one(fds[0], [os.path.realpath(home)])
    os.close(fds[0])


def brokered(work: Callable[[], int], home: Path) -> int:
    """`work`'s result (0 to 255) in a guest whose broker runs here."""
    ours, theirs = socket.socketpair()
    with ours:
        pid = start(work, home, theirs)
        server = threading.Thread(target=serve_all, args=(ours, home))
        server.start()
        _, status = os.waitpid(pid, 0)
        server.join()
    return os.waitstatus_to_exitcode(status)


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    for name in ("home", "outside"):
        (tmp_path / name / "dir").mkdir(parents=True)
        (tmp_path / name / "file").write_text("text")
        (tmp_path / name / "file").chmod(0o600)
        os.utime(tmp_path / name / "file", (1, 1))
    (tmp_path / "home/out").symlink_to("../outside/file")
    (tmp_path / "home/in").symlink_to("file")
    (tmp_path / "home/loop").symlink_to("loop")
    before = (tmp_path / "outside/file").stat(), os.listxattr(tmp_path / "outside/file")
    yield tmp_path / "home"
    assert ((tmp_path / "outside/file").stat(), os.listxattr(tmp_path / "outside/file")) == before


# (what, call, errno, what the file's mode and modification time are then)
UNTOUCHED = (0o600, 1)
CASES: list[tuple[str, Callable[[Path], tuple[Any, ...]], int, tuple[int, float]]] = [
    ("relative", lambda home: ("fchmodat", CWD, b"file", 0o750), 0, (0o750, 1)),
    ("absolute", lambda home: ("fchmodat", -1, bytes(home / "file"), 0o750), 0, (0o750, 1)),
    ("through a link", lambda home: ("fchmodat", CWD, b"in", 0o750), 0, (0o750, 1)),
    ("by a crooked way", lambda home: ("fchmodat", CWD, b"dir/../../home//./file", 0o750), 0, (0o750, 1)),
    ("new call", lambda home: ("fchmodat2", CWD, b"file", 0o750, 0), 0, (0o750, 1)),
    ("sticky", lambda home: ("fchmodat", CWD, b"file", 0o1750), 0, (0o1750, 1)),
    ("set-user-id", lambda home: ("fchmodat", CWD, b"file", 0o4750), errno.EPERM, UNTOUCHED),
    ("outside", lambda home: ("fchmodat", CWD, b"../outside/file", 0o777), errno.EPERM, UNTOUCHED),
    ("outside, absolute", lambda home: ("fchmodat", CWD, bytes(home.parent / "outside/file"), 0o777), errno.EPERM, UNTOUCHED),
    ("outside, through a link", lambda home: ("fchmodat", CWD, b"out", 0o777), errno.EPERM, UNTOUCHED),
    ("the directory's parent", lambda home: ("fchmodat", CWD, b"..", 0o777), errno.EPERM, UNTOUCHED),
    ("a name that only begins alike", lambda home: ("fchmodat", CWD, bytes(home) + b"2", 0o777), errno.EPERM, UNTOUCHED),
    ("somebody's program", lambda home: ("fchmodat", CWD, b"/bin/sh", 0o777), errno.EPERM, UNTOUCHED),
    ("missing", lambda home: ("fchmodat", CWD, b"missing", 0o777), errno.ENOENT, UNTOUCHED),
    ("no path", lambda home: ("fchmodat", CWD, b"", 0o777), errno.ENOENT, UNTOUCHED),
    ("not a directory", lambda home: ("fchmodat", CWD, b"file/x", 0o777), errno.ENOTDIR, UNTOUCHED),
    ("a link to itself", lambda home: ("fchmodat", CWD, b"loop", 0o777), errno.ELOOP, UNTOUCHED),
    ("too long", lambda home: ("fchmodat", CWD, b"x" * 9000, 0o777), errno.ENAMETOOLONG, UNTOUCHED),
    ("no pointer", lambda home: ("fchmodat", CWD, 0, 0o777), errno.EFAULT, UNTOUCHED),
    ("a wild pointer", lambda home: ("fchmodat", CWD, 1 << 63 | 5, 0o777), errno.EFAULT, UNTOUCHED),
    ("a closed directory", lambda home: ("fchmodat", 99_999, b"file", 0o777), errno.EBADF, UNTOUCHED),
    ("times", lambda home: ("utimensat", CWD, b"file", TIMES, 0), 0, (0o600, 22)),
    ("times of a link", lambda home: ("utimensat", CWD, b"in", TIMES, NOFOLLOW), 0, UNTOUCHED),
    ("times of a link to outside", lambda home: ("utimensat", CWD, b"out", TIMES, NOFOLLOW), 0, UNTOUCHED),
    ("times through a link to outside", lambda home: ("utimensat", CWD, b"out", TIMES, 0), errno.EPERM, UNTOUCHED),
    ("keeping times", lambda home: ("utimensat", CWD, b"file", struct.pack("4q", 0, (1 << 30) - 2, 0, (1 << 30) - 2), 0), 0,
     UNTOUCHED),
    ("wrong times", lambda home: ("utimensat", CWD, b"file", struct.pack("4q", 0, 1 << 40, 0, 0), 0), errno.EINVAL, UNTOUCHED),
    ("unreadable times", lambda home: ("utimensat", CWD, b"file", 8, 0), errno.EFAULT, UNTOUCHED),
    ("mode of a link", lambda home: ("fchmodat2", CWD, b"in", 0o777, NOFOLLOW), errno.EOPNOTSUPP, UNTOUCHED),
    ("owner, the same", lambda home: ("fchownat", CWD, b"file", os.getuid(), -1, 0), 0, UNTOUCHED),
    ("owner, another", lambda home: ("fchownat", CWD, b"file", 4242, -1, 0), errno.EPERM, UNTOUCHED),
    ("group, another", lambda home: ("fchownat", CWD, b"file", -1, 4242, 0), errno.EPERM, UNTOUCHED),
    ("owner of a link", lambda home: ("fchownat", CWD, b"out", -1, -1, NOFOLLOW), 0, UNTOUCHED),
    ("attribute", lambda home: ("setxattr", b"file", b"user.a", b"value", 5, 0), 0, UNTOUCHED),
    ("attribute of ours", lambda home: ("setxattr", b"file", b"security.a", b"value", 5, 0), errno.EPERM, UNTOUCHED),
    ("access list", lambda home: ("setxattr", b"file", b"system.posix_acl_access", b"", 0, 0), errno.EOPNOTSUPP, UNTOUCHED),
    ("attribute outside", lambda home: ("setxattr", b"out", b"user.a", b"value", 5, 0), errno.EPERM, UNTOUCHED),
    ("attribute too large", lambda home: ("setxattr", b"file", b"user.a", b"", 1 << 40, 0), errno.E2BIG, UNTOUCHED),
    ("attribute that is not there", lambda home: ("removexattr", b"file", b"user.b"), errno.ENODATA, UNTOUCHED),
]  # fmt: skip
if machine() == "x86_64":
    CASES += [
        ("oldest call", lambda home: ("chmod", b"file", 0o750), 0, (0o750, 1)),
        ("oldest call, outside", lambda home: ("chmod", b"out", 0o750), errno.EPERM, UNTOUCHED),
        ("seconds", lambda home: ("utime", b"file", struct.pack("2q", 5, 6)), 0, (0o600, 6)),
        ("microseconds", lambda home: ("utimes", b"file", struct.pack("4q", 5, 0, 6, 500_000)), 0, (0o600, 6.5)),
        (
            "too many of them",
            lambda home: ("utimes", b"file", struct.pack("4q", 5, 0, 6, 1 << 20)),
            errno.EINVAL,
            UNTOUCHED,
        ),
        ("at a directory", lambda home: ("futimesat", CWD, b"file", struct.pack("4q", 5, 0, 6, 0)), 0, (0o600, 6)),
        ("old chown", lambda home: ("chown", b"out", -1, -1), errno.EPERM, UNTOUCHED),
        ("old chown of a link", lambda home: ("lchown", b"out", -1, -1), 0, UNTOUCHED),
    ]


@pytest.mark.parametrize(("request_", "error", "then"), [pytest.param(*rest, id=what) for what, *rest in CASES])
def test_calls(request_: Callable[[Path], tuple[Any, ...]], error: int, then: tuple[int, float], home: Path) -> None:
    Path(f"{home}2").mkdir()
    wanted = request_(home)
    assert brokered(lambda: error_of(*wanted), home) == error
    stat = (home / "file").stat()
    assert (stat.st_mode & 0o7777, stat.st_mtime) == then


def test_descriptors_name_files_too(home: Path) -> None:
    def work() -> int:
        directory = os.open("dir/..", os.O_PATH)
        file = os.open("file", os.O_PATH)
        outside = os.open("../outside/file", os.O_PATH)
        errors = [
            error_of("fchmodat", directory, b"file", 0o710),
            error_of("fchmodat2", file, b"", 0o720, EMPTY_PATH),
            error_of("fchmodat", CWD, b"/proc/self/fd/%d" % file, 0o730),
            error_of("fchmodat2", outside, b"", 0o777, EMPTY_PATH),
            error_of("fchmodat", CWD, b"/proc/self/fd/%d" % outside, 0o777),
            error_of("fchmodat", outside, b"x", 0o777),
            error_of("utimensat", outside, b"", TIMES, EMPTY_PATH),
        ]
        return int(errors != [0, 0, 0, errno.EPERM, errno.EPERM, errno.ENOTDIR, errno.EPERM])

    assert brokered(work, home) == 0
    assert (home / "file").stat().st_mode & 0o777 == 0o730


def test_open_files_are_judged_by_where_they_lie(home: Path) -> None:
    def work() -> int:
        # What Landlock lets be read is enough for the kernel, but not for the broker.
        inside, outside = os.open("file", os.O_RDONLY), os.open("/bin/sh", os.O_RDONLY)
        reader, _writer = os.pipe()
        errors = []
        for fd in (inside, outside, reader, 99_999):
            errors += [
                error_of("fchmod", fd, 0o740),
                error_of("fchown", fd, os.getuid(), -1),
                error_of("utimensat", fd, 0, TIMES, 0),
                error_of("fsetxattr", fd, b"user.a", b"x", 1, 0),
                error_of("fremovexattr", fd, b"user.a"),
            ]
        errors += [error_of("fchmod", CWD, 0o700), error_of("utimensat", CWD, 0, TIMES, 0)]
        wrong = [errno.EPERM] * 10 + [errno.EBADF] * 5 + [errno.EFAULT] * 2
        return int(errors != [0] * 5 + wrong)

    assert brokered(work, home) == 0
    stat = (home / "file").stat()
    assert (stat.st_mode & 0o7777, stat.st_mtime) == (0o740, 22)


def test_attributes_arrive_whole(home: Path) -> None:
    value = os.urandom(3000)

    def work() -> int:
        os.setxattr("file", "user.kept", value)
        os.setxattr("file", "user.gone", b"x")
        os.removexattr("file", "user.gone")
        return int(os.getxattr("file", "user.kept") != value)

    assert brokered(work, home) == 0
    assert os.listxattr(home / "file") == ["user.kept"]


def test_a_path_at_the_end_of_memory(home: Path) -> None:
    def work() -> int:
        area = mmap.mmap(-1, 2 * mmap.PAGESIZE)
        end = ctypes.addressof(ctypes.c_char.from_buffer(area)) + mmap.PAGESIZE
        ctypes.CDLL(None).munmap(ctypes.c_void_p(end), mmap.PAGESIZE)
        ctypes.memmove(end - 5, b"file\0", 5)
        ended = error_of("fchmodat", CWD, end - 5, 0o711)
        ctypes.memmove(end - 4, b"file", 4)
        cut = error_of("fchmodat", CWD, end - 4, 0o777)
        return int((ended, cut) != (0, errno.EFAULT))

    assert brokered(work, home) == 0
    assert (home / "file").stat().st_mode & 0o7777 == 0o711


def test_many_callers_at_once(home: Path) -> None:
    def work() -> int:
        def one(n: int) -> None:
            path = Path(f"new{n}")
            path.touch()
            for mode in (0o600, 0o640, 0o700 | n):
                path.chmod(mode)

        workers = [threading.Thread(target=one, args=(n,)) for n in range(8)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return 0

    assert brokered(work, home) == 0
    assert [(home / f"new{n}").stat().st_mode & 0o777 for n in range(8)] == [0o700 | n for n in range(8)]


def test_a_caller_that_can_not_be_read_is_refused(home: Path) -> None:
    def work() -> int:
        error_of("prctl", 4, 0, 0, 0, 0)  # undumpable
        return error_of("fchmodat", CWD, b"file", 0o750)

    if os.geteuid() == 0:
        assert brokered(work, home) == 0  # root may read it all the same
    else:
        assert brokered(work, home) == errno.EPERM


def test_nothing_of_the_broker_is_left_in_the_guest(home: Path) -> None:
    def work() -> int:
        links = [os.readlink(f"/proc/self/fd/{fd}") for fd in range(1024) if _is_open(fd)]
        return sum("seccomp" in link for link in links)

    assert brokered(work, home) == 0


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_every_brokered_call_is_tried() -> None:
    tried = {request_(Path("/"))[0] for _, request_, _, _ in CASES} | {"setxattr", "removexattr"}
    by_descriptor = {"fchmod", "fchown", "fsetxattr", "fremovexattr"}
    old = {"lsetxattr", "lremovexattr", "chmod", "utime", "utimes", "futimesat", "chown", "lchown"}
    assert BROKERED - tried - by_descriptor <= old


@pytest.mark.needs("git", "cc")
def test_programs_that_change_metadata(home: Path) -> None:
    script = """
        set -e
        printf '#!/bin/sh\\necho ran' > script; chmod +x script; test "$(./script)" = ran
        touch -d '2001-02-03 04:05:06 UTC' dated; test "$(stat -c %Y dated)" = 981173106
        echo 'int main(void) { return 0; }' > a.c; cc a.c -o a; ./a
        mkdir t; touch -d @5 t/f; chmod 640 t/f; tar cf t.tar t; rm -r t; tar xpf t.tar; test "$(stat -c %a%Y t/f)" = 6405
        cp -p dated copy; test "$(stat -c %Y copy)" = 981173106
        git init -q r; cd r; git config user.email a@b.c; git config user.name n
        echo x > f; git add f; git commit -qm x; git clone -q . ../clone; test -f ../clone/f
        ! chmod 777 /bin/sh ../../outside/file 2>/dev/null
    """

    def work() -> int:
        environment = {"HOME": str(home), "TMPDIR": str(home), "PATH": os.environ["PATH"], "GIT_CONFIG_NOSYSTEM": "1"}
        return subprocess.run(["/bin/sh", "-c", script], env=environment, check=False).returncode

    assert brokered(work, home) == 0


# On an event loop, as the daemon runs it.


async def test_on_a_loop(home: Path, anyio_backend: str) -> None:
    ours, theirs = socket.socketpair()
    broker = MetadataBroker(ours, [str(home)])
    pid = start(lambda: error_of("fchmodat", CWD, b"file", 0o711), home, theirs)
    _, status = await asyncio.to_thread(os.waitpid, pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert (home / "file").stat().st_mode & 0o777 == 0o711
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(5):
            while broker._listener >= 0:  # it lets go by itself once the last process has ended
                await asyncio.sleep(0.01)
    assert broker._listener == -1
    broker.close()


async def test_closing_releases_waiting_callers(home: Path, anyio_backend: str) -> None:
    ours, theirs = socket.socketpair()
    broker = MetadataBroker(ours, [str(home)])
    pid = start(lambda: signal.sigwait({signal.SIGUSR1}) and error_of("fchmodat", CWD, b"file", 0o777), home, theirs)
    while broker._listener < 0:
        await asyncio.sleep(0.005)
    broker.close()
    broker.close()
    os.kill(pid, signal.SIGUSR1)
    _, status = await asyncio.to_thread(os.waitpid, pid, 0)
    assert os.waitstatus_to_exitcode(status) in {errno.ENOSYS, -signal.SIGUSR1}


async def test_a_guest_that_died_before_its_filter(tmp_path: Path, anyio_backend: str) -> None:
    ours, theirs = socket.socketpair()
    broker = MetadataBroker(ours, [str(tmp_path)])
    theirs.close()
    while broker._link is not None:
        await asyncio.sleep(0.005)
    broker.close()
