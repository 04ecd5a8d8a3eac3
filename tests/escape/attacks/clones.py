"""Attacks over what clones of one warmed interpreter share, and over what one sandbox leaves for the next."""

from __future__ import annotations

import builtins
import ctypes
import os
import random
import sys

from tests.escape.arena import LIMITS, WARM, Arena, finish, line_of
from tests.escape.attack import shipped, staged
from tests.escape.kit import ESCAPED, WORLD, content, outcome, told

from tartarus.model.sandbox import ExecSpec, Isolation, Mount, ResourceRequest

_MARK = "tartarus-mark-of-another-tenant"


def _random_numbers() -> None:
    import json
    import secrets
    import ssl
    import tempfile
    import uuid
    from multiprocessing import process

    drawn = {
        "random": random.random(),
        "random bits": random.getrandbits(64),
        "urandom": os.urandom(8).hex(),
        "secrets": secrets.token_hex(8),
        "uuid4": str(uuid.uuid4()),
        "uuid1": str(uuid.uuid1()),
        "OpenSSL": ssl.RAND_bytes(8).hex(),
        "temporary name": tempfile.mktemp(),
        "temporary name, again": next(tempfile._get_candidate_names()),  # type: ignore[attr-defined]
        "multiprocessing key": bytes(process.current_process().authkey).hex(),
    }
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        drawn["numpy, old"] = float(numpy.random.rand())
        drawn["numpy, new"] = float(numpy.random.default_rng().random())
    os.write(1, json.dumps(drawn).encode())


async def _drawn(arena: Arena, level: Isolation, template: str, *, once: bool) -> dict[str, object]:
    import json

    program = shipped(_random_numbers) + "\n_random_numbers()"
    command = ExecSpec(argv=("python3", "-c", program))
    limits = LIMITS if level is Isolation.MICROVM else ResourceRequest()
    sandbox = await arena.sandbox(level, template=template, resources=limits, command=command if once else None)
    process = sandbox.main if once else await sandbox.exec(command)
    assert process is not None
    said = await finish(process)
    await sandbox.kill()
    numbers: dict[str, object] = json.loads(said.out)
    return numbers


@staged(
    "clones/random", tries="predict the random numbers of another clone of the same warmed interpreter", container="different",
    process="different",
)  # fmt: skip
async def random_numbers(arena: Arena, level: Isolation) -> dict[str, str]:
    found = {}
    # Machines of another template would have to boot first, for the interpreter that others show to draw afresh.
    for template in ("host",) if level is Isolation.MICROVM else ("host", WARM):
        for once in (True, False):
            first = await _drawn(arena, level, template, once=once)
            second = await _drawn(arena, level, template, once=once)
            for name, value in first.items():
                way = "own command" if once else "exec"
                found[f"{name}, {template}, {way}"] = "different" if value != second[name] else ESCAPED
    return found


def _layout() -> None:
    os.write(1, f"{hash('tartarus')} {id(sys)}".encode())


@staged(
    "clones/layout", tries="learn where another clone's memory lies and how it hashes strings", container="same", process="same",
    note="All clones of one interpreter have its address layout and hash secret; who needs others starts it cold "
    "(`python3 -X utf8`), or asks for another template.",
)  # fmt: skip
async def layout(arena: Arena, level: Isolation) -> str:
    said = []
    for _ in range(2):
        sandbox = await arena.sandbox(level)
        said.append(
            (await finish(await sandbox.exec(ExecSpec(argv=("python3", "-c", shipped(_layout) + "\n_layout()"))))).out
        )
        await sandbox.kill()
    return "same" if said[0] == said[1] else "different"


def _poison() -> None:
    builtins.tartarus_mark = True  # type: ignore[attr-defined]
    builtins.print = None  # type: ignore[assignment]
    sys.modules["json"] = None  # type: ignore[assignment]
    os.environ["TARTARUS_MARK"] = "1"
    sys.path.insert(0, os.getcwd())
    # A small integer is one object for the whole interpreter: here 7 becomes 8.
    ctypes.c_int.from_address(id(7) + 24).value = 8
    os.write(1, b"done\n")
    sys.stdin.readline()


def _look_for_poison() -> str:
    signs = (
        hasattr(builtins, "tartarus_mark"),
        "TARTARUS_MARK" in os.environ,
        sys.modules.get("json", 1) is None,
        int("7") != 7,
    )
    return ESCAPED if any(signs) or eval("3 + 4") == 8 else "own pages"


@staged(
    "clones/copy-on-write", tries="change the warmed interpreter's memory under other clones, live and to come", container="own pages",
    process="own pages",
)  # fmt: skip
async def copy_on_write(arena: Arena, level: Isolation) -> dict[str, str]:
    victim = await arena.sandbox(level)
    poisoner = await arena.sandbox(level)
    process = await arena.start(poisoner, shipped(_poison) + "\n_poison()\n")
    await line_of(process)
    look = shipped(_look_for_poison) + "\nrun(_look_for_poison)\n"
    later = await arena.sandbox(level)
    found = {"live": (await arena.attack(victim, look))[""], "later": (await arena.attack(later, look))[""]}
    for sandbox in (victim, poisoner, later):
        await sandbox.kill()
    return found


