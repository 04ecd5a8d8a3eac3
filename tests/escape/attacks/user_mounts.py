"""Attacks through what a user mounts into a sandbox. The process level has no mounts."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import stat
import struct
import sys
from pathlib import Path

from tests.escape.arena import TENANT, Arena, finish, line_of
from tests.escape.attack import shipped, staged
from tests.escape.kit import ESCAPED, WORLD, asked, opened, outcome

from tartarus.model.errors import TartarusError, Unsupported
from tartarus.model.forking import ForkRequest
from tartarus.model.sandbox import ExecSpec, Isolation, Mount
from tartarus.node.sandbox import Sandbox

_AT_FDCWD = -100


def _shared(arena: Arena, name: str) -> Path:
    """A directory to be mounted, beside the bait and not in it."""
    path = arena.settings.state_dir / "shared" / name
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    (path / "file").write_text("text")
    return path


async def _mounted(arena: Arena, level: Isolation, source: Path, *, read_only: bool) -> Sandbox:
    mount = Mount(source=str(source), target="/mnt/shared", read_only=read_only)
    return await arena.sandbox(level, mounts=(mount,))


def _write() -> dict[str, str]:
    place = "/mnt/shared"
    return {
        "write": opened(f"{place}/file", os.O_WRONLY),
        "cut": asked("truncate", f"{place}/file", 0),
        "create": opened(f"{place}/new", os.O_CREAT | os.O_WRONLY),
        "mode": asked("fchmodat", _AT_FDCWD, f"{place}/file", 0o777),
        "times": asked("utimensat", _AT_FDCWD, f"{place}/file", None, 0),
        "attribute": asked("setxattr", f"{place}/file", "user.mark", b"x", 1, 0),
        "remove": asked("unlinkat", _AT_FDCWD, f"{place}/file", 0),
        "rename": asked("renameat2", _AT_FDCWD, f"{place}/file", _AT_FDCWD, f"{place}/moved", 0),
        "link": asked("linkat", _AT_FDCWD, f"{place}/file", _AT_FDCWD, f"{place}/linked", 0),
        "unmount": asked("umount2", place, 2),
        "remount": asked("mount", None, place, None, 32 | 4096, None),
        "remount, new call": asked("mount_setattr", _AT_FDCWD, place, 0, struct.pack("<QQQQ", 0, 1, 0, 0), 32),
    }


@staged("user-mounts/read-only", tries="write to a directory that was mounted read-only", container="EROFS|EPERM")
async def read_only(arena: Arena, level: Isolation) -> dict[str, str]:
    source = _shared(arena, "read-only")
    before = [(path.name, path.stat()) for path in sorted(source.iterdir())]
    sandbox = await _mounted(arena, level, source, read_only=True)
    found = await arena.attack(sandbox, shipped(_write) + "\nrun(_write)\n")
    await sandbox.kill()
    same = [(path.name, path.stat()) for path in sorted(source.iterdir())] == before
    return found | {"what is there": "EROFS" if same else ESCAPED}


def _climb() -> dict[str, str]:
    place = "/mnt/shared"

    def by_descriptor() -> None:
        at = os.open(place, os.O_PATH)
        for _ in range(16):
            at = os.open("..", os.O_PATH, dir_fd=at)
        os.open(WORLD["bait"].lstrip("/") + "/readable", os.O_RDONLY, dir_fd=at)

    os.symlink(WORLD["bait"], f"{place}/out")
    return {
        "dots": opened(f"{place}/../../../.." + WORLD["bait"] + "/readable"),
        "descriptor": outcome(by_descriptor),
        "symlink": opened(f"{place}/out/readable"),
        "link": asked("linkat", _AT_FDCWD, f"{place}/out/readable", _AT_FDCWD, f"{place}/linked", 0),
    }


@staged(
    "user-mounts/climb", tries="climb from a mounted directory into what lies beside it on the host", container="ENOENT"
)
async def climb(arena: Arena, level: Isolation) -> dict[str, str]:
    sandbox = await _mounted(arena, level, _shared(arena, "climb"), read_only=False)
    found = await arena.attack(sandbox, shipped(_climb) + "\nrun(_climb)\n")
    await sandbox.kill()
    return found


def _stand_inside() -> None:
    os.makedirs("/mnt/shared/a/b/c")
    os.chdir("/mnt/shared/a/b/c")
    os.write(1, b"inside\n")
    sys.stdin.readline()
    found = [outcome(os.open, "../" * depth + "secret", os.O_RDONLY) for depth in range(1, 12)]
    os.write(1, (ESCAPED if ESCAPED in found else "ENOENT").encode() + b"\n")


@staged(
    "user-mounts/moved-away",
    tries="stand in a mounted directory while the host moves it out of the mount, then climb",
    container="ENOENT",
)
async def moved_away(arena: Arena, level: Isolation) -> str:
    source = _shared(arena, "moved")
    sandbox = await _mounted(arena, level, source, read_only=False)
    process = await arena.start(sandbox, shipped(_stand_inside) + "\n_stand_inside()\n")
    await line_of(process)
    outside = source.parent / "moved-outside"
    shutil.rmtree(outside, ignore_errors=True)
    outside.mkdir()
    for place in (outside, source.parent):
        (place / "secret").write_text("secret")
    (source / "a/b").rename(outside / "b")
    await process.write_stdin(b"\n")
    answer = (await line_of(process)).decode()
    await sandbox.kill()
    return answer


def _run_marked() -> dict[str, str]:
    import subprocess

    def said(argv: list[str]) -> str:
        return subprocess.run(argv, capture_output=True, text=True, check=False).stdout.strip()

    return {
        "set-user-id": "nothing" if said(["/mnt/shared/id", "-u"]) == str(os.getuid()) else ESCAPED,
        "capabilities": "nothing"
        if set(said(["/mnt/shared/capable", "CapEff", "/proc/self/status"]).split(":")[-1].strip()) == {"0"}
        else ESCAPED,
    }


@staged(
    "user-mounts/set-id-programs", tries="gain users and capabilities from marked programs in a mounted directory", container="nothing",
    needs=("root",),
)  # fmt: skip
async def set_id_programs(arena: Arena, level: Isolation) -> dict[str, str]:
    source = _shared(arena, "marked")
    for name, program in (("id", "/usr/bin/id"), ("capable", "/usr/bin/grep")):
        shutil.copy(program, source / name)
    os.chown(source / "id", 4242, 4242)
    (source / "id").chmod(0o6755)
    os.setxattr(source / "capable", "security.capability", struct.pack("<IIIII", 0x02000001, 0xFFFFFFFF, 0, 0x1FF, 0))
    sandbox = await _mounted(arena, level, source, read_only=False)
    found = await arena.attack(sandbox, shipped(_run_marked) + "\nrun(_run_marked)\n")
    await sandbox.kill()
    return found


def _mark() -> dict[str, str]:
    found = {}
    for mode in (0o4755, 0o2755, 0o6777):
        path = f"/mnt/shared/made{mode}"
        found[f"create {mode:o}"] = asked("openat", _AT_FDCWD, path, os.O_CREAT | os.O_WRONLY, mode)
        found[f"change {mode:o}"] = asked("fchmodat", _AT_FDCWD, "/mnt/shared/file", mode)
        found[f"make {mode:o}"] = asked("mkdirat", _AT_FDCWD, path + "d", mode)
        found[f"unnamed {mode:o}"] = asked("openat", _AT_FDCWD, "/mnt/shared", os.O_TMPFILE | os.O_WRONLY, mode)
    found["capabilities"] = asked(
        "setxattr", "/mnt/shared/file", "security.capability", struct.pack("<IIIII", 0x02000001, 1, 0, 0, 0), 20, 0
    )
    found["device"] = asked("mknodat", _AT_FDCWD, "/mnt/shared/node", 0o060666, os.makedev(8, 0))
    return found


@staged(
    "user-mounts/make-set-id", tries="leave programs that run as their owner, with capabilities, or devices, in a mounted directory",
    container="EPERM",
)  # fmt: skip
async def make_set_id(arena: Arena, level: Isolation) -> dict[str, str]:
    source = _shared(arena, "marks")
    sandbox = await _mounted(arena, level, source, read_only=False)
    found = await arena.attack(sandbox, shipped(_mark) + "\nrun(_mark)\n")
    await sandbox.kill()
    marked = [path for path in source.rglob("*") if path.lstat().st_mode & 0o6000 or os.listxattr(path)]
    if level is Isolation.GVISOR:  # its kernel says that it did what the host refused
        found = {name: "pretended" if answer == ESCAPED else answer for name, answer in found.items()}
    return found | {"what is there": ESCAPED if marked else "EPERM"}


def _use_odd_files() -> dict[str, str]:
    def knock() -> None:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect("/mnt/shared/door.sock")

    return {"socket": outcome(knock, succeeded="reached"), "fifo": opened("/mnt/shared/fifo", os.O_RDONLY, "reached")}


@staged(
    "user-mounts/sockets", tries="talk to the host's programs through sockets in a directory that is mounted read-only",
    container="reached",
    note="The kernel lets sockets and pipes be used through a read-only mount: who mounts their directory gives them away.",
)  # fmt: skip
async def sockets(arena: Arena, level: Isolation) -> dict[str, str]:
    source = _shared(arena, "sockets")
    os.mkfifo(source / "fifo")
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(str(source / "door.sock"))
        door.listen(1)
        sandbox = await _mounted(arena, level, source, read_only=True)
        found = await arena.attack(sandbox, shipped(_use_odd_files) + "\nrun(_use_odd_files)\n")
    await sandbox.kill()
    return found


def _use_devices() -> dict[str, str]:
    return {name: opened(f"/mnt/shared/{name}", os.O_RDWR) for name in ("null", "memory", "disk")}


@staged("user-mounts/devices", tries="use device files in a mounted directory", container="EACCES", needs=("root",))
async def devices(arena: Arena, level: Isolation) -> dict[str, str]:
    source = _shared(arena, "devices")
    for name, kind, device in (
        ("null", stat.S_IFCHR, os.makedev(1, 3)),
        ("memory", stat.S_IFCHR, os.makedev(1, 1)),
        ("disk", stat.S_IFBLK, os.makedev(8, 0)),
    ):
        os.mknod(source / name, kind | 0o666, device)
        (source / name).chmod(0o666)
    sandbox = await _mounted(arena, level, source, read_only=False)
    found = await arena.attack(sandbox, shipped(_use_devices) + "\nrun(_use_devices)\n")
    await sandbox.kill()
    return found


@staged(
    "user-mounts/targets", tries="have a mount cover what the sandbox's walls are made of", container="refused|harmless",
    note="What a user mounts over his own sandbox's /proc hides it from himself.",
)  # fmt: skip
async def targets(arena: Arena, level: Isolation) -> dict[str, str]:
    source = _shared(arena, "targets")
    found = {}
    for target in ("/", "/proc", "/proc/self/fd", "/dev", "/sys", "/mnt/../proc", "/opt/tartarus", "/usr"):
        try:
            sandbox = await arena.sandbox(level, mounts=(Mount(source=str(source), target=target),))
        except TartarusError:
            found[target] = "refused"
            continue
        out = b""
        with contextlib.suppress(TartarusError):  # over programs, there are none to run
            out = (
                await finish(await sandbox.exec(ExecSpec(argv=("/bin/sh", "-c", "cat /var/tmp/*/readable; echo"))))
            ).out
        found[target] = ESCAPED if arena.bait.secret.encode() in out else "harmless"
        await sandbox.kill()
    return found


@staged(
    "user-mounts/moved-in", tries="put a link to outside where another of its mounts lies, and be woken or forked", container="refused",
)  # fmt: skip
async def moved_in(arena: Arena, level: Isolation) -> dict[str, str]:
    outer = _shared(arena, "outer")
    (outer / "inner").mkdir()
    mounts = (Mount(str(outer), "/mnt/outer"), Mount(str(outer / "inner"), "/mnt/inner"))
    sandbox = await arena.sandbox(level, mounts=mounts)
    script = f"cd /mnt/outer && mv inner old && ln -s {arena.bait.directory} inner"
    assert (await finish(await sandbox.exec(ExecSpec(argv=("/bin/sh", "-c", script))))).status.code == 0
    found = {}
    for name, again in {"woken": _slept, "forked": _forked}.items():
        try:
            other = await again(arena, sandbox)
        except TartarusError as error:
            found[name] = "refused" if "symbolic link" in str(error) or isinstance(error, Unsupported) else repr(error)
            continue
        said = await finish(await other.exec(ExecSpec(argv=("/bin/sh", "-c", "cat /mnt/inner/readable"))))
        found[name] = ESCAPED if arena.bait.secret.encode() in said.out else "refused"
    await sandbox.kill()
    return found


async def _slept(arena: Arena, sandbox: Sandbox) -> Sandbox:
    await arena.node.sleeper.sleep(sandbox)
    await arena.node.sleeper.wake(sandbox)
    return sandbox


async def _forked(arena: Arena, sandbox: Sandbox) -> Sandbox:
    if sandbox.asleep:
        raise Unsupported("it sleeps on")
    (child,) = (await arena.node.fork(TENANT, sandbox.record.id, ForkRequest(count=1))).children
    if child.sandbox is None:
        assert child.error is not None
        raise child.error.to_error()
    return arena.node.live(TENANT, child.sandbox.id)


def _paths_of_host() -> str:
    with open("/proc/self/mountinfo") as table:
        return ESCAPED if WORLD["shared"] in table.read() else "invisible"


@staged(
    "user-mounts/host-path", tries="learn where a mounted directory lies on the host", container="visible",
    note="/proc/self/mountinfo says where in its file system a mount begins; the kernel has no way to hide it.",
)  # fmt: skip
async def host_path(arena: Arena, level: Isolation) -> str:
    source = _shared(arena, "where")
    sandbox = await _mounted(arena, level, source, read_only=True)
    answers = await arena.attack(sandbox, shipped(_paths_of_host) + "\nrun(_paths_of_host)\n", shared=str(source))
    await sandbox.kill()
    return "visible" if answers[""] == ESCAPED else answers[""]


@staged(
    "user-mounts/nothing-else",
    tries="find other users' mounts in a sandbox without any",
    container="none",
    process="none",
)
async def nothing_else(arena: Arena, level: Isolation) -> str:
    other = None
    if level is Isolation.CONTAINER:
        other = await _mounted(arena, level, _shared(arena, "others"), read_only=False)
    sandbox = await arena.sandbox(level, tenant=TENANT)
    said = await finish(await sandbox.exec(ExecSpec(argv=("/bin/sh", "-c", "ls /mnt/shared /.tartarus 2>&1; true"))))
    for item in (sandbox, other):
        if item is not None:
            await item.kill()
    return "none" if b"file" not in said.out.replace(b"such file", b"") else ESCAPED
