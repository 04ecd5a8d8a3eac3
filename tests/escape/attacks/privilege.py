"""Attacks for privilege: capabilities, set-id programs, users, keys, and the walls that a process builds for itself."""

from __future__ import annotations

import ctypes
import os
import stat
import struct

from tests.escape.attack import inside
from tests.escape.kit import ESCAPED, WORLD, asked, call, content, in_child, opened, outcome

_AT_FDCWD = -100
_SET_ID = stat.S_ISUID | stat.S_ISGID


@inside(
    "privilege/has-none",
    tries="use any of its own: capabilities in every set, and no_new_privs",
    container="none",
    process="none",
)
def has_none() -> dict[str, str]:
    header, sets = struct.pack("<Ii", 0x20080522, 0), ctypes.create_string_buffer(24)
    call("capget", header, sets)
    found = {"effective, permitted, inheritable": ESCAPED if any(sets.raw) else "none"}
    held = [number for number in range(41) if call("prctl", 47, 1, number, 0, 0)]
    found["ambient"] = ESCAPED if held else "none"
    if os.getuid() == 0 or WORLD["level"] == "container":
        bounding = [number for number in range(41) if outcome(call, "prctl", 23, number, 0, 0, 0) == ESCAPED
                    and call("prctl", 23, number, 0, 0, 0)]  # fmt: skip
        found["bounding"] = ESCAPED if bounding else "none"
    found["new privileges"] = "none" if call("prctl", 39, 0, 0, 0, 0) == 1 else ESCAPED
    return found


@inside("privilege/take-capabilities", tries="give itself capabilities", container="EPERM", process="EPERM")
def take_capabilities() -> dict[str, str]:
    header = struct.pack("<Ii", 0x20080522, 0)
    found = {}
    for name, number in (
        ("chown", 0),
        ("setuid", 7),
        ("net_admin", 12),
        ("sys_ptrace", 19),
        ("sys_admin", 21),
        ("bpf", 39),
    ):
        sets = struct.pack(
            "<IIIIII", *(1 << number if number < 32 else 0,) * 3, *(1 << number - 32 if number > 31 else 0,) * 3
        )
        found[name] = asked("capset", header, sets)
        found[f"{name}, ambient"] = asked("prctl", 47, 2, number, 0, 0)
    return found


@inside(
    "privilege/locks", tries="open the locks: secure bits, bounding set, no_new_privs, keep capabilities",
    container="EPERM|EINVAL", process="EPERM|EINVAL|kept",
)  # fmt: skip
def locks() -> dict[str, str]:
    def keep() -> str:
        answer = asked("prctl", 8, 1, 0, 0, 0)
        # Without root there was no privilege to lock this bit with, and there is nothing to keep.
        return (
            "kept"
            if answer == ESCAPED and WORLD["level"] == "process" and os.getuid() == WORLD["daemon_uid"] != 0
            else answer
        )

    return {
        "secure bits": asked("prctl", 28, 0, 0, 0, 0),
        "bounding set": asked("prctl", 24, 21, 0, 0, 0),
        "new privileges": asked("prctl", 38, 0, 0, 0, 0),
        "keep capabilities": keep(),
        "flush io": asked("prctl", 57, 1, 0, 0, 0),
        "memory map": asked("prctl", 35, 1, 0, 0, 0),
        "core scheduling": asked("prctl", 62, 1, 0, 0, 0),
        "core scheduling, upper half": asked("prctl", 62 | 1 << 32, 1, 0, 0, 0),
    }


@inside(
    "privilege/become-others",
    tries="become other users and join other groups",
    container="EPERM|EINVAL",
    process="EPERM|EINVAL",
)
def become_others() -> dict[str, str]:
    found = {}
    for number in (0, 1, 1000, 65534, 0x70000000):
        if number != os.getuid():
            found[f"user {number}"] = asked("setresuid", number, number, number)
            found[f"user by setuid {number}"] = asked("setuid", number)
            found[f"real and effective {number}"] = asked("setreuid", number, number)
        if number != os.getgid():
            found[f"group {number}"] = asked("setresgid", number, number, number)
    found["groups"] = asked("setgroups", 1, struct.pack("<I", 0))
    found["no groups"] = asked("setgroups", 0, None)
    return found


