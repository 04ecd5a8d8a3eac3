"""The system call filter of each level: what is allowed, and what depends on arguments.

Installed last, by the guest itself, after `no_new_privs`. Everything the guest does from then on passes
it: the fork of the agent, the agent, and every program. Arguments behind pointers can't be judged (they
can change after the judgement), so calls whose danger lies there are refused whole and fall back:
clone3 to clone, openat2 to openat.
"""

from __future__ import annotations

import errno
import socket
import struct
from functools import cache
from typing import TYPE_CHECKING, Final

from tartarus.guest.syscalls import machine, table
from tartarus.model.sandbox import Isolation
from tartarus.runtimes.confine import calls
from tartarus.runtimes.confine.bpf import ALLOW, ASK, Branch, Match, Rule, assemble, refuse
from tartarus.runtimes.confine.metadata import BROKERED
from tartarus.runtimes.confine.narrowing import narrowed
from tartarus.runtimes.hardening import USUAL, Hardening

if TYPE_CHECKING:
    from tartarus.guest.program import Fd, Program, Ref

PRETEND: Final = refuse(0)
EPERM: Final = refuse(errno.EPERM)
ENOSYS: Final = refuse(errno.ENOSYS)
EINVAL: Final = refuse(errno.EINVAL)
_NO_ATTRIBUTES: Final = refuse(errno.EOPNOTSUPP)
_NO_FAMILY: Final = refuse(errno.EAFNOSUPPORT)
_NO_TYPE: Final = refuse(errno.ESOCKTNOSUPPORT)
_NO_PROTOCOL: Final = refuse(errno.EPROTONOSUPPORT)

SET_MODE_FILTER: Final = 1
_FILTER_FLAG_NEW_LISTENER = 8
_INSTALL = "install the system call filter"
NEW_NAMESPACES: Final = 0x7E02_0000
"""CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET; CLONE_NEWTIME is not a clone(2) flag."""
_CLONE_NEWUSER = 0x1000_0000
_SET_ID_BITS: Final = 0o6000
_O_CREAT, _O_TRUNC, _O_TMPFILE, _O_ACCMODE = 0o100, 0o1000, 0o20000000, 3
_MODES = ("chmod", "fchmod", "fchmodat", "fchmodat2", "mkdir", "mkdirat", "creat")
_ATTRIBUTES = ("setxattr", "lsetxattr", "fsetxattr", "removexattr", "lremovexattr", "fremovexattr")
_S_IFMT, _S_IFIFO, _S_IFREG, _S_IFSOCK = 0o170000, 0o010000, 0o100000, 0o140000
_TIOCSTI, _TIOCLINUX, _TIOCCONS, _TIOCSETD = 0x5412, 0x541C, 0x541D, 0x5423
_PR_SET_MM, _PR_SCHED_CORE = 35, 62
_RLIMIT_CORE = 4
_HARMLESS_PERSONALITIES = (0, 0x8, 0x20000, 0x20008, 0xFFFF_FFFF)  # none, LINUX32, UNAME26, both, "tell me"
_UNIX, _INET, _INET6, _NETLINK = 1, 2, 10, 16
_STREAM, _DGRAM, _RAW, _SEQPACKET, _TYPE_MASK = 1, 2, 3, 5, 0xF
_SOL_SOCKET, _SOL_TCP, _TCP_ULP = 1, 6, 31
_ATTACH_FILTERS = (26, 50, 51, 52)  # SO_ATTACH_FILTER, SO_ATTACH_BPF, SO_ATTACH_REUSEPORT_CBPF and _EBPF


_BOXING: Final = (
    "clone", "unshare", "mount", "umount2", "move_mount", "mount_setattr", "pivot_root", "sethostname", "prctl",
    "prlimit64", "seccomp", "landlock_create_ruleset", "landlock_add_rule", "landlock_restrict_self",
)  # fmt: skip
"""What a box program calls and no guest may (layout.box_program)."""


