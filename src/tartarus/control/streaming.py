"""HTTP streams. What can be refused is refused before the answer begins, so that it is still a problem document."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator
from typing import Any, TypeVar

import msgspec
from litestar.response import Stream

from tartarus.control.problems import as_tartarus_error, problem_of

T = TypeVar("T")
NDJSON = "application/x-ndjson"
_encode = msgspec.json.Encoder().encode


async def primed(items: AsyncIterator[T]) -> AsyncIterator[T]:
    """`items`, once the first one is there or the end is known; what fails before that is raised here."""
    iterator = aiter(items)
    try:
        first = await anext(iterator)
    except StopAsyncIteration:
        return _chain([], iterator)
    return _chain([first], iterator)


async def _chain(first: list[T], rest: AsyncIterator[T]) -> AsyncIterator[T]:
    try:
        for item in first:
            yield item
        async for item in rest:
            yield item
    finally:
        await close_iterator(rest)


async def _lines(items: AsyncIterable[Any]) -> AsyncIterator[bytes]:
    try:
        async for item in items:
            yield _encode(item) + b"\n"
    except Exception as error:  # noqa: BLE001 - whatever it is, the client must not take a cut stream for a whole one
        # The answer has begun: the problem is its last line.
        yield _encode({"type": "problem", "problem": problem_of(as_tartarus_error(error))}) + b"\n"
    finally:
        await close_iterator(items)


async def close_iterator(items: object) -> None:
    """End an iterator early, if it is of a kind that holds something until then."""
    close = getattr(items, "aclose", None)
    if close is not None:
        await close()


def ndjson(items: AsyncIterable[Any]) -> Stream:
    """Answer with one JSON object a line; a later failure is a last line ``{"type": "problem", …}``."""
    return Stream(_lines(items), media_type=NDJSON)
