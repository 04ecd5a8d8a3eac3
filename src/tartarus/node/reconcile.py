"""Comparing what the store says with what the host really runs, at start and every minute."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import structlog

from tartarus.model.errors import TartarusError
from tartarus.model.sandbox import Reason, SandboxRecord
from tartarus.model.states import ALIVE, State
from tartarus.runtimes.cgroups import Hierarchy
from tartarus.runtimes.trees import remove_tree
from tartarus.store.sandboxes import SandboxStore

_log = structlog.get_logger("tartarus.node.reconcile")
_GRACE_S = 30.0
"""A record younger than this may still be on its way to becoming a live sandbox."""
_REMOVE_ATTEMPTS = 500
_ON_DISK = frozenset({State.HIBERNATED, State.STARTING})


async def records_without_guests(
    store: SandboxStore, live: set[str], *, at_start: bool, lost: Callable[[SandboxRecord], None] = lambda _record: None
) -> int:
    """End as `lost` the records that say alive while nothing runs, and tell `lost` of each; returns how many.

    Nothing runs of what is hibernated, or was being woken when its daemon ended: its memory is on disk. What is
    quarantined stays so, as evidence, after its processes ended with their daemon.
    """
    ended = 0
    for record in await store.alive():
        if (record.saved and record.state in _ON_DISK) or record.state is State.QUARANTINED:
            continue
        if record.id in live or (not at_start and time.time() - record.created_at < _GRACE_S):
            continue
        try:
            lost(
                await store.transition(
                    record.id, ALIVE, State.LOST, reason=Reason.LOST, message="the daemon that ran it ended"
                )
            )
            ended += 1
        except TartarusError as error:
            _log.warning("lost_not_stored", sandbox=record.id, error=str(error))
    return ended


async def groups_without_sandboxes(hierarchy: Hierarchy | None, known: set[str], *, prefix: str = "") -> int:
    """Kill and remove cgroups (and so processes) that no live sandbox or nursery owns; returns how many.

    `prefix`: look only at groups whose names begin with it.
    """
    if hierarchy is None:
        return 0
    names = [name for name in hierarchy.existing() if name.startswith(prefix) and name not in known]
    left = [(name, hierarchy.open(name)) for name in names]
    for _ in range(_REMOVE_ATTEMPTS):
        # All of them again and again: a nursery ends only after its guests, which a pause may still hold.
        for _name, group in left:
            group.kill()
        left = [(name, group) for name, group in left if not group.remove()]
        if not left:
            break
        await asyncio.sleep(0.01)
    for name, _group in left:
        _log.error("leftover_group", name=name)
    return len(names) - len(left)


def directories_without_sandboxes(base: Path, known: set[str]) -> int:
    """Remove working directories (process level) that no live sandbox owns; returns how many."""
    removed = 0
    for path in base.iterdir() if base.is_dir() else ():
        if path.name not in known:
            remove_tree(path)
            removed += 1
    return removed