def _unless(arg: int, values: tuple[int, ...], verdict: Rule, *, mask: int = 0xFFFF_FFFF, other: Rule = ALLOW) -> Rule:
    """`verdict` for these values of an argument, `other` for the rest."""
    return Branch(Match(arg, values, mask), verdict, other)


def _only(arg: int, values: tuple[int, ...], verdict: Rule, *, mask: int = 0xFFFF_FFFF, then: Rule = ALLOW) -> Rule:
    """`then` for these values of an argument, `verdict` for the rest."""
    return Branch(Match(arg, values, mask), then, verdict)


def _null(arg: int, then: Rule, otherwise: Rule) -> Rule:
    return Branch(Match(arg, (0,), wide=True), then, otherwise)


def _no_set_id(mode_arg: int) -> Rule:
    """Set-user-id and set-group-id files would be trouble for whoever meets them outside the sandbox."""
    return _only(mode_arg, (0,), EPERM, mask=_SET_ID_BITS)


def _open(flags_arg: int, *, truncation_is_mediated: bool) -> Rule:
    # Without O_CREAT or O_TMPFILE the mode is not an argument: the register holds anything.
    rule = _only(flags_arg, (0,), _no_set_id(flags_arg + 1), mask=_O_CREAT | _O_TMPFILE)
    if truncation_is_mediated:
        return rule
    # Landlock before ABI 3 lets a file that may only be read be cut by opening it so; 3 is the odd access
    # mode that asks for neither reading nor writing.
    return _unless(flags_arg, (_O_TRUNC, _O_TRUNC | 3), EPERM, mask=_O_TRUNC | _O_ACCMODE, other=rule)


def _open_mediated(flags_arg: int, *, truncation_is_mediated: bool) -> Rule:
    """As `_open`, where Landlock stands alone: it lets every file be opened to neither read nor write."""
    rule = _open(flags_arg, truncation_is_mediated=truncation_is_mediated)
    return _unless(flags_arg, (_O_ACCMODE,), EINVAL, mask=_O_ACCMODE, other=rule)


def _mknod(mode_arg: int) -> Rule:
    return _only(mode_arg, (0, _S_IFREG, _S_IFIFO, _S_IFSOCK), EPERM, mask=_S_IFMT, then=_no_set_id(mode_arg))


def _everywhere(*, truncation_is_mediated: bool = True) -> dict[str, Rule]:
    """The rules on arguments that every level shares."""
    rules: dict[str, Rule] = {
        "clone": _only(0, (0,), EPERM, mask=NEW_NAMESPACES),
        "ioctl": _unless(1, (_TIOCSTI, _TIOCLINUX, _TIOCCONS, _TIOCSETD), EPERM),
        "prctl": _unless(0, (_PR_SET_MM, _PR_SCHED_CORE), EINVAL),
        "personality": _only(0, _HARMLESS_PERSONALITIES, EPERM),
        # The limit of 1 that rlimits.py sets is what keeps the host's core dump helper (root, outside) from
        # being started; 0 would start it. Programs that ask for 0 want no core dump, and get none.
        "setrlimit": _unless(0, (_RLIMIT_CORE,), PRETEND),
        "prlimit64": _unless(1, (_RLIMIT_CORE,), _null(2, ALLOW, PRETEND)),
        "open": _open(1, truncation_is_mediated=truncation_is_mediated),
        "openat": _open(2, truncation_is_mediated=truncation_is_mediated),
        "creat": _no_set_id(1),
        "chmod": _no_set_id(1),
        "fchmod": _no_set_id(1),
        "fchmodat": _no_set_id(2),
        "fchmodat2": _no_set_id(2),
        "mkdir": _no_set_id(1),
        "mkdirat": _no_set_id(2),
        "mknod": _mknod(1),
        "mknodat": _mknod(2),
    }
    return rules


