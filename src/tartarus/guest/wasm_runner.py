"""The warm runner of the WASM level: an interpreter that has loaded wasmtime and perhaps a module, and waits.

It lies where the Python runner lies elsewhere (`/opt/tartarus/runner.py`), and does for modules what that does for
programs, by the same contract with nursery, zygote and agent: that is the Python runner's own code, which lies beside
it. What differs is a command line: the host writes ``[ARGV0, options, program, arguments...]``, options as in `Job`.

The host trusts nothing here: a module that finds a hole in wasmtime owns this process, and meets the sandbox's walls.
"""

from __future__ import annotations

import sys

if not __package__:  # as it runs in a sandbox
    sys.path.insert(0, "/opt/tartarus/wasm")

import _signal  # type: ignore[import-not-found]
import ctypes
import errno
import importlib
import json
import os
import select
import struct
import threading
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

if TYPE_CHECKING or __package__:
    from tartarus.guest import runner as base
    from tartarus.guest import wasm_engine as engines
else:
    base, engines = (importlib.import_module(name) for name in ("python_runner", "wasm_engine"))

import wasmtime

HOME = "/opt/tartarus/wasm"
ARGV0 = HOME + "/run"
"""The first word of what the host sends. No such file exists: nothing else can run it."""
MOST_TABLE_ELEMENTS = 1_000_000
OVERHEAD_BYTES = 16 * 1024 * 1024
"""What this process needs of the sandbox's memory beside the module's own: the module may take what is left."""
TRAPPED, NOT_RUN, NOT_FOUND = 134, 126, 127
"""Exit statuses: as the wasmtime command's for a trap, and as a shell's for what can't be run or found."""
TRAP_SIGNALS = (4, 7, 8, 11)
MADV_POPULATE_READ = 22
LONGEST_TEXT = 16 * 1024
IDLE_MS = 10
USUAL_DIRS = ["/work", "/tmp"]  # noqa: S108 - the sandbox's
KEPT_FROM, KEPT_BELOW = 600, 700
"""The numbers of descriptors that stay open in clones."""


class Warm:
    """What is made once, before parking."""

    def __init__(self) -> None:
        self.engine = engines.new_engine(metered=False, parallel=False)
        self.rehearsal = engines.Loaded(self.engine, engines.compiled(self.engine, engines.REHEARSAL))
        self.touched = False
        self.module = self._load()
        self.ahead: Ahead | None = None
        self.text: list[tuple[int, int]] = []
        self.madvise = base._libc.madvise
        self.madvise.argtypes = [ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]
        with open("/proc/self/maps", encoding="utf-8") as maps:
            for line in maps:
                if "libwasmtime" in line or ".cwasm" in line:
                    start, _, end = line.split(None, 1)[0].partition("-")
                    self.text.append((int(start, 16), int(end, 16)))

    def _load(self) -> engines.Loaded | None:
        """Load the sandbox's own module.

        Its instances' memories are copies of what the open files hold: descriptors that have to stay, and out of the
        way of those that a clone is handed.
        """
        fillers = [os.open("/dev/null", os.O_RDONLY)]
        while fillers[-1] < KEPT_FROM:
            fillers.append(os.dup(fillers[-1]))
        try:
            return engines.load(HOME, self.engine)
        finally:
            for filler in fillers:
                os.close(filler)

    def touch(self) -> None:
        """Take ahead the page faults of wasmtime's code, which a fork does not copy the way to.

        No WASI context is made here: its random numbers come from a generator that a later fork would copy.
        """
        if not self.touched:
            self.touched = True
            for start, end in self.text:
                self.madvise(start, end - start, MADV_POPULATE_READ)

    def rehearse(self) -> None:
        """Run a program of our own to its end, on the way that the sandbox's will take. Never before a fork."""
        self.touch()
        options = {"loaded": True, "dirs": USUAL_DIRS, "memory_bytes": 1 << 29}
        payload = base.encode_exec(0, "/", [ARGV0, json.dumps(options), "rehearsal"], {"HOME": "/"})
        _, cwd, argv, environ = base.decode_exec(payload)
        job = Job(argv, environ, cwd)
        store = job.store(self.rehearsal)
        store.set_wasi(job.filled(job.wasi()))
        try:
            self.rehearsal.start(store)
        except wasmtime.ExitTrap:
            pass
        if self.module is not None and self.module.inert:
            self.set_up(self.module, job)

    def set_up(self, module: engines.Loaded, job: Job) -> None:
        """Make ahead what the sandbox's own module will most likely be given, and instantiate it."""
        os.chdir(USUAL_DIRS[0])
        store = job.store(module)
        try:
            entry = module.enter(store)
        except Exception:
            return  # whatever it is, it will be told when it is asked for
        self.ahead = Ahead(store, job.wasi(), entry)


class Ahead(NamedTuple):
    """The sandbox's own module, instantiated before it was asked for, in the usual directories."""

    store: wasmtime.Store
    wasi: wasmtime.WasiConfig
    entry: Any


warm: Any = None


