"""Capabilities, limits, keyring and masks, in real children."""

from __future__ import annotations

import errno
import os
import resource
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.confine.child import call, error_of, in_child

from tartarus.model.sandbox import Isolation, Resources
from tartarus.runtimes.confine import caps, keyring, masks, rlimits

if TYPE_CHECKING:
    from tartarus.guest.program import Program

CONTAINER, PROCESS = Isolation.CONTAINER, Isolation.PROCESS
INFINITE = resource.RLIM_INFINITY


def status() -> dict[str, str]:
    """This process's lines of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def test_no_capability_is_left() -> None:
    found = in_child(status, setup=caps.add_capability_drop)
    assert [int(found[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")] == [0, 0, 0, 0]
    assert found["NoNewPrivs"] == "1"


@pytest.mark.needs("root")
def test_nothing_can_bring_one_back() -> None:
    def attempt() -> tuple[str, int, list[int]]:
        everything = struct.pack("<6I", *[0xFFFFFFFF] * 6)
        header = struct.pack("<Ii", 0x20080522, 0)
        errors = [
            error_of("capset", header, everything),
            error_of("prctl", 28, 0, 0, 0, 0),  # PR_SET_SECUREBITS
            error_of("prctl", 8, 1, 0, 0, 0),  # PR_SET_KEEPCAPS
            error_of("prctl", 47, 2, 0, 0, 0),  # PR_CAP_AMBIENT_RAISE
            error_of("prctl", 38, 0, 0, 0, 0),  # PR_SET_NO_NEW_PRIVS, off
        ]
        return status()["CapBnd"], call("prctl", 27, 0, 0, 0, 0)[0], errors

    bounding, securebits, errors = in_child(attempt, setup=caps.add_capability_drop)
    assert int(bounding, 16) == 0
    assert securebits == caps.SECUREBITS
    assert errors == [errno.EPERM, errno.EPERM, errno.EPERM, errno.EPERM, errno.EINVAL]


@pytest.mark.needs("root")
def test_root_gains_nothing_by_running_a_program() -> None:
    def attempt() -> str:
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.dup2(writer, 1)
            os.execv("/bin/cat", ["cat", "/proc/self/status"])
        os.waitpid(pid, 0)
        text = os.read(reader, 65536).decode()
        return next(line.split()[1] for line in text.splitlines() if line.startswith("CapEff"))

    assert int(in_child(attempt, setup=caps.add_capability_drop), 16) == 0


@pytest.mark.needs("root")
def test_the_bounding_set_can_be_emptied_before_the_user_changes() -> None:
    def setup(program: Program) -> None:
        caps.add_bounding_drop(program)
        program.syscall("setresuid", 65534, 65534, 65534)
        caps.add_capability_drop(program, bounding=False)

    found = in_child(status, setup=setup)
    assert [int(found[name], 16) for name in ("CapBnd", "CapPrm", "CapEff")] == [0, 0, 0]


@pytest.mark.needs("root")
def test_an_unprivileged_process_can_run_it_too() -> None:
    def setup(program: Program) -> None:
        program.syscall("setresuid", 65534, 65534, 65534)
        caps.add_capability_drop(program)

    found = in_child(status, setup=setup)
    assert (int(found["CapEff"], 16), found["NoNewPrivs"]) == (0, "1")


# Limits.


def limits(resources: Resources, level: Isolation, **options: Any) -> dict[int, tuple[int, int]]:
    def read() -> dict[int, tuple[int, int]]:
        return {which: resource.getrlimit(which) for which in range(16)}

    found: dict[int, tuple[int, int]] = in_child(
        read, setup=lambda program: rlimits.add_rlimits(program, resources, level, **options)
    )
    return found


@pytest.mark.parametrize("level", [CONTAINER, PROCESS])
def test_limits_hold(level: Isolation) -> None:
    found = limits(Resources(), level)
    assert found[resource.RLIMIT_CORE] == (1, 1)
    assert found[resource.RLIMIT_RTPRIO] == (0, 0)
    assert found[resource.RLIMIT_NICE] == (0, 0)
    assert found[resource.RLIMIT_NOFILE][0] == 1024
    assert found[resource.RLIMIT_MEMLOCK][1] <= 65536
    assert found[resource.RLIMIT_STACK][0] == 8 << 20


def test_process_level_has_limits_in_place_of_a_cgroup() -> None:
    found = limits(Resources(memory_bytes=64 << 20, pids=10_000, disk_bytes=5 << 20), PROCESS)
    assert found[resource.RLIMIT_FSIZE] == (5 << 20, 5 << 20)
    assert found[resource.RLIMIT_DATA] == (64 << 20, 64 << 20)
    assert found[resource.RLIMIT_MSGQUEUE] == (0, 0)
    assert found[resource.RLIMIT_NPROC][0] == found[resource.RLIMIT_NPROC][1] >= 10_000


def test_container_level_leaves_those_to_the_cgroup() -> None:
    wanted = {which for which, _, _ in rlimits.wanted(Resources(), CONTAINER)}
    assert wanted.isdisjoint({resource.RLIMIT_FSIZE, resource.RLIMIT_DATA, resource.RLIMIT_NPROC})


def test_other_processes_of_the_user_do_not_use_up_the_sandbox() -> None:
    wanted = rlimits.wanted(Resources(pids=10), PROCESS, other_tasks=300)
    assert (resource.RLIMIT_NPROC, 310, 310) in wanted


def test_a_file_may_not_grow_past_the_disk(tmp_path: Path) -> None:
    import signal

    def attempt() -> int:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        with open(tmp_path / "f", "wb", buffering=0) as file:
            file.write(b"x" * 4096)
            try:
                file.truncate((1 << 20) + 1)
            except OSError as error:
                return error.errno or -1
        return 0

    def setup(program: Program) -> None:
        rlimits.add_rlimits(program, Resources(disk_bytes=1 << 20), PROCESS)

    assert in_child(attempt, setup=setup) == errno.EFBIG


def test_memory_may_not_grow_past_the_limit() -> None:
    def attempt() -> bool:
        try:
            return bool(bytearray(256 << 20))
        except MemoryError:
            return False

    def setup(program: Program) -> None:
        rlimits.add_rlimits(program, Resources(memory_bytes=128 << 20), PROCESS)

    assert in_child(attempt, setup=setup) is False


def test_lower_limits_of_the_host_are_kept() -> None:
    found = in_child(
        lambda: (resource.getrlimit(resource.RLIMIT_NOFILE), resource.getrlimit(resource.RLIMIT_STACK)),
        setup=_lower_then_limit,
    )
    assert found == ((64, 64), (1 << 20, 1 << 20))


def _lower_then_limit(program: Program) -> None:
    lower = {resource.RLIMIT_NOFILE: 64, resource.RLIMIT_STACK: 1 << 20}
    for which, value in lower.items():
        program.syscall("prlimit64", 0, which, program.blob(struct.pack("<QQ", value, value)), 0)
    rlimits.add_rlimits(
        program, Resources(), CONTAINER, hard_now=lambda which: lower.get(which, resource.getrlimit(which)[1])
    )


@given(
    soft=st.integers(0, 2**40),
    extra=st.integers(0, 2**40),
    hard_now=st.sampled_from([INFINITE, 0, 1]) | st.integers(0, 2**41),
)
def test_no_limit_is_ever_raised(soft: int, extra: int, hard_now: int) -> None:
    which, new_soft, new_hard = rlimits.clamp((7, soft, soft + extra), hard_now)
    assert which == 7
    assert 0 <= new_soft <= new_hard <= soft + extra
    assert hard_now == INFINITE or new_hard <= hard_now


def test_tasks_are_counted_with_their_threads() -> None:
    def attempt() -> int:
        import threading

        before = rlimits.tasks_of(os.getuid())
        stop = threading.Event()
        workers = [threading.Thread(target=stop.wait) for _ in range(20)]
        for worker in workers:
            worker.start()
        after = rlimits.tasks_of(os.getuid())
        stop.set()
        return after - before

    # Other processes come and go meanwhile; twenty threads of ours do not.
    assert in_child(attempt) > 10


# The keyring.


def test_the_session_keyring_is_fresh() -> None:
    def ring() -> int:
        return call("keyctl", 0, -3, 0, 0, 0)[0]  # KEYCTL_GET_KEYRING_ID of the session keyring

    outside = ring()
    inside = in_child(ring, setup=keyring.add_keyring)
    if inside < 0:
        assert error_of("keyctl", 0, -3, 0, 0, 0) == errno.ENOSYS
    else:
        assert inside != outside


# Masks.


def test_masks_are_of_the_kind_they_are_listed_as() -> None:
    for path in (*masks.READ_ONLY_PATHS, *masks.MASKED_DIRECTORIES):
        assert Path(path).is_dir() or not Path(path).exists(), path
    for path in masks.MASKED_FILES:
        assert not Path(path).is_dir(), path


def test_no_path_is_masked_twice() -> None:
    paths = [*masks.READ_ONLY_PATHS, *masks.MASKED_FILES, *masks.MASKED_DIRECTORIES]
    assert len(set(paths)) == len(paths)
    assert all(path.startswith(("/proc/", "/sys/")) for path in paths)
