"""Attacks on files outside the sandbox: the host's, the daemon's, the neighbour's."""

from __future__ import annotations

import array
import fcntl
import mmap
import os

from tests.escape.attack import inside
from tests.escape.kit import ESCAPED, WORLD, asked, call, content, in_child, opened, outcome, secret_of, told

_AT_FDCWD = -100


def _bait(name: str) -> str:
    return str(WORLD["bait"]) + "/" + name


@inside(
    "files/read-host", tries="read a file of the host that every user may read", container="ENOENT", process="EACCES"
)
def read_host() -> dict[str, str]:
    return {name: opened(_bait(name)) for name in ("readable", "writable")} | {"directory": opened(WORLD["bait"])}


@inside(
    "files/write-host", tries="write to, cut or append to a file that every user may write",
    container="ENOENT", process="EACCES",
)  # fmt: skip
def write_host() -> dict[str, str]:
    path = _bait("writable")
    return {
        "write": opened(path, os.O_WRONLY),
        "append": opened(path, os.O_WRONLY | os.O_APPEND),
        "cut by opening": opened(path, os.O_RDONLY | os.O_TRUNC),
        "cut": asked("truncate", path, 0),
        "fifo": opened(_bait("fifo"), os.O_RDWR),
    }


@inside(
    "files/neither-mode", tries="open the host's files with the access mode that asks for neither reading nor writing",
    container="ENOENT", process="EACCES|EINVAL|EPERM",
)  # fmt: skip
def neither_mode() -> dict[str, str]:
    return {name: opened(_bait(name), 3) for name in ("readable", "writable", "private")}


@inside(
    "files/change-directory", tries="make, remove, rename and link files in a directory that every user may change",
    container="ENOENT", process="EACCES|EXDEV",
    note="EXDEV is Landlock's answer to a link or rename between directories with different rights.",
)  # fmt: skip
def change_directory() -> dict[str, str]:
    with open("own", "w"):
        pass
    new = _bait("new")
    return {
        "create": opened(new, os.O_CREAT | os.O_WRONLY),
        "unnamed file": opened(WORLD["bait"], os.O_TMPFILE | os.O_WRONLY),
        "make a directory": asked("mkdirat", _AT_FDCWD, new, 0o777),
        "symlink": asked("symlinkat", "/", _AT_FDCWD, new),
        "fifo": asked("mknodat", _AT_FDCWD, new, 0o010666, 0),
        "remove": asked("unlinkat", _AT_FDCWD, _bait("readable"), 0),
        "remove a directory": asked("unlinkat", _AT_FDCWD, _bait("inner"), 0x200),
        "rename": asked("renameat2", _AT_FDCWD, _bait("readable"), _AT_FDCWD, new, 0),
        "rename into": asked("renameat2", _AT_FDCWD, "own", _AT_FDCWD, new, 0),
        "rename out of": asked("renameat2", _AT_FDCWD, _bait("readable"), _AT_FDCWD, "taken", 0),
        "exchange": asked("renameat2", _AT_FDCWD, "own", _AT_FDCWD, _bait("readable"), 2),
        "link into": asked("linkat", _AT_FDCWD, "own", _AT_FDCWD, new, 0),
    }


@inside(
    "files/metadata", tries="change owner, mode, times and attributes of the host's files",
    container="ENOENT", process="EPERM|EACCES|EOPNOTSUPP",
    note="A file that every user may write is left out: at process level its times can be set to now. See devices/touch-null.",
)  # fmt: skip
def metadata() -> dict[str, str]:
    path = _bait("readable")
    return {
        "mode": asked("fchmodat", _AT_FDCWD, path, 0o777),
        "owner": asked("fchownat", _AT_FDCWD, path, os.getuid(), os.getgid(), 0),
        "times": asked("utimensat", _AT_FDCWD, path, b"\0" * 32, 0),
        "attribute": asked("setxattr", path, "user.mark", b"x", 1, 0),
        "remove attribute": asked("removexattr", path, "security.capability"),
    }


