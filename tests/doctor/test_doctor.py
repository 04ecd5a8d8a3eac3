"""The doctor finds what is there and what is missing, on this host and on hosts made poorer in a child."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from tests.confine.child import in_child

from tartarus.model.sandbox import Isolation
from tartarus.node import doctor, probes
from tartarus.node.doctor import Check
from tartarus.runtimes.confine.seccomp import add_seccomp

if TYPE_CHECKING:
    from collections.abc import Callable

    from tartarus.guest.program import Program


def behind_a_filter(work: Callable[[], Any]) -> Any:
    """`work`'s result where namespaces and mounts are refused, as in an ordinary Docker container."""

    def setup(program: Program) -> None:
        program.syscall("prctl", 38, 1, 0, 0, 0)
        add_seccomp(program, Isolation.CONTAINER)

    return in_child(work, setup=setup)


def without_user_namespaces(work: Callable[[], Any]) -> Any:
    """`work`'s result in a namespace whose sysctl forbids further user namespaces."""

    def inner() -> Any:
        probes._enter_user_namespace(0x10000000)
        probes._write("/proc/sys/user/max_user_namespaces", b"0")
        return work()

    return in_child(inner)


def test_every_check_speaks(tmp_path: Path) -> None:
    checks = in_child(lambda: doctor.examine(tmp_path))
    assert len({check.name for check in checks}) == len(checks) > 10
    for check in checks:
        assert check.detail, check
        assert "\n" not in check.detail + check.fix
        assert check.ok is not False or check.fix, check
        assert set(check.needed_for) <= {"container", "process", "microvm"}
    assert msgspec.json.decode(msgspec.json.encode(checks), type=list[Check]) == checks


def test_probes_leave_nothing_behind(tmp_path: Path) -> None:
    def attempt() -> bool:
        before = sorted(os.listdir("/proc/self/fd")), os.listdir(tmp_path)
        doctor.examine(tmp_path)
        with pytest.raises(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)
        return (sorted(os.listdir("/proc/self/fd")), os.listdir(tmp_path)) == before

    assert in_child(attempt)


@pytest.mark.parametrize(
    ("release", "ok"),
    [("6.18.44-fc", True), ("5.10.0-30-amd64", True), ("5.9.0", False), ("4.19.0-27", False), ("10.0", True)],
)
def test_kernel_versions(release: str, ok: bool) -> None:
    check = doctor.check_kernel(release)
    assert check.ok is ok
    assert bool(check.fix) is not ok


def test_behind_an_engines_filter() -> None:
    def attempt() -> list[Check]:
        return [
            *doctor.check_user_namespaces("Docker"),
            doctor.check_overlay("Docker"),
            doctor.check_proc("Docker"),
            doctor.check_memory_programs(),
            doctor.check_seccomp("Docker"),
        ]

    *namespaces, overlay, proc, memory, seccomp = behind_a_filter(attempt)
    assert namespaces[0].ok is False
    assert "--security-opt seccomp=unconfined" in namespaces[0].fix
    assert overlay.ok is False
    assert proc.ok is False
    assert "systempaths=unconfined" in proc.fix
    assert (memory.ok, seccomp.ok) == (True, True)


@pytest.mark.needs("user-namespaces")
def test_where_user_namespaces_are_switched_off() -> None:
    check = without_user_namespaces(lambda: doctor.check_user_namespaces("")[0])
    assert check.ok is False
    assert check.fix == "sudo sysctl -w user.max_user_namespaces=15000"


@pytest.mark.needs("user-namespaces")
def test_what_the_container_level_needs_works_here() -> None:
    found = in_child(lambda: [probes.user_namespaces(), probes.overlay(Path("/tmp"))])
    assert [result.error for result in found] == [0, 0]
    assert found[1].detail == "lower and upper"


def test_landlock_gaps_are_told() -> None:
    none, old, new = (doctor.check_landlock(abi) for abi in (0, 4, 6))
    assert none.ok is False
    assert "lsm=landlock" in none.fix
    assert old.ok is True
    assert "signals" in old.detail
    assert (new.ok, new.fix) == (True, "")


