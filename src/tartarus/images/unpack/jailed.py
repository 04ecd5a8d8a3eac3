"""The host's end of a jailed child: start it, map its ids, believe nothing it says, and see it gone.

The child is a Python of its own, without site packages, that imports `inside` and locks itself in before it looks
at its job's input. It dies with the daemon, with the job's deadline, and with the task that waits for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import importlib.util
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from tartarus.images.unpack import idmap
from tartarus.images.unpack.limits import REPORT_EVERY, Limits
from tartarus.model.errors import ImageRefused, IsolationUnavailable, NoSpace, TartarusError, TemplateFailed

Report = Callable[[int], None]
Facts = dict[str, int | str]

_OURS = Path(__file__).parents[1]
# Ours without what `tartarus.images` imports, which the child does not need and would wait for.
_BOOTSTRAP = """
import sys
for name, place in (("tartarus", sys.argv[1]), ("tartarus.images", sys.argv[2])):
    package = sys.modules[name] = type(sys)(name)
    package.__path__ = [place]
sys.path += sys.argv[3:]
from tartarus.images.unpack.inside.main import main
main()
"""
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_LIBRARIES = ("isal", "zstandard")
_MOST_LINE = 64 << 10
_MOST_SAID = 500
_MOST_COMPLAINT = 4096
_FLOOD = 1 << 20


class JailPlace(msgspec.Struct, frozen=True):
    """A host directory that a job sees at `at`; see `tartarus.images.unpack.inside.jail.Place`."""

    path: str
    at: str
    write: bool = False
    link: bool = False


class _Map(msgspec.Struct, tag="map", forbid_unknown_fields=True):
    pass


class _Progress(msgspec.Struct, tag="progress", forbid_unknown_fields=True):
    bytes: int


class _Done(msgspec.Struct, tag="done", forbid_unknown_fields=True):
    facts: Facts


class _Refused(msgspec.Struct, tag="refused", forbid_unknown_fields=True):
    what: str
    why: str


class _Failed(msgspec.Struct, tag="failed", forbid_unknown_fields=True):
    number: int
    why: str


class _Unjailed(msgspec.Struct, tag="unjailed", forbid_unknown_fields=True):
    number: int
    step: str
    why: str


_Message = _Map | _Progress | _Done | _Refused | _Failed | _Unjailed
_decoder: msgspec.json.Decoder[_Message] = msgspec.json.Decoder(_Message)


async def run_jailed(
    job: str,
    what: str,
    places: Sequence[JailPlace],
    uid_base: int | None,
    limits: Limits,
    *,
    fds: dict[str, int] | None = None,
    lock: int | None = None,
    report: Report = lambda _bytes: None,
    **options: object,
) -> Facts:
    """Do `job` in a jail that holds `places`, and return what it found out.

    `what` names the object in errors ("layer sha256:…"). `fds` are passed under their names, to be read or written
    as they were opened; `lock` is only held open. `uid_base`: the host id of the sandbox's root, or None when all
    files are to be the daemon's user's. Raises ImageRefused for input that is not acceptable, NoSpace,
    IsolationUnavailable when the jail can't be built here, TemplateFailed for the rest.
    """
    told = {
        "job": job,
        "places": [msgspec.structs.asdict(place) | {"path": os.path.abspath(place.path)} for place in places],
        "limits": list(limits),
        "owners": uid_base is not None,
        **(fds or {}),
        **options,
    }
    passed = [*(fds or {}).values(), *(() if lock is None else (lock,))]
    process = await asyncio.create_subprocess_exec(
        *_command(),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={name: value for name, value in os.environ.items() if name == "LD_LIBRARY_PATH"},
        cwd="/",
        pass_fds=passed,
        start_new_session=True,
        limit=_MOST_LINE,
    )
    complaints = asyncio.ensure_future(_complaints(process))
    try:
        async with asyncio.timeout(limits.timeout_s):
            verdict = await _talk(process, told, uid_base, report, limits.bytes)
    except TimeoutError:
        raise ImageRefused(f"{what} takes too long", why=f"it was given {limits.timeout_s:g} seconds") from None
    finally:
        await _gone(process, complaints)
    return _believed(verdict, what, complaints.result())


def _command() -> list[str]:
    found = map(importlib.util.find_spec, _LIBRARIES)
    places = {str(Path(spec.origin).parents[1]) for spec in found if spec is not None and spec.origin}
    return [sys.executable, "-I", "-S", "-c", _BOOTSTRAP, str(_OURS.parent), str(_OURS), *sorted(places)]


async def _talk(
    process: asyncio.subprocess.Process, told: dict[str, Any], uid_base: int | None, report: Report, most_bytes: int
) -> _Message | None:
    """The child's last word; None when it had none, or said what it has no business to say."""
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(ConnectionError):
        process.stdin.write(json.dumps(told).encode() + b"\n")
        await process.stdin.drain()
    mapped = False
    done = 0
    while True:
        try:
            message = _decoder.decode(await process.stdout.readuntil(b"\n"))
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, msgspec.MsgspecError, ConnectionError):
            return None
        if isinstance(message, _Progress):
            # Steps that must grow to an end that was set: no more of them than fit.
            if not done + REPORT_EVERY <= message.bytes <= most_bytes:
                return None
            done = message.bytes
            report(done)
        elif not isinstance(message, _Map):
            return message
        elif mapped:
            return None
        else:
            mapped = True
            await asyncio.to_thread(idmap.apply, process.pid, uid_base)
            with contextlib.suppress(ConnectionError):
                process.stdin.write(b".")
                await process.stdin.drain()


