"""Mounts as they are asked for: the paths that users give become those that a sandbox keeps.

A sandbox that may write to a directory can put links where another of its mounts lies below that, and then be woken,
forked or resumed: whoever mounts again must find what was asked for, or nothing. So links are followed once, here, on
behalf of who asks, and never again (`runtimes.container.mounts` opens paths without any).
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import msgspec

from tartarus.model.errors import InvalidRequest
from tartarus.model.sandbox import Mount, SandboxSpec


async def with_links_followed(spec: SandboxSpec, state_dir: Path) -> SandboxSpec:
    """The same request, with its mounts' sources by paths that hold no links now.

    Raises InvalidRequest for what lies in the daemon's own `state_dir`: who writes there decides what all sandboxes
    are and may, and what is known of them; and who reads there, reads others' output, evidence and saved memory.
    """
    if not spec.mounts:
        return spec
    # A file system that does not answer keeps this request waiting, and no other.
    return msgspec.structs.replace(spec, mounts=await asyncio.to_thread(_followed, spec.mounts, state_dir))


def _followed(mounts: tuple[Mount, ...], state_dir: Path) -> tuple[Mount, ...]:
    followed = tuple(msgspec.structs.replace(mount, source=os.path.realpath(mount.source)) for mount in mounts)
    own = state_dir.resolve()
    for mount in followed:
        if Path(mount.source).is_relative_to(own):
            raise InvalidRequest(
                f"{mount.source} can't be mounted", why="it is among the daemon's own files",
                fix="copy what the sandbox needs to another place",
            )  # fmt: skip
    return followed