@inside(
    "files/metadata-by-descriptor", tries="change mode, owner and times of shared files through descriptors that may only read them",
    container="EPERM|EROFS|EACCES|own", process="EPERM|EACCES|EOPNOTSUPP",
    note="A container changes its own copies of its template's files.",
)  # fmt: skip
def metadata_by_descriptor() -> dict[str, str]:
    prefix = WORLD["layer"] if WORLD["level"] == "process" else ""
    copies = WORLD["level"] != "process"
    found = {}
    for path in (prefix + "/opt/tartarus/runner.py", "/etc/passwd", os.path.realpath("/bin/sh")):
        fd = os.open(path, os.O_RDONLY)
        own = "own" if copies and not path.startswith("/usr") else ESCAPED
        found[f"mode of {path}"] = outcome(os.fchmod, fd, 0o644, succeeded=own)
        found[f"owner of {path}"] = outcome(os.fchown, fd, os.getuid(), os.getgid(), succeeded=own)
        found[f"times of {path}"] = outcome(call, "utimensat", fd, None, b"\0" * 32, 0, succeeded=own)
        found[f"attribute of {path}"] = outcome(call, "fsetxattr", fd, "user.mark", b"x", 1, 0, succeeded=own)
    return found


@inside(
    "files/attributes", tries="hang an extended attribute on a file of the host that every user may write",
    container="ENOENT", process="EPERM|EACCES|EOPNOTSUPP|EINVAL",
)  # fmt: skip
def attributes() -> dict[str, str]:
    def by_descriptor() -> None:
        fd = os.open(_bait("writable"), 3)
        call("fsetxattr", fd, "user.mark", b"x", 1, 0)

    return {
        "by path": asked("setxattr", _bait("writable"), "user.mark", b"x", 1, 0),
        "by path, no follow": asked("lsetxattr", _bait("writable"), "user.mark", b"x", 1, 0),
        "by descriptor": outcome(by_descriptor),
    }


@inside(
    "files/stat-host", tries="find out size, owner and times of the host's files",
    container="ENOENT", process="visible",
    note="Landlock does not mediate stat: at process level names that can be guessed are visible where file modes let them be.",
)  # fmt: skip
def stat_host() -> dict[str, str]:
    return {"file": outcome(os.stat, _bait("readable"), succeeded="visible")}


@inside(
    "files/list-host", tries="list directories of the host, after walking into them or by descriptor",
    container="ENOENT", process="EACCES",
)  # fmt: skip
def list_host() -> dict[str, str]:
    def walk_in() -> None:
        os.chdir(WORLD["bait"])
        os.listdir(".")

    def by_descriptor() -> None:
        directory = os.open(WORLD["bait"], os.O_PATH | os.O_DIRECTORY)
        os.listdir(f"/proc/self/fd/{directory}")

    return {
        "list": outcome(os.listdir, WORLD["bait"]),
        "walk in": outcome(walk_in),
        "by descriptor": outcome(by_descriptor),
    }


@inside(
    "files/homes", tries="see what is in the host's /root and /home", container="own", process="EACCES",
    note="A container's own /root and /home have nothing of the host's.",
)  # fmt: skip
def homes() -> dict[str, str]:
    def look(place: str) -> str:
        answer, seen = told(os.listdir, place, succeeded="own")
        theirs = [name for name in WORLD["root_names"] if name != "user" and name in (seen or [])]
        return ESCAPED if theirs else answer

    return {"/root": look("/root"), "/home": look("/home")}


@inside(
    "files/secrets", tries="read the host's password hashes, keys, tokens and histories",
    container="ENOENT|EACCES", process="EACCES|ENOENT",
)  # fmt: skip
def secrets() -> dict[str, str]:
    paths = (
        "/etc/shadow", "/etc/gshadow", "/etc/sudoers", "/etc/ssh/ssh_host_ed25519_key", "/etc/ssl/private", "/root/.ssh/id_rsa",
        "/root/.bash_history", "/root/.docker/config.json", "/etc/kubernetes/admin.conf", "/var/lib/kubelet/config.yaml",
        "/var/run/secrets/kubernetes.io/serviceaccount/token", "/proc/1/environ", "/var/log/syslog", "/var/log/auth.log",
        "/etc/docker/daemon.json", "/boot/grub/grub.cfg",
    )  # fmt: skip
    return {path: opened(path) for path in paths}


