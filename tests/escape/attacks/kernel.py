"""Attacks on the kernel's large and sharp interfaces, and on the filter that stands before them."""

from __future__ import annotations

import os
import resource
import struct
import time

from tests.escape.attack import inside
from tests.escape.kit import WORLD, asked, call, in_child, machine_code, outcome

_X32 = 0x40000000


@inside("kernel/io-uring", tries="use io_uring, whose operations no filter sees", container="ENOSYS", process="ENOSYS")
def io_uring() -> dict[str, str]:
    return {
        "set up": asked("io_uring_setup", 8, bytes(120)),
        "enter": asked("io_uring_enter", 0, 1, 0, 0, None, 0),
        "register": asked("io_uring_register", 0, 0, None, 0),
        "register without a ring": asked("io_uring_register", -1, 0x80000000, None, 0),
    }


@inside("kernel/aio", tries="use the older asynchronous input and output", container="ENOSYS", process="ENOSYS")
def aio() -> dict[str, str]:
    return {
        "set up": asked("io_setup", 8, bytes(8)),
        "submit": asked("io_submit", 0, 1, bytes(8)),
        "events": asked("io_getevents", 0, 1, 1, bytes(32), None),
        "cancel": asked("io_cancel", 0, bytes(64), bytes(32)),
        "destroy": asked("io_destroy", 0),
    }


@inside("kernel/bpf", tries="load programs into the kernel (bpf)", container="EPERM", process="EPERM")
def bpf() -> dict[str, str]:
    commands = {
        "make a map": 0,
        "load a program": 5,
        "open an object": 7,
        "next program": 11,
        "load type data": 18,
        "make a token": 36,
    }
    return {name: asked("bpf", number, bytes(128), 128) for name, number in commands.items()}


@inside("kernel/perf", tries="count and sample events of the machine", container="EPERM", process="EPERM")
def perf() -> dict[str, str]:
    attributes = struct.pack("<IIQQQQQ", 0, 112, 0, 0, 0, 0, 0x1) + bytes(64)
    return {
        "self": asked("perf_event_open", attributes, 0, -1, -1, 0),
        "everybody": asked("perf_event_open", attributes, -1, 0, -1, 0),
        "the host's first process": asked("perf_event_open", attributes, 1, -1, -1, 0),
    }


@inside("kernel/userfaultfd", tries="handle page faults of the kernel itself", container="EPERM", process="EPERM")
def userfaultfd() -> dict[str, str]:
    return {"full": asked("userfaultfd", 0), "user mode only": asked("userfaultfd", 1)}


@inside("kernel/modules", tries="load and remove kernel modules", container="EPERM", process="EPERM")
def modules() -> dict[str, str]:
    return {
        "load": asked("init_module", b"\x7fELF", 4, ""),
        "load a file": asked("finit_module", 0, "", 0),
        "load, compressed": asked("finit_module", 0, "", 4),
        "remove": asked("delete_module", "tartarus_no_such_module", 0o4000),
    }


@inside("kernel/restart", tries="restart the machine or replace its kernel", container="EPERM", process="EPERM")
def restart() -> dict[str, str]:
    # Wrong magic numbers and no segments: nothing would happen if they were let through.
    return {
        "reboot": asked("reboot", 0, 0, 0, None),
        "load a kernel": asked("kexec_load", 0, 0, None, 0),
        "load a kernel file": asked("kexec_file_load", -1, -1, 0, None, 0),
    }


@inside("kernel/log", tries="read, clear and silence the kernel's log", container="EPERM", process="EPERM")
def log() -> dict[str, str]:
    commands = {
        "read all": (3, bytes(4096), 4096),
        "size": (10, None, 0),
        "unread": (9, None, 0),
        "console level": (8, None, 7),
    }
    return {name: asked("syslog", *arguments) for name, arguments in commands.items()}


@inside("kernel/clock", tries="set the machine's clock", container="EPERM", process="EPERM")
def clock() -> dict[str, str]:
    now = time.time()
    seconds = struct.pack("<qq", int(now), 0)
    found = {"settimeofday": asked("settimeofday", seconds, None), "adjtimex": asked("adjtimex", bytes(208))}
    for number in (0, 1, 4, 7, 11):
        found[f"clock_settime {number}"] = asked("clock_settime", number, seconds)
        found[f"clock_adjtime {number}"] = asked("clock_adjtime", number, bytes(208))
    return found


@inside(
    "kernel/ports",
    tries="use input and output ports and segment tables",
    container="EPERM|ENOSYS",
    process="EPERM|ENOSYS",
)
def ports() -> dict[str, str]:
    return {
        "iopl": asked("iopl", 3),
        "ioperm": asked("ioperm", 0x60, 1, 1),
        "modify_ldt": asked("modify_ldt", 1, bytes(16), 16),
        "fanotify": asked("fanotify_init", 0, 0),
        "hang up": asked("vhangup"),
    }


