"""For the levels whose guests' memory can't be saved: they refuse, and say what to use."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

from tartarus.model.errors import Unsupported
from tartarus.runtimes.base import Guest, GuestRequest, Saved, Snapshot


def _refuse() -> NoReturn:
    raise Unsupported(
        "memory can't be saved at this isolation level",
        why="only gVisor and microVMs can write a running sandbox down; processes of the host's own kernel can't be",
        fix="run it with --isolation gvisor or microvm; tartarus snapshot keeps a container's files",
    )


class UnsavableGuest:
    """A guest whose memory stays where it is."""

    async def save(self, directory: Path, *, go_on: bool) -> Saved:  # noqa: ARG002
        """Refuse. Raises Unsupported."""
        _refuse()


class UnsavableRuntime:
    """A runtime of such guests."""

    def needs(self, snapshot: Snapshot) -> dict[str, str]:  # noqa: ARG002
        """Refuse. Raises Unsupported."""
        _refuse()

    async def restore(self, snapshot: Snapshot, saved: Path, request: GuestRequest) -> Guest:  # noqa: ARG002
        """Refuse. Raises Unsupported."""
        _refuse()