@inside("files/state-dir", tries="read the daemon's state directory and database", container="ENOENT", process="EACCES")
def state_dir() -> dict[str, str]:
    state = WORLD["state_dir"]
    names = ("", "/state.db", "/process", "/cache", "/run")
    return {name or "/": opened(state + name) for name in names}


@inside("files/neighbours", tries="read and change the neighbour's files", container="ENOENT|own", process="EACCES")
def neighbours() -> dict[str, str]:
    def read(path: str) -> str:
        own = WORLD["level"] == "container" and os.path.dirname(path) in {"/work", "/tmp", "/dev/shm"}
        answer = secret_of(path)
        return "own" if own and answer == "ENOENT" else answer

    found = {path: read(path) for path in WORLD["neighbour"]["files"]}
    return found | {"home": outcome(os.listdir, WORLD["neighbour"]["home"], succeeded="own" if found else ESCAPED)}


@inside(
    "files/dotdot", tries="climb out of the root and the working directory by ..", container="ENOENT", process="EACCES"
)
def dotdot() -> dict[str, str]:
    def by_steps() -> None:
        at = os.open(".", os.O_PATH)
        for _ in range(64):
            at = os.open("..", os.O_PATH, dir_fd=at)
        os.open(_bait("readable").lstrip("/"), os.O_RDONLY, dir_fd=at)

    def renamed_away() -> None:
        # The classic way out of a chroot: stand in a directory that is moved to elsewhere.
        os.makedirs("a/b/c")
        os.chdir("a/b/c")
        os.rename("../../../a/b", "../../../moved")
        os.open("../" * 32 + _bait("readable").lstrip("/"), os.O_RDONLY)

    return {
        "path": opened("../" * 64 + _bait("readable").lstrip("/")),
        "absolute": opened("/.." * 64 + _bait("readable")),
        "steps": outcome(by_steps),
        "moved directory": outcome(renamed_away),
    }


@inside(
    "files/symlink", tries="reach the host's files through symlinks", container="ENOENT", process="EACCES|EXDEV|EPERM"
)
def symlink() -> dict[str, str]:
    os.symlink(_bait("readable"), "file")
    os.symlink(WORLD["bait"], "directory")
    os.symlink("directory/inner/../readable", "chain")
    return {
        "read": opened("file"),
        "write": opened("file", os.O_WRONLY),
        "through a directory": opened("directory/readable"),
        "chain": opened("chain"),
        "create": opened("directory/new", os.O_CREAT | os.O_WRONLY),
        "link what it points to": asked("linkat", _AT_FDCWD, "file", _AT_FDCWD, "linked", 0x400),
    }


@inside(
    "files/hardlink", tries="link the host's files into the sandbox", container="ENOENT", process="EXDEV|EACCES|EPERM|ENOENT",
)  # fmt: skip
def hardlink() -> dict[str, str]:
    def by_descriptor(flags: int) -> None:
        fd = os.open(_bait("writable"), os.O_PATH)
        call("linkat", fd, "", _AT_FDCWD, "linked", flags)

    def by_magic_link() -> None:
        fd = os.open(_bait("writable"), os.O_PATH)
        call("linkat", _AT_FDCWD, f"/proc/self/fd/{fd}", _AT_FDCWD, "linked", 0x400)

    return {
        "readable": asked("linkat", _AT_FDCWD, _bait("readable"), _AT_FDCWD, "linked", 0),
        "writable": asked("linkat", _AT_FDCWD, _bait("writable"), _AT_FDCWD, "linked", 0),
        "empty path": outcome(by_descriptor, 0x1000),
        "magic link": outcome(by_magic_link),
    }


@inside(
    "files/path-descriptor", tries="turn a descriptor that only names a file (O_PATH) into one that reads, writes or runs it",
    container="ENOENT", process="EACCES|EBADF|EPERM",
)  # fmt: skip
def path_descriptor() -> dict[str, str]:
    def with_descriptor(name: str, attempt: str) -> None:
        fd = os.open(_bait(name), os.O_PATH)
        if attempt == "reopen":
            os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
        elif attempt == "reopen to write":
            os.open(f"/proc/self/fd/{fd}", os.O_WRONLY)
        elif attempt == "read":
            os.read(fd, 1)
        elif attempt == "cut":
            os.truncate(f"/proc/self/fd/{fd}", 0)
        elif attempt == "mode":
            os.fchmod(fd, 0o600)
        elif attempt == "map":
            mmap.mmap(fd, 16, mmap.MAP_PRIVATE, mmap.PROT_READ)
        elif attempt == "ioctl":
            fcntl.ioctl(fd, 0x541B, array.array("i", [0]))

    def execute() -> None:
        fd = os.open(_bait("program"), os.O_PATH)
        call("execveat", fd, "", None, None, 0x1000)

    attempts = ("reopen", "reopen to write", "read", "cut", "mode", "map", "ioctl")
    found = {attempt: outcome(with_descriptor, "writable", attempt) for attempt in attempts}
    return found | {"execute": outcome(execute)}


