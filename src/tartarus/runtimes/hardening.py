"""What a level can do of a SecurityConfig, and what it then is told: `Hardening`, the config with nothing left open.

Nothing is ignored: a field that a level can't honour is refused there, with why, and with what would do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Final

import msgspec

from tartarus.model.errors import Unsupported
from tartarus.model.sandbox import Isolation
from tartarus.model.security import CAPABILITIES, IdMapping, Lockdown, SeccompAction, SecurityConfig
from tartarus.model.template import RunAs
from tartarus.runtimes.idmap import IdMap

_NAMESPACED: Final = (Isolation.CONTAINER, Isolation.GVISOR, Isolation.WASM)
_FILTERED: Final = (Isolation.CONTAINER, Isolation.PROCESS)
ADDABLE: Final = frozenset(
    {"CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "NET_BIND_SERVICE"}
)
"""Power over a sandbox's own files, users and processes. What others reach (networks, mounts, tracing, other users'
files) belongs to namespaces that no sandbox owns, or is refused by every filter."""
_ESCALATING: Final = frozenset({"SYS_ADMIN", "SYS_PTRACE", "SYS_MODULE", "SYS_RAWIO", "BPF", "PERFMON"})
"""With one of these a machine's root takes the others back from the agent, which has them."""
_OWN_KERNEL = "use --isolation microvm"
Refusal = tuple[str, str, str]


class Hardening(msgspec.Struct, frozen=True):
    """What a runtime does for one sandbox besides its usual. It tells snapshots apart.

    `calls`: the system calls that a profile allows (None: all that the level does); `default`: what becomes of others.
    `added` and `dropped`: capabilities as bit masks. `ids`: how many user and group ids there are (0: the level's).
    """

    calls: tuple[str, ...] | None = None
    default: SeccompAction = SeccompAction.ERRNO
    added: int = 0
    dropped: int = 0
    ids: int = 0
    hardened_kernel: bool = False
    lockdown: Lockdown = Lockdown.NONE

    @property
    def digest(self) -> str:
        """Tells two apart; empty for the usual."""
        return "" if self == USUAL else hashlib.sha256(msgspec.json.encode(self)).hexdigest()[:16]

    @property
    def filters(self) -> bool:
        """Whether the system call filter is another than the level's."""
        return self.calls is not None or self.default is not SeccompAction.ERRNO


USUAL: Final = Hardening()


def refused(config: SecurityConfig, level: Isolation, id_map: IdMap, user: RunAs) -> Iterator[Refusal]:
    """Each thing that the level can't honour for a sandbox of this user: what, why, and what to do."""
    yield from _kernel(config, level)
    yield from _filter(config, level)
    yield from _capabilities(config, level, user)
    yield from _identity(config, level, id_map, user)


def require(config: SecurityConfig, level: Isolation, id_map: IdMap, user: RunAs) -> None:
    """Raise Unsupported for the first thing that the level can't honour."""
    for what, why, fix in refused(config, level, id_map, user):
        raise Unsupported(f"the {level.value} level can't honour {what}", why=why, fix=fix)


def hardening(config: SecurityConfig | None, calls: tuple[str, ...] | None, level: Isolation) -> Hardening:
    """What the runtime is told. `calls`: those of the profile that is named, which `require` let pass."""
    if config is None:
        return USUAL
    return Hardening(
        calls=calls,
        default=config.seccomp_default or SeccompAction.ERRNO,
        added=_mask(config.added),
        # Elsewhere there are none but those that are added.
        dropped=_mask(config.dropped) if level is Isolation.MICROVM else 0,
        ids=config.uid_mapping[0].size if config.uid_mapping else 0,
        hardened_kernel=bool(config.hardened_kernel),
        lockdown=config.kernel_lockdown or Lockdown.NONE,
    )


def _mask(names: frozenset[str]) -> int:
    return sum(1 << CAPABILITIES.index(name) for name in names)


