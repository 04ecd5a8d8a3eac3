"""Attacks on devices: the disks, memory, terminals and random numbers of the host."""

from __future__ import annotations

import array
import fcntl
import os
import stat

from tests.escape.attack import inside
from tests.escape.kit import WORLD, asked, call, opened, outcome, wrote

_AT_FDCWD = -100


@inside("devices/make", tries="make device files for disks, memory and the console", container="EPERM", process="EPERM")
def make() -> dict[str, str]:
    numbers = {
        "first disk": (0o060600, 8, 0), "first virtual disk": (0o060600, 254, 0), "loop": (0o060600, 7, 0), "memory": (0o020600, 1, 1),
        "ports": (0o020600, 1, 4), "kernel log": (0o020600, 1, 11), "console": (0o020600, 5, 1), "null": (0o020666, 1, 3),
        "fuse": (0o020666, 10, 229), "kvm": (0o020666, 10, 232), "tun": (0o020666, 10, 200), "hidden file": (0o020000, 0, 0),
        "cpu registers": (0o020600, 202, 0), "block 0": (0o060600, 0, 0),
    }  # fmt: skip
    found = {}
    for name, (mode, major, minor) in numbers.items():
        found[name] = asked("mknodat", _AT_FDCWD, "node", mode, os.makedev(major, minor))
        found[f"{name}, by mknod"] = (
            asked("mknod", "node", mode, os.makedev(major, minor)) if "mknod" in WORLD["numbers"] else "EPERM"
        )
    return found


@inside(
    "devices/open", tries="open every device that the host has", container="ENOENT|harmless|ENXIO|EACCES|EISDIR",
    process="EACCES|harmless|ENXIO|ENOENT",
    note="Harmless are null, zero, full, random, urandom, and terminals of its own.",
)  # fmt: skip
def open_devices() -> dict[str, str]:
    harmless = {
        "null",
        "zero",
        "full",
        "random",
        "urandom",
        "tty",
        "ptmx",
        "fd",
        "stdin",
        "stdout",
        "stderr",
        "pts",
        "shm",
        "core",
    }
    raw = (
        "mem", "kmem", "port", "kmsg", "kvm", "vhost-net", "vhost-vsock", "vsock", "net/tun", "fuse", "userfaultfd", "sda", "vda",
        "nvme0n1", "dm-0", "hpet", "rtc0", "watchdog", "uinput", "input/event0", "snapshot", "mapper/control", "dri/card0", "nvidiactl",
        "cpu/0/msr", "cpu_dma_latency", "vcs", "tty0", "tty1", "ttyS0", "console", "hwrng", "tpm0", "udmabuf", "vfio/vfio", "ppp",
        "snd/timer", "bus/usb/001/001", "rfkill", "nvram", "pmem0", "bsg", "sg0", "mcelog", "ashmem", "binder", "dma_heap/system",
    )  # fmt: skip

    def look(name: str) -> str:
        answers = {opened(f"/dev/{name}", flags) for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR)}
        if name in harmless and "escaped" in answers:
            return "harmless"
        return "escaped" if "escaped" in answers else min(answers)

    return {name: look(name) for name in sorted({*raw, *WORLD["devices"]})}


@inside(
    "devices/log", tries="write lines into the kernel's log", container="ENOENT", process="EACCES|ENOENT",
)  # fmt: skip
def log() -> str:
    return wrote("/dev/kmsg", b"")


@inside(
    "devices/random", tries="feed, drain or reseed the host's random numbers", container="EPERM|EACCES",
    process="EPERM|EACCES",
)  # fmt: skip
def random() -> dict[str, str]:
    commands = {"add": 0x40085203, "add a count": 0x40045201, "zap": 0x5204, "clear": 0x5206, "reseed": 0x5207}

    def command(number: int) -> None:
        with open("/dev/random", "rb", buffering=0) as device:
            fcntl.ioctl(device.fileno(), number, array.array("i", [8, 8, 0, 0]))

    return {name: outcome(command, number) for name, number in commands.items()}