def test_an_experiment_that_hangs_is_ended() -> None:
    result = in_child(lambda: probes.attempt(lambda: str(signal.pause()), timeout_s=0.05))
    assert (result.error, result.works) == (errno.ETIME, False)


@pytest.mark.parametrize("failure", [RuntimeError("odd"), OSError(errno.ENOSPC, "full"), SystemExit(3)])
def test_an_experiment_that_fails_says_why(failure: BaseException) -> None:
    def work() -> str:
        raise failure

    result = in_child(lambda: probes.attempt(work))
    assert result.error == (errno.ENOSPC if isinstance(failure, OSError) else errno.EIO)
    assert result.detail


def test_a_namespace_is_held_for_its_user() -> None:
    def attempt() -> tuple[str, bool]:
        seen: list[str] = []
        probes.hold_user_namespace(lambda pid: seen.append(os.readlink(f"/proc/{pid}/ns/user")))
        return os.readlink("/proc/self/ns/user"), bool(seen[0])

    own, seen = in_child(attempt)
    assert seen
    assert own


# Control groups, on trees shaped like each kind of host.


def make_tree(root: Path, kind: str, controllers: str = "cpuset cpu io memory pids") -> Path:
    if kind == "v2":
        (root / "cgroup.controllers").write_text(controllers)
    else:
        for name in controllers.split():
            (root / name).mkdir()
        if kind == "hybrid":
            (root / "unified").mkdir()
    return root


@pytest.mark.parametrize("kind", ["v1", "v2", "hybrid"])
def test_cgroups_with_all_controllers(kind: str, tmp_path: Path) -> None:
    check = doctor.check_cgroups(make_tree(tmp_path, kind))
    assert check.ok is True
    assert check.detail.startswith(f"{kind}: ")
    assert not list(tmp_path.glob("**/tartarus-doctor*"))


@pytest.mark.parametrize("kind", ["v1", "v2", "hybrid"])
def test_cgroups_without_memory(kind: str, tmp_path: Path) -> None:
    check = doctor.check_cgroups(make_tree(tmp_path, kind, "cpu pids"))
    assert check.ok is None
    assert "no memory" in check.detail


def test_no_cgroups_at_all(tmp_path: Path) -> None:
    check = doctor.check_cgroups(tmp_path)
    assert check.ok is False
    assert "no memory, cpu, pids" in check.detail
    assert "run the daemon as root" in check.fix
    assert "--privileged" in doctor.check_cgroups(tmp_path, "Docker").fix


def test_cgroups_that_may_not_be_made(tmp_path: Path) -> None:
    make_tree(tmp_path, "v1")
    for name in ("cpu", "memory", "pids"):
        (tmp_path / name).rmdir()
        (tmp_path / name).symlink_to("/proc/self/fdinfo")  # a directory where nobody can make one
    check = doctor.check_cgroups(tmp_path)
    assert check.ok is False


# The state directory.


def test_a_state_directory_that_is_yet_to_be_made(tmp_path: Path) -> None:
    check = doctor.check_disk(tmp_path / "not" / "yet")
    assert check.ok is True
    assert "free in" in check.detail


def test_a_state_directory_that_can_not_be_written() -> None:
    check = doctor.check_disk(Path("/proc/sys/kernel/none/such"))
    assert check.ok is False
    assert "TARTARUS_HOME" in check.fix


def test_engines_are_told_apart_from_hosts() -> None:
    found = doctor.engine()
    assert isinstance(found, str)
    assert doctor.check_engine("Podman").detail == "inside Podman"
    assert doctor.check_engine("").detail == "not inside a container engine"


@pytest.mark.needs("user-namespaces")
def test_a_new_pid_namespace_is_not_taken_for_the_host() -> None:
    """Marker files count only where the namespaces are not the host's first ones."""

    def inside() -> bool:
        probes._enter_user_namespace(probes.ALL_NAMESPACES)
        inner = os.fork()
        if inner == 0:
            host = all(os.stat(f"/proc/self/ns/{k}").st_ino == n for k, n in doctor._HOST_NAMESPACES.items())
            os._exit(int(host))
        return os.waitpid(inner, 0)[1] == 0

    assert in_child(inside)
