"""The jailed child's one job: told on standard input, answered on standard output, a JSON object to a line.

The host trusts no line that comes after the jail was entered; see `tartarus.images.unpack.jailed`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

from tartarus.images.unpack.inside import jail
from tartarus.images.unpack.inside.jail import TARGET, Place
from tartarus.images.unpack.inside.refusal import Refused
from tartarus.images.unpack.limits import Limits

Facts = dict[str, Any]
Job = Callable[[], Facts]


def main() -> None:
    """Read the job, enter the jail, do the job, say how it went; the exit status is 0 when something was said."""
    job = json.loads(_line())
    limits = Limits(*job["limits"])
    places = [Place(**place) for place in job["places"]]
    # Now or never: in the jail nothing can be imported.
    run = _JOBS[job["job"]](job, limits)
    try:
        jail.enter(places, limits, _mapped, _passed(job, "source"), _passed(job, "tree"))
    except OSError as error:
        say(type="unjailed", step=str(error.filename), why=error.strerror or "", number=error.errno or 0)
        sys.exit(0)
    try:
        facts = run()
    except Refused as refused:
        say(type="refused", what=refused.what, why=refused.why)
    except OSError as error:
        say(type="failed", number=error.errno or 0, why=error.strerror or str(error))
    except MemoryError:
        say(
            type="refused", what="the layer needs too much memory to unpack", why=f"{limits.memory_bytes} bytes at most"
        )
    else:
        say(type="done", facts=facts)


def say(**message: object) -> None:
    """Write one message."""
    data = json.dumps(message).encode() + b"\n"
    while data:
        data = data[os.write(1, data) :]


def _line() -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        more = os.read(0, 1 << 16)
        if not more:
            sys.exit(1)  # the host is gone
        line += more
    return line


def _mapped() -> None:
    say(type="map")
    if os.read(0, 1) != b".":
        sys.exit(1)


def _progress(count: int) -> None:
    say(type="progress", bytes=count)


def _passed(job: Facts, name: str) -> list[int]:
    return [job[name]] if name in job else []


def _open_target() -> int:
    return os.open(TARGET, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def _unpack(job: Facts, limits: Limits) -> Job:
    from tartarus.images.unpack.inside.extract import Extractor
    from tartarus.images.unpack.inside.stream import Stream

    def run() -> Facts:
        stream = Stream(job["blob"], limits, _progress)
        target = job["tree"] if "tree" in job else _open_target()
        facts = Extractor(target, limits, owners=job["owners"]).extract(stream)
        if stream.digest() != job["diff_id"]:
            raise Refused("the layer is not what the image says", f"{stream.digest()} instead of {job['diff_id']}")
        return {**facts.as_dict(), "archive_bytes": stream.position}

    return run


def _digest(job: Facts, limits: Limits) -> Job:
    from tartarus.images.unpack.inside import trees

    return lambda: trees.digest(job.get("source", TARGET), limits, times=job["times"])


def _copy(job: Facts, limits: Limits) -> Job:
    from tartarus.images.unpack.inside import copying

    return lambda: copying.copy(job["source"], TARGET, limits, owners=job["owners"], times=job["times"])


def _merge(job: Facts, limits: Limits) -> Job:
    from tartarus.images.unpack.inside import flatten

    return lambda: flatten.merge(job["layers"], job["beneath"], job["into"], limits, owners=job["owners"])


def _pack(job: Facts, limits: Limits) -> Job:
    from tartarus.images.unpack.inside import pack

    return lambda: pack.pack(TARGET, job["out"], limits, compressed=job["compressed"])


def _expand(job: Facts, limits: Limits) -> Job:
    from tartarus.images.unpack.inside import expand

    return lambda: expand.expand(job["blob"], job["out"], limits)


def _empty(_job: Facts, _limits: Limits) -> Job:
    from tartarus.images.unpack.inside import cursor

    def run() -> Facts:
        target = _open_target()
        for name in os.listdir(target):
            cursor.remove(target, (os.fsencode(name),), lambda _parts: None)
        return {}

    return run


_JOBS: dict[str, Callable[[Facts, Limits], Job]] = {
    "unpack": _unpack,
    "digest": _digest,
    "copy": _copy,
    "merge": _merge,
    "pack": _pack,
    "empty": _empty,
    "expand": _expand,
}