@inside(
    "kernel/rare-calls", tries="use calls that few programs need and that had many bugs", container="ENOSYS|EPERM",
    process="ENOSYS|EPERM",
)  # fmt: skip
def rare_calls() -> dict[str, str]:
    names = (
        "kcmp", "process_madvise", "process_mrelease", "memfd_secret", "vmsplice", "remap_file_pages", "mbind", "set_mempolicy",
        "get_mempolicy", "migrate_pages", "move_pages", "set_mempolicy_home_node", "lookup_dcookie", "uselib", "ustat", "sysfs",
        "_sysctl", "nfsservctl", "create_module", "query_module", "get_kernel_syms", "getpmsg", "putpmsg", "afs_syscall", "tuxcall",
        "security", "vserver", "epoll_ctl_old", "epoll_wait_old", "set_thread_area", "get_thread_area", "name_to_handle_at",
        "cachestat", "lsm_get_self_attr", "lsm_set_self_attr", "lsm_list_modules", "setxattrat", "file_setattr",
    )  # fmt: skip
    return {name: asked(name, 0, 0, 0, 0, 0, 0) for name in names}


@inside(
    "kernel/personality",
    tries="switch off address randomisation and other safeguards",
    container="EPERM",
    process="EPERM",
)
def personality() -> dict[str, str]:
    bits = {
        "no randomisation": 0x0040000, "all readable memory executable": 0x0400000, "page zero": 0x0100000, "compat layout": 0x0200000,
        "limited addresses": 0x8000000, "short inodes": 0x1000000, "another system": 0x0001, "upper half": 0x0040000 | 1 << 32,
    }  # fmt: skip
    return {name: asked("personality", bit) for name, bit in bits.items()}


@inside(
    "kernel/unknown-calls",
    tries="get past the filter with numbers that no table has",
    container="ENOSYS",
    process="ENOSYS",
)
def unknown_calls() -> dict[str, str]:
    known = set(WORLD["numbers"].values())
    numbers = [number for number in range(max(known) + 200) if number not in known]
    numbers += [1024, 4095, 65535, 0x3FFFFFFF, 0x7FFFFFFF, -2, -(1 << 31)]
    found = {asked(number, 0, 0, 0, 0, 0, 0): number for number in numbers}
    return {f"such as {number}": answer for answer, number in found.items()}


@inside(
    "kernel/upper-half-of-number", tries="hide a refused call behind the upper half of its number", container="EPERM",
    process="EPERM",
)  # fmt: skip
def upper_half_of_number() -> dict[str, str]:
    names = ("mount", "unshare", "ptrace", "bpf", "chroot", "setns", "perf_event_open")
    return {name: asked(WORLD["numbers"][name] | 1 << 32, 0, 0, 0, 0, 0) for name in names}


@inside(
    "kernel/x32", tries="get past the filter by the x32 entry", container="ENOSYS", process="ENOSYS", machine="x86_64"
)
def x32() -> dict[str, str]:
    names = ("mount", "unshare", "ptrace", "getpid", "socket", "openat", "bpf", "clone")
    found = {name: asked(WORLD["numbers"][name] | _X32, 0, 0, 0, 0, 0) for name in names}
    return found | {f"its own {number}": asked(number | _X32, 0, 0, 0, 0, 0) for number in range(512, 548)}


@inside(
    "kernel/32-bit-entry", tries="get past the filter by int 0x80, whose numbers mean other calls", container="SIGSYS", process="SIGSYS",
    machine="x86_64",
)  # fmt: skip
def entry_32_bit() -> dict[str, str]:
    def enter(number: int) -> str:
        def attempt() -> str:
            # mov eax, number; xor ebx, ebx; int 0x80; ret
            machine_code(b"\x53\xb8" + struct.pack("<I", number) + b"\x31\xdb\xcd\x80\x5b\xc3")()
            return "escaped"

        return in_child(attempt)

    return {
        name: enter(number) for name, number in (("getpid", 20), ("mount", 21), ("unshare", 310), ("socketcall", 102))
    }


@inside(
    "kernel/32-bit-mode", tries="get past the filter by running in 32-bit mode", container="SIGSYS", process="SIGSYS",
    machine="x86_64",
)  # fmt: skip
def mode_32_bit() -> str:
    # push 0x23; lea rax, [rip+5]; push rax; retfq; in 32-bit mode: mov eax, 20; int 0x80; hlt
    code = b"\x6a\x23\x48\x8d\x05\x03\x00\x00\x00\x50\x48\xcb\xb8\x14\x00\x00\x00\xcd\x80\xf4"

    def attempt() -> str:
        machine_code(code)()
        return "escaped"

    return in_child(attempt)