@inside(
    "privilege/file-system-user",
    tries="act on files as another user (setfsuid)",
    container="unchanged",
    process="unchanged|EPERM",
)
def file_system_user() -> dict[str, str]:
    found = {}
    for name, own in (("setfsuid", os.getuid()), ("setfsgid", os.getgid())):
        # They have no way to fail: what they return is the one before.
        answer = outcome(call, name, own + 1, succeeded="unchanged")
        found[name] = ESCAPED if answer == "unchanged" and call(name, own) != own else answer
    return found


@inside(
    "privilege/groups", tries="use groups that the daemon is in", container="none|EACCES|ENOENT", process="none|EACCES",
    note="Without root the kernel lets nobody drop his groups; then they are his own.",
)  # fmt: skip
def groups() -> dict[str, str]:
    daemons = [group for group in os.getgroups() if group != os.getgid()] if WORLD["daemon_uid"] == 0 else []
    return {"list": ESCAPED if daemons else "none", "file of a group": opened(WORLD["bait"] + "/group")}


@inside(
    "privilege/set-id-files", tries="make files that run as their owner, by every call that sets a mode", container="EPERM|ENOSYS",
    process="EPERM|ENOSYS|pretended",
    note="Where the sandbox's user owns files outside, changes of mode by path only appear to work.",
)  # fmt: skip
def set_id_files() -> dict[str, str]:
    with open("plain", "wb") as file:
        file.write(content(os.path.realpath("/bin/true"), 1 << 20))
        descriptor = os.dup(file.fileno())
    os.mkdir("directory")
    modes = (0o4755, 0o2755, 0o6777, 0o100000 | 0o4755, 0o4755 | 1 << 20)
    found = {}
    for mode in modes:
        found[f"chmod {mode:o}"] = asked("chmod", "plain", mode) if "chmod" in WORLD["numbers"] else "EPERM"
        found[f"fchmod {mode:o}"] = asked("fchmod", descriptor, mode)
        found[f"fchmodat {mode:o}"] = asked("fchmodat", _AT_FDCWD, "plain", mode)
        found[f"fchmodat2 {mode:o}"] = asked("fchmodat2", _AT_FDCWD, "plain", mode, 0)
        found[f"directory {mode:o}"] = asked("fchmodat", _AT_FDCWD, "directory", mode)
        found[f"open {mode:o}"] = asked("openat", _AT_FDCWD, f"opened{mode}", os.O_CREAT | os.O_WRONLY, mode)
        found[f"unnamed {mode:o}"] = asked("openat", _AT_FDCWD, ".", os.O_TMPFILE | os.O_WRONLY, mode)
        found[f"mknod {mode:o}"] = asked("mknodat", _AT_FDCWD, f"node{mode}", 0o100000 | mode, 0)
        found[f"mkdir {mode:o}"] = asked("mkdirat", _AT_FDCWD, f"made{mode}", mode)
    found["openat2"] = asked(
        "openat2", _AT_FDCWD, "opened", struct.pack("<QQQ", os.O_CREAT | os.O_WRONLY, 0o4755, 0), 24
    )
    marked = [entry.name for entry in os.scandir(".") if entry.stat(follow_symlinks=False).st_mode & _SET_ID]
    found = {
        what: "pretended" if answer == ESCAPED and "chmod" in what and not marked else answer
        for what, answer in found.items()
    }
    return found | {"what is there": ESCAPED if marked else "EPERM"}


@inside(
    "privilege/file-capabilities", tries="make files that run with capabilities", container="EPERM",
    process="EPERM|EOPNOTSUPP|pretended",
)  # fmt: skip
def file_capabilities() -> dict[str, str]:
    with open("plain", "wb") as file:
        descriptor = os.dup(file.fileno())
    second = struct.pack("<IIIII", 0x02000001, 0xFFFFFFFF, 0, 0x1FF, 0)
    third = struct.pack("<IIIIII", 0x03000001, 0xFFFFFFFF, 0, 0x1FF, 0, 0)
    found = {}
    for name, value in (("version 2", second), ("version 3, of host root", third)):
        found[name] = asked("setxattr", "plain", "security.capability", value, len(value), 0)
        found[f"{name}, by descriptor"] = asked("fsetxattr", descriptor, "security.capability", value, len(value), 0)
    marked = outcome(os.getxattr, "plain", "security.capability")
    found = {what: "pretended" if answer == ESCAPED and marked != ESCAPED else answer for what, answer in found.items()}
    return found | {"trusted attribute": asked("fsetxattr", descriptor, "trusted.overlay.opaque", b"y", 1, 0)}