def _kernel(config: SecurityConfig, level: Isolation) -> Iterator[Refusal]:
    if level is Isolation.MICROVM:
        return
    why = (
        "its kernel is gVisor's, which has neither a command line nor a lockdown"
        if level is Isolation.GVISOR
        else "its kernel is the host's; tartarus doctor --security shows how that is hardened"
    )
    if config.hardened_kernel:
        yield "hardened_kernel", why, _OWN_KERNEL
    if config.kernel_lockdown not in {None, Lockdown.NONE}:
        yield "kernel_lockdown", why, _OWN_KERNEL


def _filter(config: SecurityConfig, level: Isolation) -> Iterator[Refusal]:
    if level is Isolation.WASM and config.seccomp_profile:
        yield ("seccomp_profile", "a module makes no system calls, and its engine's are always the same",
               "leave it out")  # fmt: skip
    no_filter = level not in _FILTERED and not config.seccomp_profile
    if no_filter and config.seccomp_default not in {None, SeccompAction.ERRNO}:
        yield ("seccomp_default alone", "there is no list of calls here that others would differ from",
               "name a seccomp_profile, too" if level is not Isolation.WASM else "leave it out")  # fmt: skip

    if level is Isolation.GVISOR and config.seccomp_default is SeccompAction.KILL:
        yield ("seccomp_default: kill", "its kernel would end the one thread that made the call, and leave the others",
               "use trap, which ends programs that don't expect it")  # fmt: skip


def _capabilities(config: SecurityConfig, level: Isolation, user: RunAs) -> Iterator[Refusal]:
    added = ", ".join(sorted(config.added))
    if added and level is Isolation.PROCESS:
        yield f"add_capabilities: {added}", "they would hold over the host's own files", "use --isolation container"
    elif added and level is Isolation.WASM:
        yield f"add_capabilities: {added}", "a module can't use any", "leave them out"
    elif beyond := sorted(config.added - ADDABLE):
        yield (f"add_capabilities: {', '.join(beyond)}",
               "such power is over what belongs to no sandbox, or is refused by the filter",
               f"of capabilities there are: {', '.join(sorted(ADDABLE))}")  # fmt: skip
    if level is Isolation.MICROVM and not user.uid and config.dropped and (left := _ESCALATING - config.dropped):
        yield (f"drop_capabilities without {', '.join(sorted(left))}",
               "a machine's root takes back what it lacks with one of these", "drop them, too, or ALL")  # fmt: skip


def _identity(config: SecurityConfig, level: Isolation, id_map: IdMap, user: RunAs) -> Iterator[Refusal]:
    if config.user_namespace and level not in _NAMESPACED:
        why = (
            "a machine's root is root of a kernel of its own, and nobody on the host"
            if level is Isolation.MICROVM
            else "its processes are in the host's namespaces"
        )
        yield "user_namespace: true", why, "leave it out" if level is Isolation.MICROVM else "use --isolation container"
    if config.user_namespace is False and level in _NAMESPACED:
        yield "user_namespace: false", "it is what makes its root nobody on the host", "leave it out"
    mappings = (config.uid_mapping, config.gid_mapping)
    if any(mappings) and level not in _NAMESPACED:
        yield "uid_mapping and gid_mapping", "it has no user namespace", "use --isolation container"
    elif any(mappings):
        yield from _mapping(mappings, id_map, user)


def _mapping(mappings: tuple[tuple[IdMapping, ...], ...], id_map: IdMap, user: RunAs) -> Iterator[Refusal]:
    """A mapping may narrow the level's own: which ids of the host a sandbox has is the host's to say."""
    fix = f"use one range for both: container_id 0, size 1 to {id_map.span}, and no host_id"
    users, groups = mappings
    if users != groups or len(users) != 1 or users[0].container_id != 0:
        yield "uid_mapping and gid_mapping", "both are one range here, from 0 up", fix
        return
    wanted = users[0]
    if wanted.host_id not in {None, id_map.base if id_map.privileged else None} or wanted.size > id_map.span:
        yield "the host's ids of uid_mapping", f"this host gives {id_map.span} from {id_map.base} up", fix
    most = max(user.uid, user.gid, *user.groups)
    if wanted.size <= most:
        yield "uid_mapping", f"the template's user needs the id {most}", f"give a size of {most + 1} or more"
