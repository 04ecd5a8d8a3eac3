"""The host's hold on a nursery process and the warmed interpreter (zygote) inside it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import signal
import socket
import struct
from collections.abc import Sequence
from typing import Protocol

from tartarus.guest.binary import agent_memfd
from tartarus.guest.program import Program
from tartarus.model.errors import GuestFailed, NoSpace, TemplateFailed
from tartarus.model.sandbox import Resources
from tartarus.model.template import Template
from tartarus.runtimes.base import GUEST_PREFIX, base_environment
from tartarus.runtimes.packets import Answer, ControlSocket

_CLONE = struct.Struct("<QI")
_USER_NAMESPACE = struct.Struct("<III")
_ZYGOTE_LOG_BYTES = 8192
_LOW_FDS = 16
_END_GRACE_S = 2.0
_END_TIMEOUT_S = 10.0
WARM_UP_TIMEOUT_S = 120.0
_MIN_MEMORY_BYTES = 256 * 1024**2
_MAX_TASKS = 2048
_EXHAUSTED = frozenset({errno.EAGAIN, errno.ENOMEM, errno.ENFILE, errno.EMFILE, errno.ENOSPC})


def nursery_limits() -> Resources:
    """What a nursery's own group may use: half of the host's memory, and tasks enough for bursts of starting guests.

    Guests have groups of their own, but a warm-up runs here, and it is foreign code; so are the packages it imports.
    """
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Resources(
        memory_bytes=max(memory // 2, _MIN_MEMORY_BYTES), cpu_milli=1000 * (os.cpu_count() or 1), pids=_MAX_TASKS
    )


class Clone:
    """One process that a nursery or zygote forked: its host pid and a pidfd that stays its own."""

    __slots__ = ("pid", "pidfd")

    def __init__(self, pidfd: int) -> None:
        self.pidfd = pidfd
        self.pid = pid_of(pidfd)


def pid_of(pidfd: int) -> int:
    """The host's pid of a pidfd; -1 when that process is gone. Raises OSError for what is no pidfd."""
    with open(f"/proc/self/fdinfo/{pidfd}", encoding="ascii") as info:
        for line in info:
            if line.startswith("Pid:"):
                return int(line.split()[1])
    # A hostile interpreter hands over what it likes; nothing else can be waited for, or killed.
    raise OSError(errno.EBADF, "not a process")


class Nursery:
    """A running nursery. Closing its socket ends it, and with it every guest it made."""

    def __init__(self, control: ControlSocket, pid: int, what: str) -> None:
        self.control = control
        self.pid = pid
        self.what = what
        self._pidfd = os.pidfd_open(pid)

    @classmethod
    async def spawn(cls, what: str, *, shared_pids: bool) -> Nursery:
        """Start one, unconfined yet: `run` and `fork` make it a template's."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            pid = _spawn_process(theirs.fileno(), shared_pids=shared_pids)
        except OSError as error:
            ours.close()
            raise exhausted_or_failed("the nursery can't be started", error.errno or 0) from error
        finally:
            theirs.close()
        return cls(ControlSocket(ours, f"nursery of {what}"), pid, what)

    async def run(self, program: Program, fds: Sequence[int] = ()) -> None:
        """Run a program in the nursery itself. Raises GuestFailed naming the step."""
        answer = await self.control.request(b"TRUN", program.encode(), fds)
        if answer.error:
            raise step_failed(f"preparing {self.what}", program.steps, answer.value, answer.error)

    async def fork(self) -> None:
        """Let a child go on as pid 1 of the pid namespace that a program unshared."""
        parent = self.pid
        answer = self._check(await self.control.request(b"TFRK"), "fork")
        os.close(self._pidfd)
        self._pidfd = answer.pidfd
        self.pid = pid_of(answer.pidfd)
        await asyncio.to_thread(os.waitpid, parent, 0)

    async def clone(self, encoded: bytes, flags: int, fds: Sequence[int]) -> Clone:
        """Fork a guest that runs an encoded program and becomes the agent. `fds[0]` is its channel."""
        return await clone(self.control, encoded, flags, fds, self.what)

    async def user_namespace(self, span: int, inotify_instances: int, inotify_watches: int) -> int:
        """A descriptor of a new user namespace below its own, which maps ids 0 to `span` - 1 to themselves.

        Whoever is in it has no more inotify instances and watches than these. Raises GuestFailed or NoSpace.
        """
        what = "make a user namespace"
        body = _USER_NAMESPACE.pack(span, inotify_instances, inotify_watches)
        namespace = self._check(await self.control.request(b"TUSR", body), what).pidfd
        if namespace < 0:
            raise exhausted_or_failed(f"the nursery of {self.what} can't {what}", errno.EMFILE)
        return namespace

    async def start_zygote(
        self, argv: Sequence[str], env: dict[str, str], confinement: Program, *, timeout_s: float
    ) -> Zygote:
        """Start the warm interpreter and wait until it is parked. Raises TemplateFailed with what it printed.

        `confinement` is run first: a template's warm-up is code that nobody vouches for, too.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        log_read, log_write = os.pipe()
        try:
            program = confinement.encode()
            body = (
                struct.pack("<I", len(program))
                + program
                + _strings(argv)
                + _strings([f"{name}={value}" for name, value in env.items()])
            )
            answer = self._check(
                await self.control.request(b"TZYG", body, [theirs.fileno(), log_write]), "start the interpreter"
            )
        except BaseException:
            ours.close()
            os.close(log_read)
            raise
        finally:
            theirs.close()
            os.close(log_write)
        zygote = Zygote(ControlSocket(ours, f"warm interpreter of {self.what}"), answer.pidfd)
        try:
            await zygote.wait_ready(timeout_s, log_read, self.what)
        except BaseException:
            zygote.close()
            raise
        finally:
            os.close(log_read)
        return zygote

    async def end_guest(self, pid: int) -> None:
        """Kill a guest with all that runs below it, and orphans; needed only where guests share the host's pids.

        `pid` 0: only the orphans of guests that are gone.
        """
        await self.control.request(b"TEND", struct.pack("<i", pid))

    def close(self) -> None:
        """Let it end."""
        self.control.close()

    async def gone(self) -> None:
        """Wait until it has ended, and with it all of its pid namespace; reap it where it is our child."""
        if self._pidfd >= 0:
            pidfd, self._pidfd = self._pidfd, -1
            try:
                if self.control.is_stuck or not await _ends(pidfd, _END_GRACE_S):
                    _kill(pidfd)
                    if not await _ends(pidfd, _END_TIMEOUT_S):
                        raise GuestFailed(f"the nursery of {self.what} does not end")
            finally:
                os.close(pidfd)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, os.WNOHANG)  # noqa: ASYNC222 - it has ended: this does not wait

    def _check(self, answer: Answer, doing: str) -> Answer:
        if answer.error:
            raise exhausted_or_failed(f"the nursery of {self.what} can't {doing}", answer.error)
        return answer