def _container() -> dict[str, Rule]:
    """The container level has namespaces of its own: ordinary sockets and System V IPC are safe to name things in."""
    internet = _only(
        1, (_STREAM,), _only(
            1, (_DGRAM,), _unless(1, (_RAW,), EPERM, mask=_TYPE_MASK, other=_NO_TYPE), mask=_TYPE_MASK,
            then=_only(2, (0, 17, 1, 58), _NO_PROTOCOL),  # UDP, and unprivileged ICMP and ICMPv6 echo
        ), mask=_TYPE_MASK,
        then=_only(2, (0, 6), _NO_PROTOCOL),
    )  # fmt: skip
    unix = _only(1, (_STREAM, _DGRAM, _SEQPACKET), _NO_TYPE, mask=_TYPE_MASK)
    route = _only(2, (0,), _NO_PROTOCOL)
    options = _unless(
        1, (_SOL_SOCKET,), _unless(2, _ATTACH_FILTERS, EPERM),
        # Kernel TLS and its kin: optional everywhere, and a long list of kernel bugs.
        other=_unless(1, (_SOL_TCP,), _unless(2, (_TCP_ULP,), refuse(errno.ENOPROTOOPT))),
    )  # fmt: skip
    families = _unless(0, (_NETLINK,), route, other=_NO_FAMILY)
    return {
        **_everywhere(),
        **dict.fromkeys(calls.NAMING_SOCKETS | calls.SYSTEM_V | calls.METADATA, ALLOW),
        "socket": _unless(0, (_INET, _INET6), internet, other=_unless(0, (_UNIX,), unix, other=families)),
        "socketpair": _only(0, (_UNIX,), _NO_FAMILY),
        "setsockopt": options,
    }


def _process(*, own_uid: bool, brokered: bool, landlock_abi: int) -> dict[str, Rule]:
    """The process level shares the host's namespaces, and perhaps a user id: nothing may be reached by name.

    Landlock mediates files but not sockets with path names, nor metadata; and limits, priorities and
    CPU sets of the same user's processes elsewhere can be changed without any file.
    """
    on_self = _only(0, (0,), EPERM)
    rules = {
        **_everywhere(truncation_is_mediated=landlock_abi >= 3),
        **dict.fromkeys(calls.NAMING_SOCKETS, EPERM),
        **dict.fromkeys(calls.METADATA, ALLOW),
        "open": _open_mediated(1, truncation_is_mediated=landlock_abi >= 3),
        "openat": _open_mediated(2, truncation_is_mediated=landlock_abi >= 3),
        "socket": _NO_FAMILY,
        # A datagram pair could still send to any path with sendmsg, whose address can't be judged here.
        "socketpair": _only(0, (_UNIX,), _NO_FAMILY, then=_only(1, (_STREAM, _SEQPACKET), _NO_TYPE, mask=_TYPE_MASK)),
        "sendto": _null(4, ALLOW, EPERM),
        "setsockopt": _unless(1, (_SOL_SOCKET,), _unless(2, _ATTACH_FILTERS, EPERM)),
        "prlimit64": _only(0, (0,), EPERM, then=_everywhere()["prlimit64"]),
        "sched_setaffinity": on_self,
        "sched_setscheduler": on_self,
        "sched_setparam": on_self,
        "sched_setattr": on_self,
        "setpriority": _only(0, (0,), EPERM, then=_only(1, (0,), EPERM)),
        "ioprio_set": _only(0, (1,), EPERM, then=_only(1, (0,), EPERM)),
    }
    if landlock_abi < 3:
        rules["truncate"] = EPERM
    if own_uid:
        # As on a file system without them: else one could be hung on every file that all users may write.
        rules |= dict.fromkeys(_ATTRIBUTES, _NO_ATTRIBUTES)
    else:
        # Landlock would allow these for every file of the user, and through descriptors that may only read it.
        rules |= {name: _asking(ALLOW, rules[name]) if brokered else EPERM for name in BROKERED}
    return rules


