"""Paths of /proc and /sys that a container-level guest may not write, or not see.

Most are root's on the host, and the guest's root is not; these walls hold when that one falls (a
capability bug, a world-readable file that tells about the host or its other tenants). A path that a
kernel does not have is skipped.
"""

from __future__ import annotations

from typing import Final

READ_ONLY_PATHS: Final[tuple[str, ...]] = (
    "/proc/bus",  # PCI configuration space
    "/proc/fs",  # file systems' switches
    "/proc/irq",  # which CPU serves which interrupt
    "/proc/sys",  # kernel settings; some belong to our namespaces and would be writable
)

MASKED_FILES: Final[tuple[str, ...]] = (
    "/proc/bootconfig",  # as the next one
    "/proc/cmdline",  # the kernel's command line, where some hosts keep secrets
    "/proc/kcore",  # physical memory
    "/proc/kallsyms",  # addresses, for attacks on the kernel
    "/proc/keys",  # key descriptions of this user
    "/proc/key-users",
    "/proc/kmsg",  # kernel log
    "/proc/sysrq-trigger",  # reboots, kills
    "/proc/timer_list",  # other tenants' processes by name
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/vmallocinfo",  # kernel addresses
    "/proc/slabinfo",
    "/proc/pagetypeinfo",  # shape of physical memory, for row hammering
    "/proc/kpagecount",
    "/proc/kpageflags",
    "/proc/kpagecgroup",
    "/proc/interrupts",  # keystroke and packet timing
    "/proc/softirqs",
    "/proc/modules",
    "/proc/locks",  # other tenants' file locks
    "/proc/swaps",
    "/proc/diskstats",
    "/proc/config.gz",
)

MASKED_DIRECTORIES: Final[tuple[str, ...]] = (
    "/proc/acpi",
    "/proc/asound",
    "/proc/driver",
    "/proc/scsi",
    "/proc/dynamic_debug",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",  # power use leaks other tenants' work
)
