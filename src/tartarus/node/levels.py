"""The isolation levels of this host: which can be given, why not the others, and the proof."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

import msgspec
import structlog

from tartarus.images.unpack.written import WrittenFiles
from tartarus.model.errors import IsolationUnavailable, TartarusError
from tartarus.model.sandbox import Isolation
from tartarus.model.settings import Settings
from tartarus.node.reconcile import groups_without_sandboxes
from tartarus.runtimes.base import Capabilities, Runtime
from tartarus.runtimes.cgroups import Hierarchy, open_hierarchy
from tartarus.runtimes.container.runtime import ContainerRuntime
from tartarus.runtimes.gvisor.runtime import GvisorRuntime
from tartarus.runtimes.idmap import IdMap, host_id_map
from tartarus.runtimes.microvm.runtime import MicrovmRuntime
from tartarus.runtimes.process.runtime import ProcessRuntime
from tartarus.runtimes.wasm.runtime import WasmRuntime

KINDS: tuple[type[Runtime], ...] = (ProcessRuntime, ContainerRuntime, GvisorRuntime, MicrovmRuntime, WasmRuntime)
"""Every level's runtime, the weakest first; `wasm` stands beside the others."""
_log = structlog.get_logger("tartarus.node.levels")


class LevelReport(msgspec.Struct, frozen=True):
    """One level on this host. `proved_ms`: how long a guest took to start and end; None when it could not."""

    isolation: Isolation
    ok: bool
    detail: str
    fix: str
    capabilities: Capabilities | None
    proved_ms: float | None


class Levels:
    """Owns the runtimes.

    `unavailable`: why a level can't be given, until the daemon restarts. `proved`: levels that have started once.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.runtimes: dict[Isolation, Runtime] = {}
        self.unavailable: dict[Isolation, str] = {}
        self.proved: set[Isolation] = set()
        self.hierarchy: Hierarchy | None = None
        self.id_map: IdMap = host_id_map()

    def open(self) -> None:
        """Make the runtimes. A host without cgroups still gets them, with fewer limits, and says so."""
        try:
            self.hierarchy = open_hierarchy(self._settings.state_dir)
        except IsolationUnavailable as error:
            _log.warning("no_cgroups", error=str(error))
        state, kernels = self._settings.state_dir, self._settings.kernels
        monitor = self._settings.microvm_monitor
        makers: dict[Isolation, Callable[[], Runtime]] = {
            Isolation.MICROVM: lambda: MicrovmRuntime(
                state, kernels, self.hierarchy, self.id_map, monitor, jailer=self._settings.microvm_jailer
            ),
            Isolation.GVISOR: lambda: GvisorRuntime(
                self._settings.state_dir,
                self.hierarchy,
                self.id_map,
                WrittenFiles(),
                platform=self._settings.gvisor_platform,
            ),
            Isolation.CONTAINER: lambda: ContainerRuntime(self._settings.state_dir, self.hierarchy, self.id_map),
            Isolation.PROCESS: lambda: ProcessRuntime(self._settings.state_dir, self.hierarchy),
            Isolation.WASM: lambda: WasmRuntime(self._settings.state_dir, self.hierarchy, self.id_map),
        }
        for isolation, make in makers.items():
            try:
                self.runtimes[isolation] = make()
            except TartarusError as error:
                self.unavailable[isolation] = str(error)

    def require(self, isolation: Isolation) -> Runtime:
        """The runtime of a level. Raises IsolationUnavailable with why there is none."""
        runtime = self.runtimes.get(isolation)
        if runtime is None:
            raise IsolationUnavailable(
                f"this host can't give isolation {isolation.value!r}", why=self.unavailable.get(isolation, ""),
                fix="tartarus doctor shows how to get it",
            )  # fmt: skip
        return runtime

    async def prove(self, start_one: Callable[[Isolation], Awaitable[None]]) -> list[LevelReport]:
        """Start a guest at each level and say how it went."""
        reports = []
        for isolation in [kind.isolation for kind in KINDS]:
            began = time.perf_counter()
            runtime = self.runtimes.get(isolation)
            capabilities = runtime.capabilities() if runtime is not None else None
            said = ""
            try:
                if isinstance(runtime, MicrovmRuntime):
                    # Not the default template, whose files would first have to be packed: that takes a minute.
                    said = await runtime.prove()
                    capabilities = runtime.capabilities()
                else:
                    await start_one(isolation)
                    if runtime is not None:
                        capabilities = runtime.capabilities()
                        said = capabilities.how
            except TartarusError as error:
                reports.append(LevelReport(isolation, False, str(error), error.fix, capabilities, None))
                continue
            took = round((time.perf_counter() - began) * 1e3, 1)
            detail = (
                "; ".join(capabilities.missing)
                if capabilities is not None and capabilities.missing
                else "all limits enforced"
            )
            detail = f"{said}; {detail}" if said else detail
            reports.append(LevelReport(isolation, True, detail, "", capabilities, took))
        return reports

    async def close(self) -> None:
        """End every runtime."""
        for runtime in self.runtimes.values():
            await runtime.close()
        self.runtimes.clear()
        # Of nurseries that were killed, or whose start was broken off twice.
        await groups_without_sandboxes(self.hierarchy, set())
        if self.hierarchy is not None:
            self.hierarchy.close()