def _asking(instead_of: Rule, rule: Rule) -> Rule:
    """The rule, with whoever holds the listener asked instead of that verdict."""
    if isinstance(rule, Branch):
        return Branch(rule.test, _asking(instead_of, rule.then), _asking(instead_of, rule.otherwise))
    return ASK if rule == instead_of else rule


def _build() -> dict[str, Rule]:
    """A build step unpacks packages, whose programs may carry set-id bits; no mount of ours ever honours them."""
    return {**_container(), **dict.fromkeys(_MODES, ALLOW), "mknod": _typed_node(1), "mknodat": _typed_node(2)}


def _typed_node(mode_arg: int) -> Rule:
    return _only(mode_arg, (0, _S_IFREG, _S_IFIFO, _S_IFSOCK), EPERM, mask=_S_IFMT)


def rules_by_name(
    level: Isolation, *, own_uid: bool = False, brokered: bool = False, landlock_abi: int = 0, build: bool = False
) -> dict[str, Rule]:
    """Every named call's rule at a level; a call that is not here gets ENOSYS. See `seccomp_filter`."""
    if level is Isolation.CONTAINER:
        special = _build() if build else _container()
        if brokered:
            told: dict[str, Rule] = {**dict.fromkeys(calls.ESCAPES, EPERM), "clone": special["clone"]}
            special |= {name: _asking(EPERM, rule) for name, rule in told.items()}
    elif level is Isolation.PROCESS:
        special = _process(own_uid=own_uid, brokered=brokered, landlock_abi=landlock_abi)
    else:
        raise ValueError(f"no system call filter for level {level.value}")
    return {**dict.fromkeys(calls.COMMON, ALLOW), **dict.fromkeys(calls.DENIED, EPERM), **special}


@cache
def seccomp_filter(
    level: Isolation,
    *,
    arch: str | None = None,
    own_uid: bool = False,
    brokered: bool = False,
    landlock_abi: int = 0,
    build: bool = False,
    hardening: Hardening = USUAL,
) -> bytes:
    """The filter as an array of struct sock_filter.

    The process level's options: `own_uid`: the sandbox's user id owns nothing outside it. `brokered`: if it does,
    changes of metadata by path are handed to a MetadataBroker, not refused. `landlock_abi`: what Landlock will
    mediate; older ones need more refusals here. The container level's: `build`, for a build step; `brokered`: what
    escapes begin with is handed to a CallWatch, which refuses it. The defaults are the careful ones. `hardening`: a
    profile that leaves less of it.
    LookupError for an architecture without a table.
    """
    named = rules_by_name(level, own_uid=own_uid, brokered=brokered, landlock_abi=landlock_abi, build=build)
    named, default = narrowed(named, hardening, ENOSYS)
    numbers = table(arch)
    rules: dict[int, Rule] = {numbers[name]: rule for name, rule in named.items() if name in numbers}
    return assemble(arch or machine(), rules, default)


@cache
def profile_filter(hardening: Hardening, arch: str | None = None) -> bytes:
    """The filter of a level that has none of its own, where the kernel is the sandbox's alone."""
    numbers = table(arch)
    named, default = narrowed(dict.fromkeys(numbers, ALLOW), hardening, ENOSYS)
    return assemble(arch or machine(), {numbers[name]: rule for name, rule in named.items()}, default)


def add_seccomp(
    program: Program,
    level: Isolation,
    *,
    own_uid: bool = False,
    landlock_abi: int = 0,
    broker: Fd | None = None,
    build: bool = False,
    hardening: Hardening = USUAL,
) -> None:
    """Install the filter: the program's last step. Needs `no_new_privs`, which `add_capability_drop` sets.

    `broker`: a passed end of a socket pair; the filter's listener is sent through it to its Listener, and
    neither is left open in the guest, where a listener could answer for the broker.
    """
    brokered = broker is not None and not own_uid
    code = seccomp_filter(
        level, own_uid=own_uid, brokered=brokered, landlock_abi=landlock_abi, build=build, hardening=hardening
    )
    if not brokered:
        add_filter(program, code)
        return
    assert broker is not None
    hand_over(program, code, broker)