@inside(
    "privilege/set-id-programs", tries="run the host's set-user-id programs", container="own user", process="own user",
    note="The loader prints the user ids it runs with, unless the program really changes user.",
)  # fmt: skip
def set_id_programs() -> dict[str, str]:
    def look(path: str) -> str:
        reader, writer = os.pipe()
        if os.fork() == 0:
            os.dup2(writer, 1)
            os.dup2(writer, 2)
            os.execve(path, [path, "--version"], {"LD_SHOW_AUXV": "1"})
        os.close(writer)
        said = b""
        while piece := os.read(reader, 65536):
            said += piece
        os.wait()
        values = dict(line.split(b":", 1) for line in said.splitlines() if line.startswith(b"AT_"))
        effective = values.get(b"AT_EUID", b"-1").strip()
        return (
            "own user" if effective == str(os.getuid()).encode() and values[b"AT_SECURE"].strip() == b"0" else ESCAPED
        )

    marked = [entry.path for entry in os.scandir("/usr/bin") if entry.is_file() and entry.stat().st_mode & _SET_ID]
    readable = [path for path in sorted(marked) if os.access(path, os.R_OK | os.X_OK)]
    return {path: look(path) for path in readable[:6]} | {"a plain program": look(os.path.realpath("/usr/bin/true"))}


@inside("privilege/keyrings", tries="search, add, read, link and change keys", container="ENOSYS", process="ENOSYS")
def keyrings() -> dict[str, str]:
    found = {
        "add": asked("add_key", "user", "name", b"x", 1, -3),
        "request": asked("request_key", "user", WORLD["mq"], None, -3),
    }
    for name, command, argument in (
        ("read the host's key", 11, WORLD["key"]), ("describe it", 6, WORLD["key"]), ("change it", 2, WORLD["key"]),
        ("revoke it", 3, WORLD["key"]), ("own session", 0, -3), ("user's keyring", 0, -4), ("join a session", 1, 0),
        ("the parent's session", 18, 0), ("persistent", 22, 0), ("watch", 32, -4), ("own it", 4, WORLD["key"]),
    ):  # fmt: skip
        found[name] = asked("keyctl", command, argument, 0, 0, 0)
    return found


@inside(
    "privilege/relax-filter", tries="install a filter that allows everything, or that asks a supervisor of its own",
    container="EPERM", process="EPERM|EBUSY",
    note="EBUSY: without root a supervisor of the daemon's is there already, and the kernel allows but one.",
)  # fmt: skip
def relax_filter() -> dict[str, str]:
    number = WORLD["numbers"]["unshare"]

    def install(flags: int, action: int) -> int:
        # ld number; is it unshare?; then the action, else allow
        code = b"".join(
            struct.pack("<HBBI", *line)
            for line in ((0x20, 0, 0, 0), (0x15, 0, 1, number), (6, 0, 0, action), (6, 0, 0, 0x7FFF0000))
        )
        kept = ctypes.create_string_buffer(code, len(code))
        return call("seccomp", 1, flags, struct.pack("<HxxxxxxQ", 4, ctypes.addressof(kept)))

    def attempt(flags: int, action: int) -> str:
        # A supervisor would be asked only if no other filter refused; nobody answers here, so that would hang.
        answer = outcome(install, flags, action)
        return answer if answer != ESCAPED else asked("unshare", 0x10000000)

    return {
        "allow everything": in_child(lambda: attempt(0, 0x7FFF0000)),
        "log only": in_child(lambda: attempt(0, 0x7FFC0000)),
        "ask a supervisor": in_child(lambda: attempt(8, 0x7FC00000)),
        "trace": in_child(lambda: attempt(0, 0x7FF00000)),
    }


@inside(
    "privilege/relax-landlock", tries="enter a Landlock domain of its own that allows everything", container="ENOENT",
    process="EACCES",
)  # fmt: skip
def relax_landlock() -> str:
    def attempt() -> str:
        ruleset = call("landlock_create_ruleset", struct.pack("<Q", 0x1FFF), 8, 0)
        for path in ("/", WORLD["bait"]):
            try:
                fd = os.open(path, os.O_PATH)
            except FileNotFoundError:
                continue
            call("landlock_add_rule", ruleset, 1, struct.pack("<Qi", 0x1FFF, fd), 0)
        call("landlock_restrict_self", ruleset, 0)
        return opened(WORLD["bait"] + "/readable")

    return in_child(attempt)
