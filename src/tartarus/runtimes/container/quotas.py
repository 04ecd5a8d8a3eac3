"""A user namespace of its own for each guest: the kernel counts there what one user may have of timers and the like.

All guests of a nursery have the same ids and, in one namespace, would be one user, whose queued signals and timers
the first could use up for all others. The namespaces lie below the nursery's, map its ids to themselves, and own
nothing: what a guest mounts and makes it does before it enters. The kernel counts inotify instances and watches also
against whoever made the nursery's own namespace, so each guest gets a part of what that user may have. Pages of pipes
it counts by the host's user alone; no namespace changes that.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import deque
from functools import cache
from pathlib import Path

from tartarus.model.errors import TartarusError
from tartarus.runtimes.nursery import Nursery

_AHEAD = 4
_QUIET_S = 0.01
_SHARE = 4
_MIN_INSTANCES, _MIN_WATCHES = 8, 1024


@cache
def _host_limit(name: str) -> int:
    return int(Path(f"/proc/sys/user/{name}").read_text(encoding="ascii"))


def inotify_share() -> tuple[int, int]:
    """How many inotify instances and watches one guest may have: a quarter of what the host gives one user.

    Linux gives 128 instances, and watches by the machine's memory (8192 to 1048576).
    """
    return (
        max(_host_limit("max_inotify_instances") // _SHARE, _MIN_INSTANCES),
        max(_host_limit("max_inotify_watches") // _SHARE, _MIN_WATCHES),
    )


class UserNamespaces:
    """A few namespaces made ahead, so that a launch does not wait for one; each is given out once."""

    def __init__(self, nursery: Nursery, span: int) -> None:
        self._nursery = nursery
        self._span = span
        self._ready: deque[int] = deque()
        self._refilling: asyncio.Task[None] | None = None
        nursery.control.closed.add_done_callback(lambda _: self._let_go())

    async def open(self) -> None:
        """Make the first one, before any foreign code runs beside the nursery. Raises GuestFailed or NoSpace."""
        self._ready.append(await self._make())

    async def take(self) -> int:
        """A descriptor of a fresh one, which the caller closes. Raises GuestFailed or NoSpace."""
        taken = self._ready.popleft() if self._ready else await self._make()
        if self._refilling is None and not self._is_closed():
            self._refilling = asyncio.create_task(self._refill())
        return taken

    async def _make(self) -> int:
        return await self._nursery.user_namespace(self._span, *inotify_share())

    async def _refill(self) -> None:
        await asyncio.sleep(_QUIET_S)  # the guest that took the last one is starting
        # Whoever needs one and finds none makes it himself, and hears why it can't be made.
        with contextlib.suppress(TartarusError):
            while len(self._ready) < _AHEAD and not self._is_closed():
                self._ready.append(await self._make())
            if self._is_closed():
                self._let_go()
        self._refilling = None

    def _is_closed(self) -> bool:
        return self._nursery.control.closed.done()

    def _let_go(self) -> None:
        while self._ready:
            os.close(self._ready.popleft())
