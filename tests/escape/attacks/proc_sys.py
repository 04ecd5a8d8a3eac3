"""Attacks through /proc and /sys: settings of the kernel, secrets of the host, other tenants' traces."""

from __future__ import annotations

import os

from tests.escape.attack import inside
from tests.escape.kit import ESCAPED, WORLD, content, opened, outcome, secret_of, told, wrote


@inside(
    "proc/settings", tries="change kernel settings below /proc/sys", container="EROFS|EACCES|ENOENT|EPERM",
    process="EACCES|ENOENT",
)  # fmt: skip
def settings() -> dict[str, str]:
    values = {
        "kernel/core_pattern": "|/bin/true", "kernel/modprobe": "/bin/true", "kernel/hotplug": "/bin/true",
        "kernel/hostname": "taken", "kernel/domainname": "taken", "kernel/randomize_va_space": "0", "kernel/sysrq": "1",
        "kernel/kptr_restrict": "0", "kernel/perf_event_paranoid": "-1", "kernel/unprivileged_bpf_disabled": "0",
        "kernel/yama/ptrace_scope": "0", "kernel/panic": "1", "kernel/shmmax": "1", "kernel/msgmax": "1", "kernel/sem": "1",
        "kernel/ns_last_pid": "100", "kernel/usermodehelper/bset": "0 0", "kernel/threads-max": "1000",
        "kernel/keys/maxkeys": "1", "kernel/pty/max": "1", "kernel/dmesg_restrict": "0", "kernel/printk": "8",
        "vm/mmap_min_addr": "0", "vm/overcommit_memory": "1", "vm/drop_caches": "0", "vm/unprivileged_userfaultfd": "1",
        "fs/suid_dumpable": "2", "fs/protected_symlinks": "0", "fs/mqueue/queues_max": "1", "fs/inotify/max_user_instances": "1",
        "fs/binfmt_misc/register": ":x:M::x::/bin/sh:", "fs/binfmt_misc/status": "0", "fs/pipe-max-size": "4096",
        "net/ipv4/ip_forward": "1", "net/ipv4/ip_unprivileged_port_start": "1", "net/core/somaxconn": "1",
        "user/max_user_namespaces": "1", "user/max_inotify_instances": "1",
    }  # fmt: skip
    return {name: wrote(f"/proc/sys/{name}", value.encode()) for name, value in values.items()}


@inside(
    "proc/sysrq", tries="write to the magic system request trigger", container="EROFS|EACCES|ENOENT", process="EACCES|ENOENT",
)  # fmt: skip
def sysrq() -> str:
    # 'h' prints a help text, the one command that does nothing else.
    return wrote("/proc/sysrq-trigger", b"h")


@inside(
    "proc/kernel-memory", tries="read the kernel's memory, addresses and log", container="empty|EACCES|ENOENT|EPERM",
    process="EACCES|ENOENT|EPERM",
)  # fmt: skip
def kernel_memory() -> dict[str, str]:
    names = (
        "kcore", "kallsyms", "kmsg", "modules", "vmallocinfo", "slabinfo", "pagetypeinfo", "kpagecount", "kpageflags",
        "kpagecgroup", "timer_list", "sched_debug", "latency_stats", "config.gz", "iomem_", "mtrr",
    )  # fmt: skip
    return {name: secret_of(f"/proc/{name}") for name in names}


@inside(
    "proc/addresses", tries="find physical addresses of devices and memory", container="zeros|ENOENT|EACCES|empty",
    process="EACCES|ENOENT",
)  # fmt: skip
def addresses() -> dict[str, str]:
    def look(name: str) -> str:
        answer, said = told(content, f"/proc/{name}", succeeded="zeros")
        numbers = {line.split(b":")[0].strip() for line in (said or b"").splitlines()}
        hidden = all(set(number) <= set(b"0-") for number in numbers)
        return answer if hidden else ESCAPED

    return {name: look(name) for name in ("iomem", "ioports")}