@inside(
    "files/execute-host", tries="run a program of the host that it was not given", container="ENOENT", process="EACCES"
)
def execute_host() -> dict[str, str]:
    program = _bait("program")
    return {
        "execve": in_child(lambda: outcome(os.execv, program, [program])),
        "loader": in_child(lambda: opened(program)),
    }


@inside(
    "files/process-roots", tries="reach other roots through /proc/PID/root, cwd, exe, fd and map_files",
    container="EACCES|ENOENT|EPERM", process="EACCES|ENOENT|EPERM", twin=True,
)  # fmt: skip
def process_roots() -> dict[str, str]:
    mine = {os.getpid()}
    pids = {1, WORLD["agent"], WORLD["daemon_pid"], WORLD["twin"], WORLD["neighbour"]["host_pid"]} - mine
    if WORLD["level"] == "container":
        # In here, those numbers are nobody's or the guest's own.
        pids = {1, WORLD["daemon_pid"]}
    found = {}
    for pid in pids:
        for name in ("root" + _bait("readable"), "cwd/.", "exe", "mem", "environ", "fd/0", "fd/3", "fdinfo/3"):
            found[f"{pid}/{name}"] = opened(f"/proc/{pid}/{name}")
        found[f"{pid}/map_files"] = outcome(os.listdir, f"/proc/{pid}/map_files")
    return found


@inside(
    "files/self-exe", tries="overwrite the running interpreter or guest agent through /proc/PID/exe (CVE-2019-5736)",
    container="EACCES|ETXTBSY|EROFS|ENOENT", process="EACCES|ETXTBSY|EROFS",
)  # fmt: skip
def self_exe() -> dict[str, str]:
    def through_descriptor(pid: str) -> None:
        fd = os.open(f"/proc/{pid}/exe", os.O_PATH)
        os.open(f"/proc/self/fd/{fd}", os.O_WRONLY)

    found = {}
    for pid in ("self", "1", str(WORLD["agent"]), str(os.getppid())):
        found[f"write {pid}"] = opened(f"/proc/{pid}/exe", os.O_WRONLY)
        found[f"cut {pid}"] = opened(f"/proc/{pid}/exe", os.O_RDONLY | os.O_TRUNC)
        found[f"by descriptor {pid}"] = outcome(through_descriptor, pid)
    return found


@inside(
    "files/agent-binary", tries="read or run the guest agent's memory file", container="EACCES", process="EACCES|ENOENT"
)
def agent_binary() -> dict[str, str]:
    agent = WORLD["agent"]
    return {
        "read": opened(f"/proc/{agent}/exe"),
        "run": in_child(lambda: outcome(os.execv, f"/proc/{agent}/exe", ["agent", "nursery"])),
    }


@inside(
    "files/programs", tries="change the programs and libraries that every sandbox shares",
    container="EROFS|EACCES|EPERM|ETXTBSY", process="EACCES|EPERM|ETXTBSY|EXDEV|EOPNOTSUPP",
)  # fmt: skip
def programs() -> dict[str, str]:
    shell = os.path.realpath("/bin/sh")
    return {
        "write": opened(shell, os.O_WRONLY),
        "cut": asked("truncate", shell, 0),
        "mode": asked("fchmodat", _AT_FDCWD, shell, 0o777),
        "owner": asked("fchownat", _AT_FDCWD, shell, os.getuid(), os.getgid(), 0),
        "times": asked("utimensat", _AT_FDCWD, shell, None, 0),
        "attribute": asked("setxattr", shell, "user.mark", b"x", 1, 0),
        "replace": asked("renameat2", _AT_FDCWD, shell, _AT_FDCWD, shell + ".old", 0),
        "add": opened("/usr/bin/mine", os.O_CREAT | os.O_WRONLY),
        "add a library": opened("/usr/lib/mine.so", os.O_CREAT | os.O_WRONLY),
    }


