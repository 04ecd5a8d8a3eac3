"""One running gVisor guest: as the other kinds that are processes of this host, with what runsc printed."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from tartarus.guest.channel import GuestChannel
from tartarus.model.errors import GuestFailed
from tartarus.model.sandbox import Resources
from tartarus.runtimes.cgroups import Cgroup
from tartarus.runtimes.container.storage import used_bytes
from tartarus.runtimes.gvisor.limits import with_overhead
from tartarus.runtimes.handle import HostGuest
from tartarus.runtimes.nursery import Clone

_MOST_BYTES = 64 * 1024
_LAST = 2000


class RunscLog:
    """A pipe for what runsc prints; as much as fits into it is kept, and a guest that fills it stops nobody else."""

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        self._said = b""

    def fileno(self) -> int:
        """The end to hand over."""
        return self._writer

    def handed_over(self) -> None:
        """Close our copy of that end; safe to repeat."""
        if self._writer >= 0:
            os.close(self._writer)
            self._writer = -1

    def text(self) -> str:
        """Its last words so far."""
        try:
            while self._reader >= 0 and len(self._said) < _MOST_BYTES:
                data = os.read(self._reader, _MOST_BYTES)
                if not data:
                    break
                self._said += data
        except BlockingIOError:
            pass
        return self._said.decode("utf-8", "replace")[-_LAST:].strip()

    def close(self) -> str:
        """Close both ends, and return the last words; safe to repeat."""
        said = self.text()
        self.handed_over()
        if self._reader >= 0:
            os.close(self._reader)
            self._reader = -1
        return said


class RunscGuest(HostGuest):
    """A guest whose first process is its runsc."""

    can_stop_each = False  # runsc stops and starts its programs' processes itself

    def __init__(
        self,
        clone: Clone,
        channel: GuestChannel,
        cgroup: Cgroup | None,
        resources: Resources,
        *,
        steps: Sequence[str],
        warm: bool,
        storage: int,
        changes: Path,
        log: RunscLog,
        end_guest: Callable[[int], Awaitable[None]] | None = None,
        forget: Callable[[], None] | None = None,
    ) -> None:
        self._log = log
        self._forget = forget
        self._storage = storage
        super().__init__(
            clone, channel, cgroup, resources,
            steps=steps, warm=warm, changes=changes,
            disk_bytes=lambda _pid: used_bytes(storage), after_end=self._let_go, end_guest=end_guest,
        )  # fmt: skip

    async def ready(self) -> None:
        """Wait until its agent serves. Raises GuestFailed or NoSpace with what runsc said."""
        try:
            await super().ready()
        except GuestFailed as error:
            said = self.said()
            if not said:
                raise
            raise GuestFailed("runsc did not start the sandbox", why=said, fix="tartarus doctor") from error

    def said(self) -> str:
        """The last of what runsc printed, and the guest before its agent began."""
        return self._log.text()

    def limit(self, resources: Resources) -> None:
        """Change its cgroup's limits."""
        self._require_cgroup("change the limits of").limit(with_overhead(resources))
        self._resources = resources

    async def _let_go(self) -> None:
        """Close the last hold on its storage: the kernel then frees it, which takes as long as there is much."""
        self._log.close()
        if self._forget is not None:
            self._forget()
        await asyncio.to_thread(os.close, self._storage)
