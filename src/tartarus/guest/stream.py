"""What every conversation on a channel is: a stream id and somebody who takes its frames."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from tartarus.guest.protocol import BadFrame

if TYPE_CHECKING:
    from tartarus.guest.channel import GuestChannel
    from tartarus.model.errors import TartarusError


class Stream:
    """One conversation. The channel calls `on_frame` for each checked piece, `on_lost` when it dies."""

    __slots__ = ("channel", "id")

    def __init__(self, channel: GuestChannel) -> None:
        self.channel = channel
        self.id = 0

    def on_frame(self, kind: int, flags: int, payload: bytes) -> None:
        """Take one piece. BadFrame ends the channel."""
        raise BadFrame(f"frame type {kind:#x} on a stream of another kind")

    def on_lost(self, error: TartarusError) -> None:
        """The channel is gone; nothing more will come."""


def settle(future: asyncio.Future[Any], value: object) -> None:
    """Complete a future, unless that happened before or its waiter gave up."""
    if not future.done():
        future.set_result(value)


def fail(future: asyncio.Future[Any], error: BaseException) -> None:
    """Fail a future; nobody waiting for it is no reason for a warning."""
    if not future.done():
        future.set_exception(error)
        future.exception()