@inside(
    "files/private-mapping", tries="write through a private mapping into the page cache of a shared program (Dirty COW)",
    container="unchanged", process="unchanged",
)  # fmt: skip
def private_mapping() -> str:
    shell = os.path.realpath("/bin/sh")
    before = content(shell, 4096)
    with open(shell, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 4096, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    for _ in range(64):
        mapped[:16] = b"X" * 16
        mapped.madvise(mmap.MADV_DONTNEED)
    mapped[:16] = b"X" * 16
    return "unchanged" if content(shell, 4096) == before else ESCAPED


@inside(
    "files/memory-file", tries="write to read-only mappings of shared programs through /proc/self/mem",
    container="unchanged", process="EACCES",
)  # fmt: skip
def memory_file() -> str:
    shell = os.path.realpath("/bin/sh")
    before = content(shell, 4096)
    with open(shell, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 4096, mmap.MAP_PRIVATE, mmap.PROT_READ)

    def write() -> None:
        with open("/proc/self/maps") as maps:
            line = next(line for line in maps if line.rstrip().endswith(shell))
        with open("/proc/self/mem", "r+b", buffering=0) as memory:
            memory.seek(int(line.split("-")[0], 16))
            memory.write(b"X" * 16)

    answer = outcome(write, succeeded="unchanged")
    mapped.close()
    return answer if content(shell, 4096) == before else ESCAPED


@inside(
    "files/file-handles", tries="open files by handle, past every path", container="EPERM", process="EPERM",
)  # fmt: skip
def file_handles() -> dict[str, str]:
    handle = b"\x08\0\0\0" + b"\x01\0\0\0" + b"\x02\0\0\0" + bytes(128)
    root = os.open("/", os.O_PATH)
    home = os.open(".", os.O_RDONLY)
    return {
        "make one": asked("name_to_handle_at", _AT_FDCWD, ".", handle, b"\0" * 8, 0),
        "open the root inode": asked("open_by_handle_at", home, handle, 0),
        "from /": asked("open_by_handle_at", root, handle, 0),
        "of the working directory": asked("open_by_handle_at", _AT_FDCWD, handle, 0),
    }


@inside(
    "files/host-paths",
    tries="learn the host's paths from its own mounts and maps",
    container="invisible",
    process="EACCES",
)
def host_paths() -> dict[str, str]:
    def look(path: str) -> str:
        answer, said = told(content, path, 1 << 20, succeeded="invisible")
        return ESCAPED if said and WORLD["state_dir"].encode() in said else answer

    return {name: look(f"/proc/self/{name}") for name in ("mountinfo", "mounts", "maps", "mountstats")}


@inside(
    "files/leases", tries="take a lease on a shared program, so that others' openings wait for it",
    container="EACCES|EPERM|EAGAIN", process="EACCES|EPERM|EAGAIN",
)  # fmt: skip
def leases() -> dict[str, str]:
    def lease(kind: int) -> None:
        fd = os.open(os.path.realpath("/bin/sh"), os.O_RDONLY)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, kind)

    return {"read": outcome(lease, fcntl.F_RDLCK), "write": outcome(lease, fcntl.F_WRLCK)}


@inside(
    "files/freeze", tries="thaw, trim and flag the host's file systems", container="EPERM|ENOTTY|EROFS|EOPNOTSUPP|EACCES",
    process="EPERM|ENOTTY|EACCES|EOPNOTSUPP",
)  # fmt: skip
def freeze() -> dict[str, str]:
    def command(path: str, number: int, argument: int | bytes | array.array[int]) -> None:
        fd = os.open(path, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, number, argument)
        finally:
            os.close(fd)

    # Only commands that would do no harm if they were let through.
    found = {}
    for path in ("/usr", "."):
        found[f"thaw {path}"] = outcome(command, path, 0xC0045878, 0)
        found[f"trim {path}"] = outcome(command, path, 0xC0185879, bytes(24))
    found["immutable"] = outcome(command, ".", 0x40086602, array.array("l", [0x10]))
    return found
