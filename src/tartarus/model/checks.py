"""Refusals at the edge: what no sandbox or process could be given, caught before anything changes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tartarus.model.errors import InvalidRequest
from tartarus.model.signals import signal_number

if TYPE_CHECKING:
    from tartarus.model.sandbox import Mount

MAX_ARGV_BYTES = 2 * 1024 * 1024 - 4096
MAX_ARG_BYTES = 128 * 1024 - 1
MAX_TIMEOUT_S = 366 * 86400.0
MAX_GRACE_S = 86400.0
MIN_IDLE_S = 1.0
MAX_LABELS = 64
MAX_LABEL_KEY = 128
MAX_LABEL_VALUE = 1024


def require(holds: bool, what: str, fix: str) -> None:
    """Raise InvalidRequest unless `holds`."""
    if not holds:
        raise InvalidRequest(what, fix=fix)


def no_nul(text: str, what: str) -> None:
    """Refuse text that no C string can carry."""
    require("\0" not in text, f"{what} has a NUL byte", "remove it: no path, argument or variable can hold one")


def check_env(env: dict[str, str]) -> None:
    """Refuse names that no process could be given."""
    for name, value in env.items():
        require(bool(name) and "=" not in name, f"{name!r} is not a variable name", "use NAME=value")
        no_nul(name, "an environment variable's name")
        no_nul(value, f"environment variable {name}")


def check_command(argv: tuple[str, ...], env: dict[str, str]) -> None:
    """Refuse an argument list that execve(2) would refuse: empty, NUL bytes, or over the kernel's sizes."""
    require(bool(argv) and bool(argv[0]), "no command given", "put one after --, as in: tartarus run -- echo hello")
    check_env(env)
    total = sum(len(name) + len(value) + 10 for name, value in env.items())
    for position, argument in enumerate(argv):
        no_nul(argument, f"argument {position}")
        size = len(argument.encode("utf-8", "surrogateescape"))
        require(
            size <= MAX_ARG_BYTES,
            f"argument {position} is {size} bytes long",
            f"the kernel takes at most {MAX_ARG_BYTES}: pass it in a file or on standard input",
        )
        total += size + 9
    require(
        total <= MAX_ARGV_BYTES,
        f"arguments and environment are {total} bytes in all",
        f"the kernel takes at most {MAX_ARGV_BYTES}: pass data in a file or on standard input",
    )


def check_time_limit(timeout_s: float | None) -> None:
    """Refuse time limits that are none."""
    in_range = timeout_s is None or 0 < timeout_s <= MAX_TIMEOUT_S
    require(in_range, "timeout is out of range", "use more than 0 and at most 366d")


def check_stop(stop_signal: str, stop_grace_s: float | None, timeout_s: float | None = None) -> None:
    """Refuse a signal that is none, and a grace that is none or leaves nothing of the time limit it lies within."""
    if stop_signal:
        signal_number(stop_signal)
    if stop_grace_s is None:
        return
    require(0 <= stop_grace_s <= MAX_GRACE_S, "stop_grace_s is out of range", f"use 0 to {MAX_GRACE_S:g}")
    require(
        timeout_s is None or stop_grace_s < timeout_s,
        f"a grace of {stop_grace_s:g} s leaves nothing of a time limit of {timeout_s or 0:g} s",
        "the grace is the last part of the time limit: give a shorter one, or more time",
    )


def check_idle(idle_s: float | None) -> None:
    """Refuse an idle time that is none, or so short that the sandbox would sleep between two words."""
    in_range = idle_s is None or MIN_IDLE_S <= idle_s <= MAX_TIMEOUT_S
    require(in_range, "idle time is out of range", f"use {MIN_IDLE_S:g} s to 366d")


def check_labels(labels: dict[str, str]) -> None:
    """Refuse labels that a filter (``key=value``) could not name, and too many or too long ones."""
    require(len(labels) <= MAX_LABELS, f"{len(labels)} labels", f"use at most {MAX_LABELS}")
    for key, value in labels.items():
        no_nul(key + value, f"label {key!r}")
        require(bool(key) and "=" not in key, f"{key!r} is not a label's key", "use key=value")
        require(
            len(key) <= MAX_LABEL_KEY and len(value) <= MAX_LABEL_VALUE,
            f"label {key[:MAX_LABEL_KEY]!r} is too long",
            f"use at most {MAX_LABEL_KEY} characters for the key and {MAX_LABEL_VALUE} for the value",
        )


def check_mount(mount: Mount) -> None:
    """Refuse mounts whose target is relative, climbs, or hides what the sandbox stands on."""
    no_nul(mount.source, "mount source")
    no_nul(mount.target, "mount target")
    for path, end in ((mount.source, "source"), (mount.target, "target")):
        require(
            path.startswith("/") and ".." not in path.split("/"),
            f"mount {end} {path!r} is not an absolute path",
            "write --mount /on/host:/in/sandbox[:ro]",
        )
    top = "/" + mount.target.strip("/").split("/")[0]
    require(
        top not in {"/", "/proc", "/sys", "/dev"},
        f"mount target {mount.target!r} would hide {top}",
        "choose another place, such as /work",
    )