def hand_over(program: Program, code: bytes, link: Fd, *, flags: int = 0) -> None:
    """Install a filter that asks, and send its listener through `link`, which is closed."""
    filter_ = _place(program, code)
    # A struct cmsghdr and the descriptor that it carries, which the next call fills in.
    control = program.blob(struct.pack("<Qiii4x", 20, socket.SOL_SOCKET, socket.SCM_RIGHTS, -1))
    listener = program.slot_at(control, 16)
    flags |= _FILTER_FLAG_NEW_LISTENER
    program.syscall("seccomp", SET_MODE_FILTER, flags, filter_, store=listener, step=_INSTALL)
    _send(program, link, control)
    program.syscall("close", listener, step="close the filter's listener")
    program.syscall("close", link, step="close the way to who answers")


def add_zygote_seccomp(program: Program) -> None:
    """The filter of a container-level warm interpreter: a guest's, and what its clones do to box themselves.

    A template's packages and warm-up are foreign code too, and run here beside the powers that boxing takes.
    Needs `no_new_privs`.
    """
    program.syscall("seccomp", SET_MODE_FILTER, 0, _place(program, zygote_filter()), step=_INSTALL)


@cache
def zygote_filter(arch: str | None = None) -> bytes:
    """As `seccomp_filter`, for `add_zygote_seccomp`."""
    boxing = {**dict.fromkeys(_BOXING, ALLOW), "setns": _only(1, (_CLONE_NEWUSER,), EPERM)}
    named = {**rules_by_name(Isolation.CONTAINER), **boxing}
    numbers = table(arch)
    rules: dict[int, Rule] = {numbers[name]: rule for name, rule in named.items() if name in numbers}
    return assemble(arch or machine(), rules, ENOSYS)


@cache
def set_id_filter(arch: str | None = None) -> bytes:
    """Refuses to make set-id files, and allows all else: for a runtime that has a filter of its own, such as runsc.

    What its guest's kernel lets its root do to modes, it does for it on the host, also in directories that are mounted.
    """
    everywhere = _everywhere()
    named = {name: everywhere[name] for name in (*_MODES, "open", "openat", "mknod", "mknodat")} | {"openat2": ENOSYS}
    numbers = table(arch)
    rules: dict[int, Rule] = {numbers[name]: rule for name, rule in named.items() if name in numbers}
    # Its guests' 32-bit entries meet its own filter; killed by this one, they would start the host's core dump helper.
    return assemble(arch or machine(), rules, ALLOW, foreign=ALLOW)


def add_filter(program: Program, code: bytes) -> None:
    """Install any filter, as `assemble` gives it, over those already there. Needs `no_new_privs`."""
    program.syscall("seccomp", SET_MODE_FILTER, 0, _place(program, code), step=_INSTALL)


def _place(program: Program, code: bytes) -> Ref:
    """A struct sock_fprog and its instructions."""
    instructions = program.blob(code)
    filter_ = program.blob(struct.pack("<HxxxxxxQ", len(code) // 8, 0))
    program.reloc(instructions, into=filter_, at=8)
    return filter_


def _send(program: Program, through: Fd, control: Ref) -> None:
    """Send a control message, with one byte of anything: descriptors travel only with data."""
    vector = program.blob(struct.pack("<QQ", 0, 1))
    program.reloc(control, into=vector, at=0)
    message = program.blob(struct.pack("<QI4xQQQQi4x", 0, 0, 0, 1, 0, control.size, 0))
    program.reloc(vector, into=message, at=16)
    program.reloc(control, into=message, at=32)
    program.syscall("sendmsg", through, message, 0, step="hand over the filter's listener")
