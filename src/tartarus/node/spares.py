"""Spare sandboxes: guests made ahead, each with an interpreter that has warmed up and waits for one program.

For interpreters that can't be cloned (guest/parked.py). A spare is an ordinary cold guest that never served anybody:
it has an id that becomes its sandbox's, so nothing is renamed when it is given away; it belongs to one root file
system, which is one tenant's when the template is, and one level. What asks for more than a spare has (mounts, a
terminal, other limits than can be changed) starts cold.

At the WASM level guests are cloned with their runner; made ahead, they spare each start what boxing them takes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

import structlog

from tartarus.guest.parked import Parked, park
from tartarus.model.errors import GuestFailed, TartarusError
from tartarus.model.ids import new_id
from tartarus.model.sandbox import ExecSpec, Isolation, Resources, SandboxSpec
from tartarus.model.template import Template
from tartarus.node.parking import parking_of
from tartarus.node.pool import IDLE_KEPT_S, KEEP_FREE_FRACTION, SnapshotPool
from tartarus.runtimes.base import Guest, GuestRequest, RootFs, Runtime

_log = structlog.get_logger("tartarus.node.spares")
WASM_SPARES = 2
MOST = 16
"""Spares at once, over all templates; the template used last keeps its own."""
_READY_S = 30.0
_QUIET_S = 0.05
_LONGEST_WAIT_S = 5.0
"""How long a spare may be put off while sandboxes are being made."""
_BACK_OFF_MAX_S = 600.0


class Spare:
    """A guest and its parked interpreter."""

    def __init__(
        self, spare_id: str, rootfs: RootFs, guest: Guest, parked: Parked | None, resources: Resources
    ) -> None:
        self.id = spare_id
        self.rootfs = rootfs
        self.guest = guest
        self.parked = parked
        self.resources = resources
        self.given = False

    def give(self) -> Guest:
        """Its guest, which the caller ends from now on."""
        self.given = True
        return self.guest


class _Shelf:
    """The spares of one root file system and level."""

    def __init__(self, rootfs: RootFs, isolation: Isolation) -> None:
        self.rootfs = rootfs
        self.isolation = isolation
        self.spares: list[Spare] = []
        self.filling: asyncio.Task[None] | None = None
        self.used_at = 0.0
        self.failures = 0
        self.not_before = 0.0

    @property
    def wanted(self) -> int:
        """How many there should be."""
        if self.isolation is Isolation.WASM:
            return WASM_SPARES
        warm_up = self.rootfs.template.warm_up
        return 0 if warm_up is None or warm_up.is_cloned else warm_up.spares


class SparePool:
    """Keeps spares. `busy`: whether sandboxes are being made now; `meminfo` returns (available, total) bytes."""

    def __init__(
        self,
        runtimes: dict[Isolation, Runtime],
        snapshots: SnapshotPool,
        meminfo: Callable[[], tuple[int, int]],
        busy: Callable[[], bool],
    ) -> None:
        self._runtimes = runtimes
        self._snapshots = snapshots
        self._meminfo = meminfo
        self._busy = busy
        self._shelves: dict[tuple[str, str, Isolation], _Shelf] = {}
        self._ids: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._making = asyncio.Lock()
        self._closed = False

    @property
    def ids(self) -> set[str]:
        """The ids of all spares, also of those that are being made or ended: as groups and directories name them."""
        return set(self._ids)

    def ready(self, template_id: str) -> int:
        """How many spares of this template stand."""
        shelves = (shelf for shelf in self._shelves.values() if shelf.rootfs.template.id == template_id)
        return sum(len(shelf.spares) for shelf in shelves)

    def take(self, rootfs: RootFs, isolation: Isolation, spec: SandboxSpec, limits: Resources) -> Spare | None:
        """A spare that can become this sandbox, for the caller to `give` away or `drop`. None when there is none.

        Only for what `could_serve` allows. Another one is made in the background, whether this one was there or not.
        """
        if self._closed:
            return None
        shelf = self._shelf(rootfs, isolation)
        shelf.used_at = time.monotonic()
        found = next((spare for spare in shelf.spares if self._fits(spare, isolation, spec, limits)), None)
        if found is not None:
            shelf.spares.remove(found)
            self._ids.discard(found.id)  # from here on it is among the sandboxes that are starting
        self._fill_soon(shelf)
        return found

    async def renew(self, rootfs: RootFs, isolation: Isolation) -> None:
        """Make one now, in the place of those that stand. Raises what its warm-up failed with; they stay then."""
        shelf = self._shelf(rootfs, isolation)
        if not shelf.wanted:
            return
        spare = await self._make(shelf)
        if self._closed:
            self.drop(spare)
            return
        old, shelf.spares, shelf.failures, shelf.used_at = shelf.spares, [spare], 0, time.monotonic()
        for one in old:
            self.drop(one)

    def drop(self, spare: Spare) -> None:
        """End a spare that will serve nobody."""
        self._ids.add(spare.id)
        self._spawn(self._destroy(spare.id, spare.guest))

    def relieve(self) -> None:
        """Drop what stood unused for long or was retired, and under memory pressure the longest unused ones."""
        now = time.monotonic()
        for key, shelf in sorted(self._shelves.items(), key=lambda item: item[1].used_at):
            available, total = self._meminfo()
            idle = now - shelf.used_at >= IDLE_KEPT_S
            retired = not self._snapshots.stands(shelf.rootfs, shelf.isolation, warm=False)
            if idle or retired or available < total * KEEP_FREE_FRACTION:
                if shelf.spares:
                    _log.info("spares_dropped", template=shelf.rootfs.template.id, available_bytes=available)
                self._empty(shelf)
                if (idle or retired) and shelf.filling is None:
                    self._shelves.pop(key)

    async def close(self) -> None:
        """End all spares."""
        self._closed = True
        filling = [shelf.filling for shelf in self._shelves.values() if shelf.filling is not None]
        for task in filling:
            task.cancel()
        await asyncio.gather(*filling, return_exceptions=True)
        for shelf in self._shelves.values():
            self._empty(shelf)
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _shelf(self, rootfs: RootFs, isolation: Isolation) -> _Shelf:
        # By template too: two of them may have the same files and park different interpreters.
        key = (rootfs.digest, rootfs.template.id, isolation)
        shelf = self._shelves.setdefault(key, _Shelf(rootfs, isolation))
        if shelf.rootfs != rootfs:  # the same files, another warm-up or environment
            self._empty(shelf)
            shelf.rootfs, shelf.failures = rootfs, 0
        return shelf

    def _empty(self, shelf: _Shelf) -> None:
        old, shelf.spares = shelf.spares, []
        for spare in old:
            self.drop(spare)

    def _fits(self, spare: Spare, isolation: Isolation, spec: SandboxSpec, limits: Resources) -> bool:
        if not self._limits_fit(spare.resources, isolation, limits):
            return False
        if spare.parked is None:
            return not spare.guest.ended.done()
        if not spare.parked.waits:
            return False
        command = spec.command or ExecSpec(argv=(spare.parked.parking.command, "any"))
        env = spare.parked.parking.env | spec.env | command.env
        why = spare.parked.why_not(command.argv, env, tty=command.tty)
        if why:
            _log.debug("cold_start", template=spare.rootfs.template.id, why=why)
        return not why

    def _limits_fit(self, have: Resources, isolation: Isolation, want: Resources) -> bool:
        if have == want:
            return True
        can = self._runtimes[isolation].capabilities()
        in_cgroup = {can.memory_limit, can.cpu_limit, can.pids_limit} == {"cgroup"}
        # At process level each process has limits of its own, which an interpreter that runs has already.
        changeable = isolation in {Isolation.CONTAINER, Isolation.WASM} and in_cgroup
        higher = have.memory_bytes <= want.memory_bytes and have.pids <= want.pids
        return changeable and higher and have.disk_bytes == want.disk_bytes

    def _fill_soon(self, shelf: _Shelf) -> None:
        if shelf.filling is None and len(shelf.spares) < shelf.wanted and time.monotonic() >= shelf.not_before:
            shelf.filling = asyncio.get_running_loop().create_task(self._fill(shelf))

    async def _fill(self, shelf: _Shelf) -> None:
        try:
            while self._wants(shelf, shelf.rootfs):
                await self._quiet()
                available, total = self._meminfo()
                if available < total * KEEP_FREE_FRACTION:
                    return
                rootfs = shelf.rootfs
                spare = await self._make(shelf)
                # Meanwhile the template may have changed, or a renewal may have made one.
                if not self._wants(shelf, rootfs):
                    self.drop(spare)
                    continue
                shelf.spares.append(spare)
                shelf.failures = 0
                self._thin(shelf)
        except Exception as error:  # noqa: BLE001 - whatever it is, sandboxes start cold, and it is said
            shelf.failures += 1
            back_off_s = min(2.0**shelf.failures, _BACK_OFF_MAX_S)
            shelf.not_before = time.monotonic() + back_off_s
            _log.warning("spare_failed", template=shelf.rootfs.template.id, isolation=shelf.isolation.value,
                         error=str(error), again_in_s=back_off_s)  # fmt: skip
        finally:
            shelf.filling = None

    def _wants(self, shelf: _Shelf, rootfs: RootFs) -> bool:
        return not self._closed and rootfs == shelf.rootfs and len(shelf.spares) < shelf.wanted

    async def _quiet(self) -> None:
        """Wait for a moment when no sandbox is being made, but not for ever."""
        end = time.monotonic() + _LONGEST_WAIT_S
        await asyncio.sleep(_QUIET_S)
        while self._busy() and time.monotonic() < end:  # noqa: ASYNC110 - a look now and then is enough
            await asyncio.sleep(_QUIET_S)

    async def _make(self, shelf: _Shelf) -> Spare:
        began = time.perf_counter()
        rootfs, isolation = shelf.rootfs, shelf.isolation
        resources = rootfs.template.resources
        spare_id = new_id("sbx")
        self._ids.add(spare_id)
        try:
            # One at a time, so that sandboxes being started have the rest of the host. Not the warm-up, which runs
            # within its template's limits, as long as it likes: it must not keep other templates waiting.
            async with self._making:
                guest = await self._start_guest(rootfs, isolation, spare_id)
        except BaseException:
            self._ids.discard(spare_id)
            raise
        parked: Parked | None = None
        try:
            if isolation is not Isolation.WASM:
                places = self._runtimes[isolation].places(rootfs, spare_id)
                parked = await park(guest.channel, parking_of(rootfs.template, places, isolation))
        except BaseException:
            await asyncio.shield(self._destroy(spare_id, guest))
            raise
        spare = Spare(spare_id, rootfs, guest, parked, resources)
        self._spawn(self._watch(shelf, spare))
        _log.info("parked", template=rootfs.template.id, isolation=isolation.value,
                  warm_up_ms=round((time.perf_counter() - began) * 1e3, 1))  # fmt: skip
        return spare

    async def _start_guest(self, rootfs: RootFs, isolation: Isolation, spare_id: str) -> Guest:
        warm = isolation is Isolation.WASM
        snapshot, _ = await self._snapshots.get(rootfs, isolation, warm=warm)
        request = GuestRequest(id=spare_id, hostname=spare_id, resources=rootfs.template.resources)
        guest = await self._runtimes[isolation].clone(snapshot, request, warm=warm)
        try:
            async with asyncio.timeout(_READY_S):
                await guest.ready()
        except TimeoutError:
            await asyncio.shield(guest.destroy())
            raise GuestFailed(f"a spare sandbox did not start within {_READY_S:g} s") from None
        except BaseException:
            await asyncio.shield(guest.destroy())
            raise
        return guest

    async def _watch(self, shelf: _Shelf, spare: Spare) -> None:
        """Notice a spare that breaks while it stands."""
        await (asyncio.wait([spare.guest.ended]) if spare.parked is None else spare.parked.broken())
        if spare in shelf.spares:
            shelf.spares.remove(spare)
            shelf.failures += 1
            shelf.not_before = time.monotonic() + min(2.0**shelf.failures, _BACK_OFF_MAX_S)
            _log.warning("spare_broke", template=spare.rootfs.template.id)
            self.drop(spare)

    def _thin(self, keep: _Shelf) -> None:
        """Drop the longest unused ones above what the host keeps."""
        shelves = sorted(self._shelves.values(), key=lambda shelf: (shelf is keep, shelf.used_at))
        over = sum(len(shelf.spares) for shelf in shelves) - MOST
        for shelf in shelves:
            while over > 0 and shelf.spares:
                self.drop(shelf.spares.pop(0))
                over -= 1

    async def _destroy(self, spare_id: str, guest: Guest) -> None:
        try:
            await guest.destroy()
        except TartarusError as error:
            _log.warning("spare_not_ended", spare=spare_id, error=str(error))
        finally:
            self._ids.discard(spare_id)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def could_serve(template: Template, isolation: Isolation, spec: SandboxSpec) -> bool:
    """Whether a spare of this template, with other limits or variables perhaps, could be this sandbox."""
    warm_up = template.warm_up
    is_wasm = isolation is Isolation.WASM
    if not is_wasm and (warm_up is None or warm_up.is_cloned or not warm_up.spares):
        return False
    # Whatever else can be asked for, now or in time to come, is not what a spare was made with.
    plain = SandboxSpec(
        template=spec.template, snapshot=spec.snapshot, isolation=spec.isolation, command=spec.command,
        resources=spec.resources, timeout_s=spec.timeout_s, env=spec.env, workdir=spec.workdir, name=spec.name,
        labels=spec.labels, wasm=spec.wasm,
    )  # fmt: skip
    if spec != plain:
        return False
    command = spec.command
    if command is None or warm_up is None or is_wasm:
        return True
    plain_command = ExecSpec(
        argv=command.argv, env=command.env, workdir=command.workdir, stdin=command.stdin, rows=command.rows,
        cols=command.cols, timeout_s=command.timeout_s,
    )  # fmt: skip
    return command == plain_command and command.argv[0] == warm_up.argv0[0]
