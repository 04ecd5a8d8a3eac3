"""Answers that can't be finished: the connection is cut, which no client can take for the end of the answer.

Once an answer of raw bytes has begun, HTTP has no other way to say that what was sent is not the whole.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from tartarus.control.problems import as_tartarus_error
from tartarus.control.streaming import close_iterator

if TYPE_CHECKING:
    from tartarus.control.api import ApiRequest

_EXTENSION = "tartarus.cut"
_NOTICED_S = 5.0


class CuttableProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol, whose requests carry a way to cut their connection."""

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        # Not its descriptor: that number may be another client's by the time it is used.
        self.scope["extensions"] = {_EXTENSION: {"cut": self.transport.abort}}


async def whole_or_cut(request: ApiRequest, pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """`pieces`; when they fail midway, it is logged and the client's connection cut."""
    try:
        async for piece in pieces:
            yield piece
    except Exception as error:
        import structlog  # late: the listening socket needs this package's parts before the slow imports

        failure = as_tartarus_error(error)
        path = request.scope["path"]
        structlog.get_logger("tartarus.control").warning("answer_cut_off", path=path, error=str(failure))
        extensions = cast("dict[str, dict[str, Any]]", request.scope.get("extensions") or {})
        cut: Callable[[], None] | None = extensions.get(_EXTENSION, {}).get("cut")
        if cut is None:
            raise
        cut()
        # The server notices, and ends this answer as it does for every client that has gone.
        await asyncio.sleep(_NOTICED_S)
        raise
    finally:
        await close_iterator(pieces)