@inside(
    "kernel/arguments-of-filter", tries="smuggle arguments past the filter in the half that the kernel ignores",
    container="EPERM|EINVAL|EAFNOSUPPORT", process="EPERM|EINVAL|EAFNOSUPPORT",
)  # fmt: skip
def arguments_of_filter() -> dict[str, str]:
    high = 1 << 32
    return {
        "packet socket": asked("socket", 17 | high, 3, 0),
        "vsock": asked("socket", 40 | high, 1, 0),
        "crypto socket": asked("socket", 38 | high, 5, 0),
        "memory map": asked("prctl", 35 | high, 1, 0, 0, 0),
        "set-id directory": asked("mkdirat", -100, "made", 0o2755 | high),
        "device": asked("mknodat", -100, "made", 0o020666 | high, 0x103),
        "clone flags": asked("unshare", 0x10000000 | high),
    }


@inside(
    "kernel/raise-limits", tries="raise its own hard limits", container="EPERM", process="EPERM",
    note="The limit on core files is left out: asking for another appears to work, and changes nothing.",
)  # fmt: skip
def raise_limits() -> dict[str, str]:
    kinds = {
        name: number
        for name, number in vars(resource).items()
        if name.startswith("RLIMIT_") and name not in {"RLIMIT_CORE", "RLIMIT_OFILE"}
    }
    found = {}
    for name, number in sorted(kinds.items()):
        hard = resource.getrlimit(number)[1]
        if hard != resource.RLIM_INFINITY:
            higher = struct.pack("<QQ", hard + 1, hard + 1)
            found[name] = asked("prlimit64", 0, number, higher, None)
            found[f"{name}, by setrlimit"] = asked("setrlimit", number, higher)
    return found


@inside(
    "kernel/core-limit", tries="allow itself core files, or the start of the host's core dump helper", container="1 byte",
    process="1 byte",
    note="One byte is too small for a core file, and the one value that keeps a helper in core_pattern from being started.",
)  # fmt: skip
def core_limit() -> dict[str, str]:
    found = {}
    for name, value in (("none", 0), ("all", (1 << 64) - 1), ("some", 1 << 20)):
        outcome(call, "prlimit64", 0, resource.RLIMIT_CORE, struct.pack("<QQ", value, value), None)
        outcome(call, "setrlimit", resource.RLIMIT_CORE, struct.pack("<QQ", value, value))
        found[name] = "1 byte" if resource.getrlimit(resource.RLIMIT_CORE) == (1, 1) else "escaped"
    return found


@inside(
    "kernel/core-dump", tries="crash, and leave a core file or start the host's core dump helper", container="no core",
    process="no core",
)  # fmt: skip
def core_dump() -> dict[str, str]:
    found = {}
    for number in (3, 4, 6, 7, 8, 11, 31):
        pid = os.fork()
        if pid == 0:
            os.kill(os.getpid(), number)
            os._exit(0)
        status = os.waitpid(pid, 0)[1]
        found[f"signal {number}"] = "escaped" if os.WCOREDUMP(status) or not os.WIFSIGNALED(status) else "no core"
    left = [name for name in os.listdir(".") if "core" in name]
    return found | {"files": "escaped" if left else "no core"}


@inside(
    "kernel/priorities",
    tries="take real-time priority and go before everybody",
    container="EPERM|EACCES",
    process="EPERM|EACCES",
)
def priorities() -> dict[str, str]:
    deadline = struct.pack("<IIQiIQQQ", 48, 6, 0, 0, 0, 10_000_000, 30_000_000, 30_000_000)
    found = {
        "deadline": asked("sched_setattr", 0, deadline, 0),
        "nice": asked("setpriority", 0, 0, -20),
        "disk": asked("ioprio_set", 1, 0, 1 << 13),
    }
    for name, policy in (("first in, first out", 1), ("round robin", 2)):
        for priority in (1, 99):
            found[f"{name} {priority}"] = asked("sched_setscheduler", 0, policy, struct.pack("<i", priority))
    return found


@inside(
    "kernel/locked-memory", tries="lock more memory than its limit, or take huge pages", container="ENOMEM|EPERM",
    process="ENOMEM|EPERM|ENOSYS",
)  # fmt: skip
def locked_memory() -> dict[str, str]:
    size = 64 << 20
    address = call("mmap", 0, size, 3, 0x22, -1, 0)
    return {
        "lock": asked("mlock", address, size),
        "lock on fault": asked("mlock2", address, size, 1),
        "lock all": asked("mlockall", 1),
        "map locked": asked("mmap", 0, size, 3, 0x2022, -1, 0).replace("EAGAIN", "ENOMEM"),
        "huge pages": asked("mmap", 0, 1 << 30, 3, 0x40022 | 30 << 26, -1, 0),
        "huge shared segment": asked("shmget", 0, size, 0o1000 | 0o4000 | 0o600),
    }


@inside("kernel/page-zero", tries="map the page at address zero", container="EPERM|EACCES", process="EPERM|EACCES")
def page_zero() -> dict[str, str]:
    fixed = 0x32
    return {
        "read": asked("mmap", 0, 4096, 1, fixed, -1, 0),
        "write and run": asked("mmap", 0, 4096, 7, fixed, -1, 0),
        "grow down to it": asked("mmap", 0, 4096, 3, fixed | 0x0100, -1, 0),
    }