class Zygote:
    """A parked, warmed interpreter that forks guests carrying it."""

    def __init__(self, control: ControlSocket, pidfd: int) -> None:
        self.control = control
        self.pid = pid_of(pidfd)
        self._pidfd = pidfd

    async def wait_ready(self, timeout_s: float, log_fd: int, what: str) -> None:
        """Wait for the READY packet; turn anything else into TemplateFailed."""
        os.set_blocking(log_fd, False)
        try:
            banner = await asyncio.wait_for(asyncio.shield(self.control.banner), timeout_s)
        except TimeoutError:
            raise TemplateFailed(
                f"warming {what} took more than {timeout_s:g} s", fix="make the warm-up shorter"
            ) from None
        if banner[:4] == b"TRDY":
            return
        said = banner[8:].decode("utf-8", "replace") if banner[:4] == b"TERR" else ""
        raise TemplateFailed(f"warming {what} failed", why=(said or _read_all(log_fd) or "it ended at once").strip())

    def close(self) -> None:
        """End it; guests cloned from it go on. Safe to repeat."""
        self.control.close()
        if self._pidfd >= 0:
            _kill(self._pidfd)  # it has nothing to put in order, and one that is stopped would stay
            os.close(self._pidfd)
            self._pidfd = -1


class Held(Protocol):
    """A guest, as its nursery sees it."""

    ended: asyncio.Future[None]

    def end_soon(self) -> None:
        """Kill its first process."""


class WarmNursery:
    """A template's nursery with, once it was asked for, a zygote: what snapshots of this host's kinds share."""

    def __init__(self, nursery: Nursery, argv: Sequence[str], env: dict[str, str], confinement: Program) -> None:
        self.nursery = nursery
        self._zygote: Zygote | None = None
        self._argv = argv
        self._env = env
        self._confinement = confinement
        self._guests: set[Held] = set()

    def hold(self, guest: Held) -> None:
        """That guest was made here."""
        self._guests.add(guest)
        guest.ended.add_done_callback(lambda _: self._guests.discard(guest))

    @property
    def in_use(self) -> bool:
        """Whether a guest that was made here still lives."""
        return bool(self._guests)

    @property
    def alive(self) -> bool:
        """Whether guests can still be made from it."""
        return not self.nursery.control.closed.done()

    @property
    def is_warm(self) -> bool:
        """Whether its interpreter is parked and ready."""
        return self._zygote is not None and not self._zygote.control.closed.done()

    async def warm(self) -> None:
        """Start and warm the interpreter unless it is."""
        if not self._argv:
            raise TemplateFailed(f"{self.nursery.what} has no warm-up")
        if not self.is_warm:
            self.cool()
            self._zygote = await self.nursery.start_zygote(
                self._argv, self._env, self._confinement, timeout_s=WARM_UP_TIMEOUT_S
            )

    def cool(self) -> None:
        """End the interpreter; guests cloned from it go on."""
        if self._zygote is not None:
            self._zygote.close()
            self._zygote = None

    def zygote_memory_bytes(self) -> int:
        """Resident memory of the parked interpreter."""
        try:
            with open(f"/proc/{self._zygote.pid if self._zygote else 0}/statm", encoding="ascii") as statm:
                return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except OSError:
            return 0

    async def clone(self, encoded: bytes, flags: int, fds: Sequence[int], *, warm: bool) -> Clone:
        """Fork a guest, from the warmed interpreter when `warm`."""
        source = self._zygote.control if warm and self._zygote is not None else self.nursery.control
        return await clone(source, encoded, flags, fds, self.nursery.what)

    async def end(self) -> None:
        """End both and wait until the nursery is gone; reap it where it is our child."""
        self.cool()
        self.nursery.close()
        await self.nursery.gone()