def _shared_mappings() -> str:
    found = set()
    with open("/proc/self/maps") as maps:
        for line in maps:
            fields = line.split()
            if fields[1][1] == "w" and fields[1][3] == "s":
                found.add(f"{fields[3]}:{fields[4]}")
    return " ".join(sorted(found)) or "none"


@staged("clones/shared-mappings", tries="find memory that two clones can both write", container="none in common")
async def shared_mappings(arena: Arena, level: Isolation) -> str:
    said = []
    for _ in range(2):
        sandbox = await arena.sandbox(level)
        answers = await arena.attack(sandbox, shipped(_shared_mappings) + "\nrun(_shared_mappings)\n")
        said.append(set(answers[""].split()) - {"none"})
        await sandbox.kill()
    return ESCAPED if said[0] & said[1] else "none in common"


def _find_mark() -> str:
    # The world tells the mark alone; between slashes it is in no memory but that of who was asked for the paths.
    # So they are looked at one byte at a time: a pattern with them would be found itself, even after its end.
    mark = WORLD["mark"].encode()
    found = searched = 0
    with open("/proc/self/maps") as maps, open("/proc/self/mem", "rb", buffering=0) as memory:
        for line in maps:
            area, rights = line.split()[:2]
            if not rights.startswith("rw"):
                continue
            start, end = (int(part, 16) for part in area.split("-"))

            def look(start: int = start, end: int = end) -> None:
                nonlocal found, searched
                memory.seek(start)
                data = memory.read(end - start)
                at = data.find(mark, 1)
                while at >= 0:
                    searched += 1
                    found += data[at - 1] == 47 and data[at + len(mark) : at + len(mark) + 1] == b"/"
                    at = data.find(mark, at + 1)

            outcome(look)
    if not searched:
        return "blind"  # not even what the world told is there: then the search is at fault
    return ESCAPED if found else "nothing"


@staged(
    "clones/traces", tries="find in a clone's memory what the host asked of an earlier one", container="nothing",
)  # fmt: skip
async def traces(arena: Arena, level: Isolation) -> dict[str, str]:
    # The longer the earlier request, the more of it a shorter one would leave in the buffer.
    targets = [f"/work/{_MARK}/{index:03d}-{'x' * 180}" for index in range(24)]
    mounts = tuple(
        Mount(source=str(arena.bait.directory / "inner"), target=target, read_only=True) for target in targets
    )
    found = {}
    for round_ in range(3):
        earlier = await arena.sandbox(level, mounts=mounts)
        later = await arena.sandbox(level)
        found[f"round {round_}"] = (await arena.attack(later, shipped(_find_mark) + "\nrun(_find_mark)\n", mark=_MARK))[
            ""
        ]
        await earlier.kill()
        await later.kill()
    return found


def _spoil() -> str:
    prefix = "" if WORLD["level"] != "process" else WORLD["layer"]

    def spoil(path: str) -> None:
        with open(path, "w") as file:
            file.write("raise SystemExit('spoiled')\n")

    paths = (
        prefix + "/opt/tartarus/runner.py", "/etc/ld.so.preload", "/etc/passwd", "/root/.bashrc", "/usr/lib/python3/dist-packages/sitecustomize.py",
        "/etc/python3/sitecustomize.py", "/work/sitecustomize.py", "/tmp/spoiled", "/dev/shm/spoiled", "/var/tmp/spoiled", "/run/spoiled",
    )  # fmt: skip
    for path in paths:
        outcome(spoil, path)
    return "done"


def _look_for_spoil() -> dict[str, str]:
    prefix = "" if WORLD["level"] != "process" else WORLD["layer"]
    paths = (
        prefix + "/opt/tartarus/runner.py", "/etc/ld.so.preload", "/etc/passwd", "/root/.bashrc", "/work/sitecustomize.py",
        "/tmp/spoiled", "/dev/shm/spoiled", "/var/tmp/spoiled", "/run/spoiled",
    )  # fmt: skip

    def look(path: str) -> str:
        said = told(content, path, 1 << 20)[1]
        return ESCAPED if said and said.startswith(b"raise SystemExit") else "unspoiled"

    return {path: look(path) for path in paths}


@staged(
    "clones/files", tries="leave files where other sandboxes' programs, loaders and interpreters look for them", container="unspoiled",
    process="unspoiled",
)  # fmt: skip
async def files(arena: Arena, level: Isolation) -> dict[str, str]:
    sandbox = await arena.sandbox(level)
    await arena.attack(sandbox, shipped(_spoil) + "\nrun(_spoil)\n")
    other = await arena.sandbox(level)
    found = await arena.attack(other, shipped(_look_for_spoil) + "\nrun(_look_for_spoil)\n")
    for number, argv in enumerate((("python3", "-c", "print(42)"), ("python3", "-X", "utf8", "-c", "print(42)"))):
        said = await finish(await other.exec(ExecSpec(argv=argv)))
        found[f"python {number}"] = "unspoiled" if said.out == b"42\n" else ESCAPED
    await sandbox.kill()
    await other.kill()
    return found
