"""Template snapshots kept ready: started on demand, restarted when they die, dropped under memory pressure."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable

import structlog

from tartarus.model.errors import TartarusError
from tartarus.model.sandbox import Isolation
from tartarus.runtimes.base import RootFs, Runtime, Snapshot
from tartarus.runtimes.hardening import Hardening

_log = structlog.get_logger("tartarus.node.pool")
KEEP_FREE_FRACTION = 0.10
"""Parked interpreters are dropped, the longest unused first, while less than this share of memory is available."""
IDLE_KEPT_S = 3600.0
MOST_UNUSED = 128
"""Nurseries without guests at once; the longest unused go first."""
_JUST_USED_S = 60.0  # who has one from `get` may be about to make a guest of it


class _Entry:
    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.snapshot: Snapshot | None = None
        self.used_at = 0.0


class SnapshotPool:
    """One snapshot for each template and level. `meminfo` returns (available, total) bytes."""

    def __init__(self, runtimes: dict[Isolation, Runtime], meminfo: Callable[[], tuple[int, int]]) -> None:
        self._runtimes = runtimes
        self._meminfo = meminfo
        self._entries: dict[tuple[str, str, Isolation, Hardening], _Entry] = {}
        self._retired: list[Snapshot] = []

    async def get(self, rootfs: RootFs, isolation: Isolation, *, warm: bool) -> tuple[Snapshot, bool]:
        """A live snapshot (warmed when `warm`), and whether it stood ready already."""
        entry = self._entries.setdefault(_key(rootfs, isolation), _Entry())
        entry.used_at = time.monotonic()
        snapshot = entry.snapshot
        if snapshot is not None and self.stands(rootfs, isolation, warm=warm):
            return snapshot, True
        async with entry.lock:
            snapshot = entry.snapshot
            if snapshot is None or not snapshot.alive:
                if snapshot is not None:
                    _log.warning("nursery_died", template=rootfs.template.id, isolation=isolation.value)
                    entry.snapshot = None
                    await asyncio.shield(_close(snapshot))
                snapshot = await self._runtimes[isolation].snapshot(rootfs)
                entry.snapshot = snapshot
            if warm and not snapshot.is_warm:
                self.relieve(keep=snapshot)
                began = time.perf_counter()
                await snapshot.warm()
                _log.info("warmed", template=rootfs.template.id, isolation=isolation.value,
                          warm_up_ms=round((time.perf_counter() - began) * 1e3, 1))  # fmt: skip
            return snapshot, False

    async def renew(
        self, rootfs: RootFs, isolation: Isolation, *, warm: bool, check: Callable[[Snapshot], Awaitable[None]]
    ) -> Snapshot:
        """A new snapshot in the place of the one that may stand; the old one serves until this one passed `check`.

        Raises what kept the new one from starting, or what `check` raises, and the old one stays.
        """
        entry = self._entries.setdefault(_key(rootfs, isolation), _Entry())
        async with entry.lock:
            fresh = await self._runtimes[isolation].snapshot(rootfs)
            try:
                if warm:
                    await fresh.warm()
                await check(fresh)
            except BaseException:
                await asyncio.shield(_close(fresh))
                raise
            if entry.snapshot is not None:
                self._retire(entry.snapshot)
            entry.snapshot = fresh
            entry.used_at = time.monotonic()
            return fresh

    def retire(self, digest: str) -> None:
        """Nothing more is made of that root file system; what was made of it lives on."""
        for key in [key for key in self._entries if key[0] == digest]:
            snapshot = self._entries.pop(key).snapshot
            if snapshot is not None:
                self._retire(snapshot)

    def _retire(self, snapshot: Snapshot) -> None:
        snapshot.cool()
        self._retired.append(snapshot)

    async def sweep(self) -> None:
        """End the retired snapshots that the last guest has left, and those unused for long or too many.

        Each template and snapshot that was ever used would else keep its processes and namespaces, and one whose
        nursery died its group.
        """
        await self._close_dead()
        self._retire_idle()
        idle = [snapshot for snapshot in self._retired if not snapshot.in_use]
        self._retired = [snapshot for snapshot in self._retired if snapshot.in_use]
        for snapshot in idle:
            await _close(snapshot)

    async def _close_dead(self) -> None:
        for entry in list(self._entries.values()):
            snapshot = entry.snapshot
            if snapshot is not None and not snapshot.alive and not entry.lock.locked():
                entry.snapshot = None
                await _close(snapshot)

    def _retire_idle(self) -> None:
        now = time.monotonic()
        unused = [
            (entry.used_at, key)
            for key, entry in self._entries.items()
            if entry.snapshot is not None and not entry.snapshot.in_use and not entry.lock.locked()
        ]
        for place, (used_at, key) in enumerate(sorted(unused)):
            too_many = place < len(unused) - MOST_UNUSED and now - used_at >= _JUST_USED_S
            if too_many or now - used_at >= IDLE_KEPT_S:
                snapshot = self._entries.pop(key).snapshot
                assert snapshot is not None
                self._retire(snapshot)

    def relieve(self, keep: Snapshot | None = None) -> None:
        """Cool snapshots unused for long, and under memory pressure the longest unused ones."""
        now = time.monotonic()
        for entry in self._coolable(keep):
            available, total = self._meminfo()
            if now - entry.used_at < IDLE_KEPT_S and available >= total * KEEP_FREE_FRACTION:
                return
            if entry.snapshot is not None:
                _log.info("cooled", template=entry.snapshot.rootfs.template.id, available_bytes=available)
                entry.snapshot.cool()

    def _coolable(self, keep: Snapshot | None) -> Iterable[_Entry]:
        parked = [
            e
            for e in self._entries.values()
            if e.snapshot is not None and e.snapshot.is_warm and e.snapshot is not keep
        ]
        return sorted(parked, key=lambda entry: entry.used_at)

    def rootfs_in_use(self) -> Iterable[RootFs]:
        """The root file systems that sandboxes are, or may at any moment be, made of."""
        standing = [entry.snapshot for entry in self._entries.values() if entry.snapshot is not None]
        return [snapshot.rootfs for snapshot in (*standing, *self._retired)]

    def stands(self, rootfs: RootFs, isolation: Isolation, *, warm: bool) -> bool:
        """Whether the snapshot that `get` gave last is still there."""
        entry = self._entries.get(_key(rootfs, isolation))
        snapshot = entry.snapshot if entry is not None else None
        return snapshot is not None and snapshot.alive and (snapshot.is_warm or not warm)

    async def close(self) -> None:
        """End all snapshots."""
        for entry in self._entries.values():
            if entry.snapshot is not None:
                await _close(entry.snapshot)
        self._entries.clear()
        for snapshot in self._retired:
            await _close(snapshot)
        self._retired.clear()


def _key(rootfs: RootFs, isolation: Isolation) -> tuple[str, str, Isolation, Hardening]:
    # By its template too: two of them may have the same files and warm up differently.
    return rootfs.digest, rootfs.template.id, isolation, rootfs.hardening


async def _close(snapshot: Snapshot) -> None:
    try:
        await snapshot.close()
    except TartarusError as error:
        _log.warning("snapshot_close_failed", error=str(error))


def host_meminfo() -> tuple[int, int]:
    """(available, total) memory of this host in bytes, from /proc/meminfo."""
    values = {}
    with open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            name, _, rest = line.partition(":")
            values[name] = int(rest.split()[0]) * 1024
    return values.get("MemAvailable", 0), values.get("MemTotal", 1)