@inside(
    "devices/terminal-injection", tries="type into a terminal (TIOCSTI), paste (TIOCLINUX), take the console, change the line discipline",
    container="EPERM", process="EPERM",
    note="Also with rubbish in the upper half of the command, which the kernel ignores and a careless filter would compare.",
)  # fmt: skip
def terminal_injection() -> dict[str, str]:
    commands = {"TIOCSTI": 0x5412, "TIOCLINUX": 0x541C, "TIOCCONS": 0x541D, "TIOCSETD": 0x5423}
    found = {}
    for name, number in commands.items():
        for fd in (0, 1, 2):
            found[f"{name} on {fd}"] = asked("ioctl", fd, number, b"x\0\0\0")
            found[f"{name} on {fd}, upper half"] = asked("ioctl", fd, number | 1 << 32, b"x\0\0\0")
    return found


@inside(
    "devices/own-terminal", tries="inject into a terminal of its own making", container="EPERM", process="EPERM|EACCES",
)  # fmt: skip
def own_terminal() -> dict[str, str]:
    try:
        master = os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY)
    except OSError:
        return {"open": "EACCES"}
    fcntl.ioctl(master, 0x40045431, array.array("i", [0]))
    terminal = call("ioctl", master, 0x5441, os.O_RDWR | os.O_NOCTTY)
    return {
        "type into the master": asked("ioctl", master, 0x5412, b"x"),
        "type into the terminal": asked("ioctl", terminal, 0x5412, b"x"),
        "take the console": asked("ioctl", master, 0x541D, None),
        "line discipline": asked("ioctl", terminal, 0x5423, b"\x03\0\0\0"),
    }


@inside(
    "devices/others-terminals", tries="read from and write to the terminals of the host's users", container="ENOENT|own",
    process="EACCES|own|EIO",
)  # fmt: skip
def others_terminals() -> dict[str, str]:
    def look(number: int) -> str:
        path = f"/dev/pts/{number}"
        try:
            if os.stat(path).st_uid == os.getuid():
                return "own"
        except OSError:
            return "ENOENT" if WORLD["level"] == "container" else "own"
        answers = {opened(path, flags) for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR)}
        return "escaped" if "escaped" in answers else min(answers)

    return {f"/dev/pts/{number}": look(number) for number in range(8)}


@inside(
    "devices/change-null", tries="change mode, owner, size and attributes of /dev/null and its kin",
    container="EPERM|EROFS|EACCES|EINVAL|EOPNOTSUPP|EBUSY", process="EPERM|EACCES|EINVAL|EOPNOTSUPP",
)  # fmt: skip
def change_null() -> dict[str, str]:
    found = {}
    for name in ("null", "zero", "random", "urandom"):
        path = f"/dev/{name}"
        found[f"mode of {name}"] = asked("fchmodat", _AT_FDCWD, path, 0o600)
        found[f"owner of {name}"] = asked("fchownat", _AT_FDCWD, path, os.getuid(), os.getgid(), 0)
        found[f"size of {name}"] = asked("truncate", path, 0)
        found[f"times of {name}"] = asked("utimensat", _AT_FDCWD, path, b"\0" * 32, 0)
        found[f"attribute of {name}"] = asked("setxattr", path, "user.mark", b"x", 1, 0)
        found[f"access list of {name}"] = asked("setxattr", path, "system.posix_acl_access", b"\x02\0\0\0", 4, 0)
        found[f"removal of {name}"] = asked("unlinkat", _AT_FDCWD, path, 0)
    return found


@inside(
    "devices/touch-null", tries="set the times of the host's /dev/null to now", container="EROFS|EPERM|EACCES", process="times|EPERM",
    note="Whoever may write a file may set its times to now, and Landlock does not mediate it: a mark on the host, no more.",
)  # fmt: skip
def touch_null() -> str:
    return outcome(os.utime, "/dev/null", succeeded="times" if WORLD["level"] == "process" else "escaped")


@inside(
    "devices/masks", tries="use the files that cover secrets as a way to the host's device",
    container="EPERM|EROFS|EACCES|nothing",
)  # fmt: skip
def masks() -> dict[str, str]:
    path = "/proc/kallsyms"
    return {
        "mode": asked("fchmodat", _AT_FDCWD, path, 0o777),
        "remove": asked("unlinkat", _AT_FDCWD, path, 0),
        "what it is": outcome(
            lambda: stat.S_ISCHR(os.stat(path).st_mode) and os.close(os.open(path, os.O_RDONLY)), succeeded="nothing"
        ),
    }