async def _complaints(process: asyncio.subprocess.Process) -> str:
    """The beginning of what it writes to standard error. Much is read, lest it wait for us; a flood is not."""
    assert process.stderr is not None
    kept, count = b"", 0
    while count < _FLOOD and (data := await process.stderr.read(_MOST_LINE)):
        kept = (kept + data)[:_MOST_COMPLAINT]
        count += len(data)
    return kept.decode("utf-8", "replace")


async def _gone(process: asyncio.subprocess.Process, complaints: asyncio.Future[str]) -> None:
    """Kill what is left of the child's group and wait until the last of it is gone."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    waiting = asyncio.ensure_future(_reap(process, complaints))
    try:
        await asyncio.shield(waiting)
    except asyncio.CancelledError:
        # What it writes to must not be removed under it, so this is waited for, cancelled or not.
        await asyncio.wait([waiting])
        raise


async def _reap(process: asyncio.subprocess.Process, complaints: asyncio.Future[str]) -> None:
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdin is not None
    process.stdin.close()
    await asyncio.wait([complaints])
    # The jailed process is a grandchild: the ends of its pipes say that it is gone.
    for stream in (process.stdout, process.stderr):
        while await stream.read(_MOST_LINE):
            pass
    await process.wait()


def count_of(facts: Facts, name: str) -> int:
    """A number that a job found out. Raises ImageRefused where it is none: the child is not believed."""
    value = facts.get(name)
    if not isinstance(value, int) or not 0 <= value < 1 << 63:
        raise ImageRefused("a layer's facts are nonsense", why=f"its unpacker said {value!a:.80} for {name}")
    return value


def digest_of(facts: Facts, name: str) -> str:
    """A SHA-256 digest that a job found out. Raises ImageRefused where it is none."""
    value = facts.get(name)
    if not isinstance(value, str) or not _DIGEST.fullmatch(value):
        raise ImageRefused("a layer's facts are nonsense", why=f"its unpacker said {value!a:.80} for {name}")
    return value


def _believed(verdict: _Message | None, what: str, complaint: str) -> Facts:
    if isinstance(verdict, _Done):
        return verdict.facts
    raise _error(verdict, what, complaint)


def _error(verdict: _Message | None, what: str, complaint: str) -> TartarusError:
    if isinstance(verdict, _Refused):
        return ImageRefused(f"{what} was refused", why=f"{_clean(verdict.what)}: {_clean(verdict.why)}")
    if isinstance(verdict, _Failed):
        return _failed(verdict, what)
    if isinstance(verdict, _Unjailed):
        return IsolationUnavailable(
            f"{what} can't be unpacked safely on this host",
            why=f"{_clean(verdict.step)}: {_clean(verdict.why)}",
            fix="run `tartarus doctor`; unpacking needs user namespaces and Linux 5.11 or later",
        )
    last = _clean(complaint.strip().rpartition("\n")[2])
    return ImageRefused(f"{what} could not be handled", why=last or "its unpacker was killed for what it did or used")


def _failed(verdict: _Failed, what: str) -> TartarusError:
    why = _clean(verdict.why)
    if verdict.number in {errno.ENOSPC, errno.EDQUOT}:
        return NoSpace(f"no space left for {what}", why=why, fix="free some disk, or move TARTARUS_HOME")
    if verdict.number == errno.EOPNOTSUPP:
        fix = "put TARTARUS_HOME on a file system with user attributes: ext4, xfs, btrfs, or tmpfs since Linux 6.6"
        return TemplateFailed(f"can't unpack {what}", why=why, fix=fix)
    return TemplateFailed(f"can't unpack {what}", why=why)


def _clean(text: str) -> str:
    """What the child said, as one short line: terminals obey control characters."""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:_MOST_SAID])
