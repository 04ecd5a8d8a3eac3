"""The main command's recorded output, of live and of ended sandboxes."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator

from litestar import get
from litestar.params import FromPath, FromQuery
from litestar.response import Stream

from tartarus.control.api import ApiRequest
from tartarus.control.cutting import whole_or_cut
from tartarus.control.ports import LogEntry

MEDIA_TYPE = "application/vnd.tartarus.log"
# time_ns (Unix), stream (1 stdout, 2 stderr), length of the data that follows.
FRAME = struct.Struct("<QBI")


async def _frames(entries: AsyncIterator[LogEntry]) -> AsyncIterator[bytes]:
    async for entry in entries:
        yield FRAME.pack(entry.time_ns, entry.stream, len(entry.data)) + entry.data


@get("/v1/sandboxes/{sandbox_id:str}/logs", audit="sandbox.logs")
async def logs(request: ApiRequest, sandbox_id: FromPath[str], follow: FromQuery[bool] = False) -> Stream:
    """Output as binary frames: u64 time in ns, u8 stream, u32 length (little endian), data.

    With `follow`, new output comes until the sandbox ends.
    """
    record, sandbox = await request.api.find(request.peer.tenant, sandbox_id)
    log = request.api.node.log(record) if sandbox is None else sandbox.log
    return Stream(whole_or_cut(request, _frames(log.read(follow=follow))), media_type=MEDIA_TYPE)


ROUTES = [logs]
