"""How a sandbox is hardened beyond what its level gives by itself (the roadmap's SecurityConfig).

Said by a template, by a request, and as a minimum by a policy. What is left out is the level's own. Each field is
honoured at a level, or the request is refused there with what would do (`tartarus.runtimes.hardening`).
"""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from tartarus.model.checks import require
from tartarus.model.ids import check_name

CAPABILITIES: Final = (
    "CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP",
    "LINUX_IMMUTABLE", "NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW", "IPC_LOCK", "IPC_OWNER",
    "SYS_MODULE", "SYS_RAWIO", "SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT", "SYS_ADMIN", "SYS_BOOT", "SYS_NICE",
    "SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD", "LEASE", "AUDIT_WRITE", "AUDIT_CONTROL", "SETFCAP",
    "MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG", "WAKE_ALARM", "BLOCK_SUSPEND", "AUDIT_READ", "PERFMON", "BPF",
    "CHECKPOINT_RESTORE",
)  # fmt: skip
"""The kernel's, each at its number."""
ALL: Final = "ALL"
MAX_RANGES = 8
MAX_ID = 2**32 - 2


class SeccompAction(str, Enum):
    """What becomes of a call that the filter has no place for: it fails, its program gets SIGSYS, or is killed."""

    ERRNO = "errno"
    TRAP = "trap"
    KILL = "kill"


class Lockdown(str, Enum):
    """What a kernel keeps from its own root: nothing, whatever changes it, or whatever reads it as well."""

    NONE = "none"
    INTEGRITY = "integrity"
    CONFIDENTIALITY = "confidentiality"


class IdMapping(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A range of ids: `size` of them from `container_id` in the sandbox are those from `host_id` on the host.

    Without a `host_id` they are those that the host gives.
    """

    container_id: int
    size: int
    host_id: int | None = None

    def __post_init__(self) -> None:
        require(self.size > 0, "an id mapping is empty", "give a size of 1 or more")
        for first in (self.container_id, self.host_id or 0):
            require(0 <= first <= MAX_ID - self.size, "an id mapping is out of range", f"use ids of 0 to {MAX_ID}")


class SecurityConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The keys of the roadmap, in the names of YAML and JSON."""

    hardened_kernel: Annotated[
        bool | None, Meta(description="Boot the microVM's kernel with the hardening that costs time, too.")
    ] = None
    kernel_lockdown: Annotated[
        Lockdown | None, Meta(description="What the microVM's kernel keeps from its own root.")
    ] = None
    seccomp_profile: Annotated[
        str, Meta(description="Which system calls programs may make: a profile's name, such as ember or your own.")
    ] = ""
    seccomp_default: Annotated[
        SeccompAction | None, Meta(description="What becomes of other calls: errno, trap or kill.")
    ] = None
    drop_capabilities: Annotated[
        tuple[str, ...], Meta(description="Capabilities that programs never have, such as NET_RAW, or ALL.")
    ] = ()
    add_capabilities: Annotated[
        tuple[str, ...], Meta(description="Capabilities over its own files and users that the sandbox's user has.")
    ] = ()
    user_namespace: Annotated[
        bool | None, Meta(description="Whether its root must be nobody on the host, by a user namespace.")
    ] = None
    uid_mapping: Annotated[tuple[IdMapping, ...], Meta(description="The user ids that it has, of the level's.")] = ()
    gid_mapping: Annotated[tuple[IdMapping, ...], Meta(description="The group ids that it has, of the level's.")] = ()

    def __post_init__(self) -> None:
        if self.seccomp_profile:
            check_name(self.seccomp_profile)
        for what, names in (("drop", self.drop_capabilities), ("add", self.add_capabilities)):
            for name in names:
                known = plain(name) in CAPABILITIES or (plain(name) == ALL and what == "drop")
                require(known, f"{name[:40]!r} is no capability to {what}", "use names as in capabilities(7)")
        both = {plain(name) for name in self.add_capabilities} & {plain(name) for name in self.drop_capabilities}
        require(not both, f"{', '.join(sorted(both))} is added and dropped", "leave one out")
        for mapping in (self.uid_mapping, self.gid_mapping):
            require(len(mapping) <= MAX_RANGES, f"{len(mapping)} ranges of ids", f"use at most {MAX_RANGES}")

    @property
    def dropped(self) -> frozenset[str]:
        """The capabilities to drop, `ALL` spelt out; what is added by name stays."""
        names = {plain(name) for name in self.drop_capabilities}
        return frozenset(CAPABILITIES if ALL in names else names) - self.added

    @property
    def added(self) -> frozenset[str]:
        """The capabilities to add."""
        return frozenset(plain(name) for name in self.add_capabilities)


def plain(name: str) -> str:
    """A capability's name without its prefix, in capitals."""
    return name.upper().removeprefix("CAP_")


_ACTIONS = tuple(SeccompAction)
_LOCKDOWNS = tuple(Lockdown)


def at_least_action(one: SeccompAction | None, other: SeccompAction | None) -> bool:
    """Whether the one is as strict as the other; nothing said is `errno`."""
    return _ACTIONS.index(one or SeccompAction.ERRNO) >= _ACTIONS.index(other or SeccompAction.ERRNO)


def at_least_lockdown(one: Lockdown | None, other: Lockdown | None) -> bool:
    """Whether the one keeps as much as the other; nothing said is `none`."""
    return _LOCKDOWNS.index(one or Lockdown.NONE) >= _LOCKDOWNS.index(other or Lockdown.NONE)


def combined(template: SecurityConfig | None, request: SecurityConfig | None) -> SecurityConfig | None:
    """What a request asks for over its template's: it may tighten what the author said, and loosen nothing of it.

    Raises InvalidRequest for what would be looser, or can't be both.
    """
    if template is None or request is None:
        return request if template is None else template
    for field in ("seccomp_profile", "uid_mapping", "gid_mapping"):
        said, asked = getattr(template, field), getattr(request, field)
        require(not (said and asked and said != asked), f"the template has another {field}", "leave it out")
    for field in ("hardened_kernel", "user_namespace"):
        require(
            not (getattr(template, field) and getattr(request, field) is False),
            f"the template demands {field}", "leave it out",
        )  # fmt: skip
    for name, strict in (("seccomp_default", at_least_action), ("kernel_lockdown", at_least_lockdown)):
        said, asked = getattr(template, name), getattr(request, name)
        require(asked is None or strict(asked, said), f"the template demands {name} {said and said.value}",
                "ask for that or more")  # fmt: skip
    beyond = request.added & template.dropped
    require(not beyond, f"the template drops {', '.join(sorted(beyond))}", "leave it out of add_capabilities")
    added = (template.added - request.dropped) | request.added
    dropped = dict.fromkeys(map(plain, (*template.drop_capabilities, *request.drop_capabilities)))
    said_by_request = {
        name: value
        for name, value in ((name, getattr(request, name)) for name in request.__struct_fields__)
        if value not in (None, (), "")
    }
    changes = said_by_request | {
        "add_capabilities": tuple(sorted(added)),
        "drop_capabilities": tuple(name for name in dropped if name not in added),
    }
    return msgspec.structs.replace(template, **changes)