@inside(
    "proc/pagemap", tries="find the physical page behind an address (Rowhammer)", container="zeros|EPERM|EACCES",
    process="EACCES",
)  # fmt: skip
def pagemap() -> str:
    page = os.sysconf("SC_PAGE_SIZE")

    def look() -> list[int]:
        with open("/proc/self/maps") as maps:
            start = int(next(line for line in maps if "[heap]" in line).split("-")[0], 16)
        with open("/proc/self/pagemap", "rb", buffering=0) as table:
            table.seek(start // page * 8)
            entries = table.read(64)
        return [int.from_bytes(entries[at : at + 8], "little") & (1 << 55) - 1 for at in range(0, len(entries), 8)]

    answer, numbers = told(look, succeeded="zeros")
    return ESCAPED if any(numbers or ()) else answer


@inside("proc/keys", tries="list the keys of the kernel's keyrings", container="empty|ENOENT", process="EACCES|ENOENT")
def keys() -> dict[str, str]:
    return {name: secret_of(f"/proc/{name}") for name in ("keys", "key-users")}


@inside(
    "proc/boot-line", tries="read the kernel's command line, where some hosts keep secrets", container="empty|ENOENT|EACCES",
    process="EACCES",
)  # fmt: skip
def boot_line() -> str:
    return secret_of("/proc/cmdline")


@inside(
    "proc/interrupts", tries="time other tenants' keystrokes and packets by interrupt counts", container="empty|ENOENT",
    process="EACCES",
)  # fmt: skip
def interrupts() -> dict[str, str]:
    return {name: secret_of(f"/proc/{name}") for name in ("interrupts", "softirqs")}


@inside(
    "proc/interrupt-totals", tries="count interrupts and context switches by /proc/stat", container="visible", process="visible",
    note="/proc/stat says how busy the machine is, to every program that asks for CPU use; the threat model says so.",
)  # fmt: skip
def interrupt_totals() -> dict[str, str]:
    return {"totals": "visible" if b"\nintr " in content("/proc/stat") else "ENOENT"}


@inside(
    "proc/other-tenants", tries="read lists that name other tenants' files, disks and locks", container="empty|ENOENT|EACCES",
    process="EACCES|ENOENT",
)  # fmt: skip
def other_tenants() -> dict[str, str]:
    return {
        name: secret_of(f"/proc/{name}")
        for name in ("locks", "diskstats", "swaps", "sysvipc/missing", "fs/nfsd/exports")
    }


@inside(
    "proc/firmware", tries="read ACPI, DMI, EFI and power use", container="empty|ENOENT|EACCES", process="EACCES|ENOENT"
)
def firmware() -> dict[str, str]:
    def look(path: str) -> str:
        answer, seen = told(os.listdir, path, succeeded="empty")
        return ESCAPED if seen else answer

    paths = (
        "/proc/acpi", "/proc/scsi", "/proc/asound", "/proc/driver", "/proc/dynamic_debug", "/sys/firmware", "/sys/class/dmi/id",
        "/sys/devices/virtual/powercap", "/sys/devices/pci0000:00", "/sys/kernel/debug", "/sys/kernel/tracing",
        "/sys/kernel/security", "/sys/fs/bpf", "/sys/fs/pstore", "/sys/class/net", "/sys/block", "/sys/module", "/sys/bus",
        "/sys/fs/ext4", "/sys/hypervisor",
    )  # fmt: skip
    return {path: look(path) for path in paths}


@inside(
    "proc/secrets-in-processes", tries="find secrets in the environments and command lines of the host's processes",
    container="invisible", process="EACCES|invisible", twin=True,
)  # fmt: skip
def secrets_in_processes() -> dict[str, str]:
    def look(name: str) -> str:
        answer, entries = told(os.listdir, "/proc", succeeded="invisible")
        pids = {int(entry) for entry in entries or () if entry.isdigit()}
        pids |= {WORLD["twin"], WORLD["daemon_pid"], 1}
        texts = [told(content, f"/proc/{pid}/{name}")[1] for pid in pids]
        return ESCAPED if any(text and WORLD["secret"].encode() in text for text in texts) else answer

    return {name: look(name) for name in ("environ", "cmdline", "maps", "auxv", "comm")}


@inside(
    "proc/guest-agent", tries="read the guest agent's memory, environment, stack and state", container="EACCES|EPERM",
    process="EACCES",
)  # fmt: skip
def guest_agent() -> dict[str, str]:
    agent = WORLD["agent"]
    names = (
        "mem",
        "maps",
        "environ",
        "auxv",
        "syscall",
        "stack",
        "personality",
        "pagemap",
        "smaps",
        "exe",
        "cwd",
        "root",
        "ns/mnt",
    )
    return {name: outcome(content, f"/proc/{agent}/{name}") for name in names}


@inside(
    "proc/out-of-memory-score", tries="hide from the out-of-memory killer", container="EACCES|EPERM", process="EACCES",
)  # fmt: skip
def out_of_memory_score() -> dict[str, str]:
    return {
        name: wrote(f"/proc/self/{name}", value) for name, value in (("oom_score_adj", b"-1000"), ("oom_adj", b"-17"))
    }


@inside(
    "proc/maps-of-ids", tries="change the maps of user and group ids or the clock offsets of its namespaces",
    container="EPERM|EACCES|EROFS", process="EACCES",
)  # fmt: skip
def maps_of_ids() -> dict[str, str]:
    lines = {"uid_map": b"0 0 4294967295", "gid_map": b"0 0 4294967295", "projid_map": b"0 0 1", "setgroups": b"allow",
             "timens_offsets": b"monotonic 1 0"}  # fmt: skip
    return {
        name: wrote(f"/proc/self/{name}", line) for name, line in lines.items() if os.path.exists(f"/proc/self/{name}")
    }


@inside(
    "proc/network-of-host", tries="list the host's sockets and network devices in /proc/net", container="invisible",
    process="EACCES",
)  # fmt: skip
def network_of_host() -> dict[str, str]:
    def look(name: str) -> str:
        answer, said = told(content, f"/proc/net/{name}", 1 << 20, succeeded="invisible")
        ports = [f":{port:04X} ".encode() for port in WORLD["ports"].values()]
        marks = [WORLD["abstract"].strip("\0").encode(), *ports]
        return ESCAPED if said and any(mark in said for mark in marks) else answer

    return {name: look(name) for name in ("unix", "tcp", "tcp6", "udp", "dev", "route")}


@inside(
    "sys/write", tries="write to /sys: power, devices, modules, memory, CPUs", container="EACCES|ENOENT|EROFS",
    process="EACCES|ENOENT",
)  # fmt: skip
def sys_write() -> dict[str, str]:
    # Values that would change nothing if they were taken.
    paths = {
        "/sys/power/pm_async": b"1", "/sys/kernel/uevent_helper": b"", "/sys/kernel/mm/ksm/run": b"0", "/sys/kernel/profiling": b"0",
        "/sys/kernel/mm/transparent_hugepage/defrag": b"madvise", "/sys/bus/pci/rescan": b"0", "/sys/class/net/lo/mtu": b"65536",
        "/sys/devices/system/cpu/cpu0/online": b"1", "/sys/devices/system/cpu/cpu1/online": b"1", "/sys/block/vda/queue/rotational": b"1",
        "/sys/devices/system/cpu/smt/control": b"on", "/sys/devices/system/node/node0/compact": b"",
        "/sys/module/kernel/parameters/panic": b"0", "/sys/fs/cgroup/notify_on_release": b"0",
    }  # fmt: skip
    return {path: wrote(path, value) for path, value in paths.items()}


@inside(
    "sys/make", tries="make directories and files below /sys, /proc and /dev", container="EACCES|EPERM|EROFS|ENOENT",
    process="EACCES|EPERM|ENOENT",
)  # fmt: skip
def sys_make() -> dict[str, str]:
    found = {}
    for place in (
        "/sys",
        "/sys/fs/cgroup",
        "/sys/kernel",
        "/proc",
        "/proc/sys",
        "/dev",
        "/dev/pts",
        "/sys/devices/system/cpu",
    ):
        found[f"directory in {place}"] = outcome(os.mkdir, f"{place}/made")
        found[f"file in {place}"] = opened(f"{place}/made", os.O_CREAT | os.O_WRONLY)
    return found


@inside(
    "proc/agent-settings", tries="make the guest agent the first victim of the out-of-memory killer", container="own", process="EACCES",
    note="At container level the agent has the user of its guest, who may so shorten the life of his own sandbox.",
)  # fmt: skip
def agent_settings() -> str:
    agent = WORLD["agent"]
    answer = wrote(f"/proc/{agent}/oom_score_adj", b"1000")
    return "own" if answer == ESCAPED and agent == 1 else answer
