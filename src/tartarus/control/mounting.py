"""Mounts as they are asked for: the paths that users give become those that a sandbox keeps.

A sandbox that may write to a directory can put links where another of its mounts lies below that, and then be woken,
forked or resumed: whoever mounts again must find what was asked for, or nothing. So links are followed once, here, on
behalf of who asks, and never again (`runtimes.container.mounts` opens paths without any).
"""

from __future__ import annotations

import asyncio
import os

import msgspec

from tartarus.model.sandbox import Mount, SandboxSpec


async def with_links_followed(spec: SandboxSpec) -> SandboxSpec:
    """The same request, with its mounts' sources by paths that hold no links now."""
    if not spec.mounts:
        return spec
    # A file system that does not answer keeps this request waiting, and no other.
    return msgspec.structs.replace(spec, mounts=await asyncio.to_thread(_followed, spec.mounts))


def _followed(mounts: tuple[Mount, ...]) -> tuple[Mount, ...]:
    return tuple(msgspec.structs.replace(mount, source=os.path.realpath(mount.source)) for mount in mounts)
