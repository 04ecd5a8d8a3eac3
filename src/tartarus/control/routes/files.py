"""The sandbox's files: raw bytes both ways, and JSON for everything else."""

from __future__ import annotations

import re

import msgspec
from litestar import delete, get, post, put
from litestar.params import FromPath, FromQuery, JSONBody
from litestar.response import Stream

from tartarus.control.api import ApiRequest
from tartarus.control.cutting import whole_or_cut
from tartarus.control.decode import Strict
from tartarus.control.streaming import ndjson, primed
from tartarus.model.checks import no_nul, require
from tartarus.model.sandbox import FileInfo

_ROOT = "/v1/sandboxes/{sandbox_id:str}/files"


def _checked(path: str) -> str:
    no_nul(path, "the path")
    require(path.startswith("/"), f"path {path!r} is not absolute", "begin it with /")
    return path


def _mode(text: str) -> int:
    require(re.fullmatch("[0-7]{1,4}", text) is not None, f"{text!r} is not a file mode", "write it in octal: 0644")
    return int(text, 8)


class MakeDirectory(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A directory to make; with `parents`, those above it too, and an existing one is fine."""

    path: str
    parents: bool = False

    def __post_init__(self) -> None:
        _checked(self.path)


class Move(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A rename inside the sandbox."""

    source: str
    target: str

    def __post_init__(self) -> None:
        _checked(self.source)
        _checked(self.target)


@get(_ROOT, audit="sandbox.file.read")
async def read(request: ApiRequest, sandbox_id: FromPath[str], path: FromQuery[str]) -> Stream:
    """A file's bytes. If they can't all be read, the connection is cut before the answer's end."""
    sandbox = await request.live(sandbox_id)
    pieces = await primed(sandbox.files.read(_checked(path)))
    return Stream(whole_or_cut(request, pieces), media_type="application/octet-stream")


@put(_ROOT, status_code=204, request_max_body_size=None, audit="sandbox.file.write")
async def write(
    request: ApiRequest,
    sandbox_id: FromPath[str],
    path: FromQuery[str],
    mode: FromQuery[str | None] = None,
    parents: FromQuery[bool] = False,
) -> None:
    """Write the body to a file: all of it appears at once, or nothing. `mode`: octal; without it the old file's."""
    permissions = None if mode is None else _mode(mode)
    sandbox = await request.live(sandbox_id)
    await sandbox.files.write(_checked(path), request.stream(), mode=permissions, parents=parents)


@delete(_ROOT, audit="sandbox.file.remove")
async def remove(
    request: ApiRequest, sandbox_id: FromPath[str], path: FromQuery[str], recursive: FromQuery[bool] = False
) -> None:
    """Remove a file, or a directory (with `recursive` also what is in it)."""
    await (await request.live(sandbox_id)).files.remove(_checked(path), recursive=recursive)


@get(_ROOT + "/stat")
async def stat(request: ApiRequest, sandbox_id: FromPath[str], path: FromQuery[str]) -> FileInfo:
    """One file's attributes; a symbolic link's own."""
    return await (await request.live(sandbox_id)).files.stat(_checked(path))


@get(_ROOT + "/list")
async def listing(request: ApiRequest, sandbox_id: FromPath[str], path: FromQuery[str]) -> list[FileInfo]:
    """A directory's entries."""
    return await (await request.live(sandbox_id)).files.list(_checked(path))


@post(_ROOT + "/mkdir", dto=Strict[MakeDirectory], return_dto=None, status_code=204, audit="sandbox.file.mkdir")
async def mkdir(request: ApiRequest, sandbox_id: FromPath[str], data: JSONBody[MakeDirectory]) -> None:
    """Make a directory."""
    await (await request.live(sandbox_id)).files.mkdir(data.path, parents=data.parents)


@post(_ROOT + "/move", dto=Strict[Move], return_dto=None, status_code=204, audit="sandbox.file.move")
async def move(request: ApiRequest, sandbox_id: FromPath[str], data: JSONBody[Move]) -> None:
    """Rename a file or directory."""
    await (await request.live(sandbox_id)).files.move(data.source, data.target)


@get(_ROOT + "/watch", audit="sandbox.file.watch")
async def watch(
    request: ApiRequest, sandbox_id: FromPath[str], path: FromQuery[str], recursive: FromQuery[bool] = False
) -> Stream:
    """Changes below a path as JSON lines, until the client goes away or the sandbox ends."""
    sandbox = await request.live(sandbox_id)
    changes = sandbox.files.watch(_checked(path), recursive=recursive)
    await changes.ready()
    return ndjson(changes)


ROUTES = [read, write, remove, stat, listing, mkdir, move, watch]
