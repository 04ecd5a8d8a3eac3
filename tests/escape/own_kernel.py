"""Levels whose guests have a kernel of their own: what it must answer to the attacks, and what it may do as it likes.

Such a kernel gives its guests from its own means (a namespace, a socket of its own network, a setting) where a shared
one must refuse. `ALIKE`: attacks that are answered as at the container level. `ANSWERS`: those held by other answers.
`OWN`: those that are made there too, whatever is answered: what counts is that neither the host nor a neighbour nor a
process outside is changed by them. `ABSENT`: those that are not made, each with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

Reasons = dict[str, tuple[str, ...]]
"""Why, and for which attacks; `door/*` stands for all of a door that are named nowhere else."""


class OwnKernel(msgspec.Struct, frozen=True):
    """What a level is expected to do with each attack. `ends`: those of `own` that may end their own sandbox."""

    alike: frozenset[str]
    answers: dict[str, str]
    own: Reasons
    absent: Reasons
    ends: frozenset[str] = frozenset()

    def expected(self, name: str, container: str) -> str:
        """The answers that mean it was held, joined by `|`; none for attacks that are not judged by them."""
        return container if name in self.alike else self.answers.get(name, "")

    def named(self) -> Iterator[str]:
        """Every attack that is named, as often as it is."""
        yield from self.alike
        yield from self.answers
        for reasons in (self.own, self.absent):
            for names in reasons.values():
                yield from names

    def why(self, reasons: Reasons, name: str) -> str:
        """The reason that is given for an attack, or nothing."""
        if name in self.alike or name in self.answers:
            return ""
        exact = [why for table in (self.own, self.absent) for why, names in table.items() if name in names]
        door = name.split("/", maxsplit=1)[0] + "/*"
        for why, names in reasons.items():
            if name in names or (not exact and door in names):
                return why
        return ""


GVISOR = OwnKernel(
    alike=frozenset(
        [
            "clones/copy-on-write",
            "clones/files",
            "clones/random",
            "clones/shared-mappings",
            "clones/traces",
            "devices/log",
            "devices/make",
            "devices/others-terminals",
            "files-api/deep-tree",
            "files-api/odd-names",
            "files-api/paths",
            "files-api/read-race",
            "files-api/remove-race",
            "files-api/set-id",
            "files-api/special-files",
            "files-api/watch-flood",
            "files-api/watch-host",
            "files-api/write-race",
            "files/agent-binary",
            "files/attributes",
            "files/dotdot",
            "files/execute-host",
            "files/freeze",
            "files/hardlink",
            "files/homes",
            "files/list-host",
            "files/metadata",
            "files/neighbours",
            "files/neither-mode",
            "files/path-descriptor",
            "files/private-mapping",
            "files/programs",
            "files/read-host",
            "files/self-exe",
            "files/stat-host",
            "files/state-dir",
            "files/symlink",
            "files/write-host",
            "guest/descriptors",
            "guest/descriptors-of-cold-commands",
            "guest/environment",
            "guest/kill-everybody",
            "guest/kill-group",
            "guest/own-files",
            "guest/pass-descriptors",
            "guest/stop-agent",
            "guest/stop-everybody",
            "ipc/semaphores",
            "ipc/shared-files",
            "ipc/shared-memory",
            "ipc/temporary-files",
            "kernel/bpf",
            "kernel/clock",
            "kernel/core-dump",
            "kernel/io-uring",
            "kernel/modules",
            "kernel/ports",
            "kernel/raise-limits",
            "kernel/restart",
            "kernel/unknown-calls",
            "kernel/x32",
            "leftovers/buried-files",
            "leftovers/daemons",
            "leftovers/daemons-of-command",
            "leftovers/many",
            "leftovers/paused",
            "leftovers/storm",
            "mounts/binds",
            "mounts/change-root",
            "mounts/file-systems",
            "mounts/listing",
            "mounts/unmount",
            "namespaces/cgroup",
            "namespaces/host-name",
            "namespaces/links",
            "namespaces/walk",
            "network/abstract",
            "network/host-datagrams",
            "network/host-loopback",
            "network/neighbour",
            "network/outside",
            "network/paired-sockets",
            "network/path-sockets",
            "network/raw",
            "network/serve",
            "privilege/become-others",
            "privilege/groups",
            "privilege/set-id-programs",
            "proc/addresses",
            "proc/agent-settings",
            "proc/firmware",
            "proc/interrupt-totals",
            "proc/interrupts",
            "proc/kernel-memory",
            "proc/keys",
            "proc/maps-of-ids",
            "proc/network-of-host",
            "proc/other-tenants",
            "proc/secrets-in-processes",
            "processes/exists",
            "processes/groups",
            "processes/limits-of-others",
            "processes/owner-of-signals",
            "processes/robust-list",
            "processes/signals",
            "resources/address-space",
            "resources/descriptors",
            "resources/disk-of-many",
            "resources/files",
            "resources/input-unread",
            "resources/limits-hold",
            "resources/memory-bomb",
            "resources/memory-bomb-at-agent",
            "resources/memory-files",
            "resources/memory-of-many",
            "resources/output-crumbs",
            "resources/output-logged",
            "resources/output-unread",
            "resources/time",
            "sharing/keys",
            "sharing/lock-programs",
            "sharing/pipes",
            "sharing/signals",
            "sharing/timers",
            "sharing/watch-files",
            "sharing/watch-programs",
            "sharing/watchers",
            "sharing/watchers-of-host",
            "sys/write",
            "user-mounts/climb",
            "user-mounts/devices",
            "user-mounts/moved-away",
            "user-mounts/moved-in",
            "user-mounts/nothing-else",
            "user-mounts/set-id-programs",
            "user-mounts/targets",
        ]
    ),
    answers={
        "clones/layout": "different",
        "devices/masks": "ENOENT",
        "devices/random": "ENOTTY",
        "devices/terminal-injection": "ENOTTY",
        "files/change-directory": "ENOENT|EOPNOTSUPP",
        "files/file-handles": "EOPNOTSUPP",
        "files/host-paths": "ENOENT|invisible",
        "files/leases": "EINVAL",
        "files/memory-file": "EACCES",
        "files/metadata-by-descriptor": "EACCES|EOPNOTSUPP|EPERM|own",
        "guest/attach-agent": "ENOSYS|EPERM|ESRCH",
        "ipc/lists": "ENOENT|none",
        "ipc/message-queues": "EACCES|ENOENT",
        "kernel/32-bit-mode": "SIGSEGV",
        "kernel/page-zero": "ENOMEM",
        "kernel/perf": "ENODEV",
        "kernel/personality": "EINVAL",
        "kernel/upper-half-of-number": "ENOSYS",
        "kernel/userfaultfd": "ENOSYS",
        "mounts/new-calls": "ENOSYS",
        "mounts/quota-and-swap": "ENOSYS|EPERM",
        "namespaces/enter": "EINVAL|ENOENT|ENOSYS|EPERM",
        "namespaces/of-processes-outside": "ENOSYS",
        "network/devices": "ENOTTY|only loopback",
        "network/families": "EAFNOSUPPORT|EPERM|EPROTONOSUPPORT|ESOCKTNOSUPPORT",
        "network/other-pairs": "EAFNOSUPPORT|EOPNOTSUPP|ESOCKTNOSUPPORT",
        "network/protocols": "EINVAL|EPROTONOSUPPORT",
        "network/routes": "EACCES",
        "privilege/file-capabilities": "EOPNOTSUPP",
        "privilege/file-system-user": "ENOSYS",
        "privilege/take-capabilities": "EINVAL|EPERM",
        "proc/pagemap": "ENOENT",
        "proc/sysrq": "EIO",
        "processes/advise": "ENOSYS|EPERM",
        "processes/by-descriptor": "ENOSYS",
        "processes/memory": "EPERM|ESRCH",
        "processes/parent-of-its-choice": "SIGKILL",
        "processes/steal-descriptors": "ENOSYS|EPERM|ESRCH",
        "processes/wait": "ECHILD|ENOSYS|ESRCH",
        "resources/fork-bomb": "timed_out, timeout|failed, resource_limit",
        "user-mounts/host-path": "invisible",
        "user-mounts/make-set-id": "EOPNOTSUPP|EPERM|pretended",
        "user-mounts/read-only": "ENOSYS|EOPNOTSUPP|EPERM|EROFS",
        "user-mounts/sockets": "ECONNREFUSED|EPERM",
    },
    own={
        "devices that its own kernel makes up": (
            "devices/change-null",
            "devices/open",
            "devices/touch-null",
        ),
        "its root may look at and stop its own agent, which the host believes no more than its guest": (
            "files/process-roots",
            "files/secrets",
            "guest/agent-channel",
            "guest/signal-agent",
            "proc/guest-agent",
            "processes/trace",
        ),
        "its root has namespaces, capabilities, keys, filters and sockets of its own kernel's": (
            "kernel/arguments-of-filter",
            "mounts/other-namespaces",
            "mounts/user-file-systems",
            "namespaces/clone",
            "namespaces/clone3",
            "namespaces/unshare",
            "network/netlink",
            "network/options",
            "network/ping",
            "privilege/keyrings",
            "privilege/locks",
            "privilege/relax-filter",
            "privilege/set-id-files",
        ),
        "a call or a setting of its own kernel, which knows no other sandbox": (
            "ipc/messages",
            "kernel/32-bit-entry",
            "kernel/aio",
            "kernel/core-limit",
            "kernel/locked-memory",
            "kernel/log",
            "kernel/priorities",
            "kernel/rare-calls",
            "proc/boot-line",
            "proc/out-of-memory-score",
            "proc/settings",
            "processes/scheduling-of-others",
            "processes/user-wide",
            "sys/make",
        ),
        "its /dev/shm is its memory, which has a limit of its own": ("resources/disk",),
        "each of its processes is one of the host's and costs memory: with little of that, it ends as resource_limit first": (
            "resources/processes",
        ),
    },
    absent={
        "its terminals have no such operations: see devices/terminal-injection": ("devices/own-terminal",),
        "its root may end its own init, and itself with it: guest/signal-agent does": ("guest/kill-agent",),
        "its agent is the same program as at the container level, and so is the host's end of its channel": (
            "hostile-agent/*",
        ),
        "its root has the capabilities of its own kernel, which knows fewer than are asked for": (
            "privilege/has-none",
        ),
        "its kernel has no Landlock": ("privilege/relax-landlock",),
        "its kernel makes its terminals and counts its users": (
            "sharing/terminals",
            "sharing/user-namespace",
        ),
    },
    ends=frozenset(["guest/signal-agent", "processes/trace", "resources/processes"]),
)