async def clone(control: ControlSocket, encoded: bytes, flags: int, fds: Sequence[int], what: str) -> Clone:
    """Ask a nursery or zygote for a guest. Raises GuestFailed or NoSpace."""
    answer = await control.request(b"TCLN", _CLONE.pack(flags, len(encoded)) + encoded, fds)
    if answer.error:
        raise exhausted_or_failed(f"can't fork a guest of {what}", answer.error)
    if answer.pidfd < 0:
        # This process could take no more descriptors. The guest ends by itself when its channel is closed.
        raise exhausted_or_failed(f"can't take a guest of {what}", errno.EMFILE)
    try:
        return Clone(answer.pidfd)
    except OSError as error:
        os.close(answer.pidfd)
        raise exhausted_or_failed(f"can't take a guest of {what}", error.errno or 0) from error


async def _ends(pidfd: int, timeout_s: float) -> bool:
    """Whether a process ends in time."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(pidfd, ended.set)
    try:
        await asyncio.wait_for(ended.wait(), timeout_s)
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(pidfd)
    return True


def _kill(pidfd: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)


def step_failed(what: str, steps: Sequence[str], step: int, error: int) -> GuestFailed | NoSpace:
    """The error for a program that stopped at a step."""
    name = steps[step] if 0 <= step < len(steps) else f"step {step}"
    # A guest's own word: no errno is that large, and strerror takes no more.
    return exhausted_or_failed(f"{what} failed at {name!r}", error & 0xFFFF)


def exhausted_or_failed(what: str, error: int) -> GuestFailed | NoSpace:
    """NoSpace where the host ran out of something, else GuestFailed."""
    if error in _EXHAUSTED:
        return NoSpace(what, why=os.strerror(error), fix="end other sandboxes or raise the host's limits")
    return GuestFailed(what, why=os.strerror(error), fix="tartarus doctor shows what this host lacks")


def _spawn_process(control_fd: int, *, shared_pids: bool) -> int:
    """Execute the agent's binary as a nursery with `control_fd` as its descriptor 3; returns its pid."""
    sealed = agent_memfd()
    try:
        # Out of the way of 3, which the child's control socket takes before this is executed.
        executable = fcntl.fcntl(sealed, fcntl.F_DUPFD_CLOEXEC, _LOW_FDS)
    finally:
        os.close(sealed)
    null = [(os.POSIX_SPAWN_OPEN, fd, "/dev/null", os.O_RDWR, 0) for fd in (0, 1, 2)]
    try:
        return os.posix_spawn(
            f"/proc/self/fd/{executable}",
            ["tartarus-guest", "nursery", "--shared-pids" if shared_pids else "--own-pids"],
            {},
            file_actions=[*null, (os.POSIX_SPAWN_DUP2, control_fd, 3)],
            setsid=True,
        )
    finally:
        os.close(executable)


def _strings(items: Sequence[str]) -> bytes:
    encoded = [item.encode("utf-8", "surrogateescape") for item in items]
    return struct.pack("<I", len(encoded)) + b"".join(struct.pack("<I", len(item)) + item for item in encoded)


def _read_all(fd: int) -> str:
    try:
        return os.read(fd, _ZYGOTE_LOG_BYTES).decode("utf-8", "replace")[-2000:]
    except BlockingIOError:
        return ""


def warm_command(template: Template, prefix: str = GUEST_PREFIX) -> tuple[list[str], dict[str, str]]:
    """How a template's warm interpreter is started: argv and environment; nothing for a template that has none.

    `prefix` is where the template's `/opt/tartarus` lies for the process that starts it.
    """
    warm_up = template.warm_up
    if warm_up is None:
        return [], {}
    env = base_environment("/root") | template.env
    argv = [
        warm_up.interpreter,
        f"{GUEST_PREFIX}/runner.py",
        "zygote",
        "--control=3",
        f"--imports={','.join(warm_up.imports)}",
        *([f"--script={GUEST_PREFIX}/warmup.py"] if warm_up.script else []),
    ]
    return [word.replace(GUEST_PREFIX, prefix) for word in argv], {
        name: value.replace(GUEST_PREFIX, prefix) for name, value in env.items()
    }