class Job:
    """One command line: options, and the program's own arguments.

    Options: `loaded`, whether the program is the sandbox's own module, else a file's path; `dirs`, what it may see;
    `memory_bytes` of the sandbox; `fuel` and `deadline_s`, or null; `compile`, "plain" or "metered" to do just that:
    from standard input to standard output.
    """

    def __init__(self, argv: list[str], environ: dict[str, str], cwd: str) -> None:
        if len(argv) < 2 or argv[0] != ARGV0:
            raise ValueError
        self.options = json.loads(argv[1])
        self.argv = argv[2:]
        self.environ = environ
        self.cwd = cwd

    def run(self) -> int:
        """Do it; returns the exit status."""
        try:
            if self.options.get("compile"):
                return self.compile()
            os.chdir(self.cwd)
            program = self.program()
            ahead = warm.ahead if self.is_usual() else None
            store = self.store(program) if ahead is None else ahead.store
            if ahead is not None:
                self.limit(store)
            store.set_wasi(self.filled(self.wasi() if ahead is None else ahead.wasi))
            program.start(store, None if ahead is None else ahead.entry)
        except wasmtime.ExitTrap as end:
            return end.code & 0xFF
        except (wasmtime.Trap, engines.Trapped) as trap:
            return self.say(str(trap), TRAPPED)
        except engines.Failed:
            return 1
        except FileNotFoundError as failure:
            return self.say(f"{failure.filename}: {failure.strerror}", NOT_FOUND)
        except OSError as failure:
            return self.say(f"{failure.filename}: {failure.strerror}", NOT_RUN)
        except (engines.NotRun, wasmtime.WasmtimeError, MemoryError) as failure:
            return self.say(str(failure) or type(failure).__name__, NOT_RUN)
        return 0

    def say(self, text: str, status: int) -> int:
        """Tell on standard error why it ended."""
        data = f"tartarus: {self.argv[0]}: {text.rstrip()}\n".encode("utf-8", "replace")[:LONGEST_TEXT]
        try:
            while data:
                data = data[os.write(2, data) :]
        except OSError:
            pass  # nobody listens
        return status

    def compile(self) -> int:
        """Compile standard input to standard output."""
        metered = self.options["compile"] == "metered"
        code = engines.compiled(engines.new_engine(metered=metered, parallel=True), engines.read_module(0)).serialize()
        view = memoryview(code)
        while view:
            view = view[os.write(1, view) :]
        return 0

    def program(self) -> engines.Loaded:
        """What is to be run, compiled."""
        if self.options["loaded"]:
            return warm.module  # type: ignore[no-any-return]
        file = os.open(self.argv[0], os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            data = engines.read_module(file)
        finally:
            os.close(file)
        engine = warm.engine if self.options.get("fuel") is None else engines.new_engine(metered=True, parallel=False)
        return engines.Loaded(engine, engines.compiled(engine, data))

    def store(self, program: engines.Loaded) -> wasmtime.Store:
        """Where the program lives, with its limits."""
        store = wasmtime.Store(program.engine)
        self.limit(store)
        if self.options.get("fuel") is not None:
            store.set_fuel(self.options["fuel"])
            self.arm(store, program.engine)
        return store

    def limit(self, store: wasmtime.Store) -> None:
        """Bound its memory and its tables."""
        most = max(65536, self.options["memory_bytes"] - OVERHEAD_BYTES)
        store.set_limits(memory_size=most, table_elements=MOST_TABLE_ELEMENTS)

    def wasi(self) -> wasmtime.WasiConfig:
        """The streams and directories that it gets."""
        wasi = wasmtime.WasiConfig()
        wasi.inherit_stdin()
        wasi.inherit_stdout()
        wasi.inherit_stderr()
        for directory in (".", *self.options["dirs"]):
            if os.path.isdir(directory):
                wasi.preopen_dir(directory, directory)
        return wasi

    def filled(self, wasi: wasmtime.WasiConfig) -> wasmtime.WasiConfig:
        """With its arguments and variables."""
        wasi.argv = self.argv
        wasi.env = list(self.environ.items())
        return wasi

    def is_usual(self) -> bool:
        """Whether what was made ahead is what is asked for."""
        asked = self.options
        return bool(asked["loaded"]) and asked["dirs"] == USUAL_DIRS and self.cwd == USUAL_DIRS[0]

    def arm(self, store: wasmtime.Store, engine: wasmtime.Engine) -> None:
        """Let the deadline interrupt the program, with a trace of where it was."""
        limit = self.options.get("deadline_s")
        store.set_epoch_deadline(1)
        if limit is not None:
            timer = threading.Timer(limit, engine.increment_epoch)
            timer.daemon = True
            timer.start()


class WasmRunner(base.Runner):
    """Serves the agent, one program for each process: this one got ready for it while nothing was asked.

    From then on its keeper, forked before, serves in its place, in the same way. So a process with threads, and with
    random numbers that it has drawn on, is never forked.
    """

    keeper: int | None = None

    def serve(self) -> NoReturn:
        """Get ready while nothing is asked; then run what is."""
        poll = select.poll()
        poll.register(self.sock.fileno(), select.POLLIN)
        while True:
            if self.keeper is None and not poll.poll(IDLE_MS):
                try:
                    if self.fork_keeper():
                        continue
                    warm.rehearse()
                except OSError:
                    pass  # no task is left in the sandbox: whoever asks is told
            payload, fds = self.receive()
            flags, cwd, argv, environ = base.decode_exec(payload)
            self.run(flags, cwd, argv, environ, fds)
            for fd in fds:
                os.close(fd)

    def fork_keeper(self) -> bool:
        """Make the process that will serve when this one is taken; returns twice, in it (true) when its turn has come.

        It becomes the agent's child, as this one is: its end must be seen there, whatever this one is doing.
        """
        waits, wakes = os.pipe()
        try:
            between = os.fork()
            if between:
                if os.waitpid(between, 0)[1]:
                    raise BlockingIOError(errno.EAGAIN, "no task is left")
                self.keeper = wakes
                os.close(waits)
                return False
        except OSError:
            os.close(waits)
            os.close(wakes)
            raise
        try:
            if os.fork():
                os._exit(0)
        except OSError:
            os._exit(1)
        os.close(wakes)
        if not os.read(waits, 1):
            os._exit(0)
        os.close(waits)
        warm.touched = False
        return True

    def run(self, flags: int, cwd: str, argv: list[str], environ: dict[str, str], fds: list[int]) -> None:
        """Run a module in this process; returns only when what was sent is no such request, and in the keeper."""
        try:
            job = Job(argv, environ, cwd)
            if self.keeper is None and self.fork_keeper():
                return
        except Exception as failure:
            number = failure.errno if isinstance(failure, OSError) else None
            self.sock.send(base.ANSWER.pack(base.REFUSED, number or errno.EINVAL, 0))
            return
        # WASI has no signals: those that ask for an end give it. A write to a closed pipe is an error that it sees.
        _signal.signal(base.SIGPIPE, _signal.SIG_IGN)
        _signal.signal(base.SIGXFSZ, _signal.SIG_IGN)
        os.setsid()
        for fd in (0, 1, 2):
            os.dup2(fds[fd], fd)
        if flags & base.EXEC_TTY:
            base._syscall(base.SYS_IOCTL, 0, base.TIOCSCTTY, 0, 0, 0, 0)
        self.sock.send(base.ANSWER.pack(base.STARTED, os.getpid(), 0))
        for fd in fds:
            os.close(fd)
        self.sock.close()
        if self.keeper is not None:
            os.write(self.keeper, b"\0")
            os.close(self.keeper)
        status = TRAPPED
        try:
            status = job.run()
        finally:
            os._exit(status)


def keep_trap_handlers() -> None:
    """Let wasmtime's signal handlers, which make traps of faults, survive the reset before parking."""
    reset = base.signals_to_default

    def signals_to_default() -> None:
        saved = [(number, ctypes.create_string_buffer(32)) for number in TRAP_SIGNALS]
        for number, action in saved:
            base._syscall(base.SYS_RT_SIGACTION, number, 0, ctypes.addressof(action), 8, 0, 0)
        reset()
        for number, action in saved:
            base._syscall(base.SYS_RT_SIGACTION, number, ctypes.addressof(action), 0, 8, 0, 0)

    base.signals_to_default = signals_to_default


def keep_module_files() -> None:
    """Let the module's descriptors survive the closing of what a clone inherits."""
    close = base._syscall

    def close_fds_from(first: int) -> None:
        close(base.SYS_CLOSE_RANGE, first, KEPT_FROM, 0, 0, 0, 0)
        close(base.SYS_CLOSE_RANGE, KEPT_BELOW, 0xFFFFFFFF, 0, 0, 0, 0)

    base.close_fds_from = close_fds_from


def rehearse() -> None:
    """In the place of the Python runner's rehearsal: done before parking, and again in a spare clone."""
    warm.touch()


def exercise(exercises: dict[str, str]) -> None:
    """Nothing: no Python is run here."""
    del exercises


def main(argv: list[str]) -> NoReturn:
    """Load, park, serve."""
    global warm
    # One thread for what wasmtime's WASI does in the background; it looks at its first use, in a clone.
    os.environ["TOKIO_WORKER_THREADS"] = "1"
    options = dict(word.lstrip("-").split("=", 1) for word in argv[1:])
    zygote = base.Zygote(int(options["control"]))
    try:
        warm = Warm()
        keep_trap_handlers()
        keep_module_files()
        base.Runner, base.rehearse, base.exercise = WasmRunner, rehearse, exercise  # type: ignore[misc]
        base.warm_up(zygote, [], "")
        warm.touched = False  # in clones
    except BaseException as failure:
        zygote.fail(f"the warm-up failed: {type(failure).__name__}: {failure}")
    zygote.control.send(struct.pack("<4sI", b"TRDY", 0))
    zygote.serve()


if __name__ == "__main__":
    main(sys.argv[1:])
