"""WebAssembly modules that tenants sent, compiled once each, and the root file systems that run them.

A compiled module is code that is executed as it lies, so nobody but the daemon may write where it lies: each tenant
has a store of its own below a directory that only the daemon's user may enter, named by the module's sha256 and all
that its code depends on. Guests see the file through a read-only layer.
"""

from __future__ import annotations

import asyncio
import builtins
import hashlib
import importlib.metadata
import os
import platform
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import structlog

from tartarus.guest.wasm import COMPONENT_FORM, HOME, MODULE_FORM, MOST_MODULE_BYTES
from tartarus.images.entries import Entry, directory, write_tree
from tartarus.images.interpreter import find_interpreter
from tartarus.images.paths import RUNNER
from tartarus.images.store import LayerStore
from tartarus.model.errors import ModuleNotFound, ModuleRefused, Unsupported
from tartarus.model.modules import ModuleInfo
from tartarus.model.sandbox import Isolation, Wasm
from tartarus.model.settings import Settings
from tartarus.model.template import WarmUp
from tartarus.node.compiling import compile_to
from tartarus.node.levels import Levels
from tartarus.node.modulestore import ModuleStore, name_of
from tartarus.node.offers import IMAGE, Offers
from tartarus.node.pool import SnapshotPool
from tartarus.node.uploads import Uploads
from tartarus.runtimes.base import RootFs
from tartarus.runtimes.wasm.runtime import engine_package

_log = structlog.get_logger("tartarus.node.modules")
FORMAT = 1
"""Raise it when the same module is to be compiled otherwise, or the layers look different."""
_COMPILERS = 2
_MOST_READY = 1024
_NOTED_EVERY_S = 3600.0
_KEPT_S = 30 * 86400.0
_GUEST = Path(__file__).parents[1] / "guest"


class Modules:
    """One daemon's modules. `relieve` drops the sandboxes made ahead that nothing may be made of any more."""

    def __init__(
        self, settings: Settings, levels: Levels, pool: SnapshotPool, offers: Offers, uploads: Uploads,
        relieve: Callable[[], None],
    ) -> None:  # fmt: skip
        self._settings = settings
        self._levels = levels
        self._pool = pool
        self._offers = offers
        self._uploads = uploads
        self._relieve = relieve
        self._stores: dict[str, ModuleStore] = {}
        self._compiling = asyncio.Semaphore(_COMPILERS)
        self._turns: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()
        self._verified: set[tuple[str, str]] = set()
        self._engine: tuple[str, Path] | None = None
        self._ready: dict[tuple[str, str, Wasm | None], RootFs] = {}

    async def open(self) -> None:
        """Remove what an earlier daemon left half-made."""
        await asyncio.to_thread(self._open)

    def _open(self) -> None:
        for place in self._places():
            ModuleStore(place).remove_set_aside(())
        if (self._settings.cache_dir / "wasm").is_dir():
            LayerStore(self._settings.cache_dir / "wasm")

    async def add(self, tenant: str, upload: str) -> ModuleInfo:
        """Compile what the tenant sent, unless it is compiled already.

        Raises UploadNotFound, ModuleRefused, IsolationUnavailable, TimeLimit, NoSpace.
        """
        self._levels.require(Isolation.WASM)
        # One at a time for each tenant: however many they send, others get their turn, and one is held in memory.
        async with self._turns.setdefault(tenant, asyncio.Lock()):
            async with self._uploads.claimed(tenant, upload) as path:
                data = await asyncio.to_thread(_read, path)
            return await self.compile(tenant, data)

    async def compile(self, tenant: str, data: bytes) -> ModuleInfo:
        """Compile a module or component, unless it is compiled already. Raises as `add` does."""
        is_component = _form(data)
        digest = hashlib.sha256(data).hexdigest()
        began = time.perf_counter()
        store = await self._store(tenant)
        await asyncio.to_thread(store.check_room, self._in_use())
        layer = await self._layer(tenant, digest, metered=False, data=data)
        await asyncio.to_thread(store.thin, self._in_use())
        return ModuleInfo(
            digest=digest, size_bytes=len(data), kind="component" if is_component else "module",
            compile_ms=round((time.perf_counter() - began) * 1e3, 3),
            disk_bytes=int(store.manifest(layer.parent.name)["bytes"]), used_at=time.time(), ready=True,
        )  # fmt: skip

    async def find(self, tenant: str, digest: str) -> ModuleInfo:
        """A module that is compiled, marked as used now. Raises ModuleNotFound."""
        Wasm(module=digest)
        layer = await self._layer(tenant, digest, metered=False)
        home = layer / HOME.lstrip("/")
        return ModuleInfo(
            digest=digest, size_bytes=(home / "source.wasm").stat().st_size,
            kind="component" if (home / "component.cwasm").exists() else "module", compile_ms=0.0,
            disk_bytes=int((await self._store(tenant)).manifest(layer.parent.name)["bytes"]), used_at=time.time(),
            ready=True,
        )  # fmt: skip

    async def list(self, tenant: str) -> builtins.list[ModuleInfo]:
        """The tenant's modules, the one that was used last first."""
        key, _ = await self._engine_layer()
        return await asyncio.to_thread((await self._store(tenant)).listing, key)

    async def remove(self, tenant: str, word: str) -> None:
        """Forget a module, by its digest or the unique beginning of it; sandboxes that were made of it go on.

        Raises ModuleNotFound, InvalidRequest.
        """
        store = await self._store(tenant)
        names = await asyncio.to_thread(lambda: store.set_aside(store.resolve(word)))
        self._verified.difference_update((tenant, name) for name in names)
        place = self._place(tenant)
        for rootfs in list(self._pool.rootfs_in_use()):
            if any(layer.parent.parent == place and layer.parent.name in names for layer in rootfs.layers):
                self._pool.retire(rootfs.digest)
        self._relieve()
        await asyncio.to_thread(store.remove_set_aside, self._in_use())

    async def rootfs(self, tenant: str, base: RootFs, wasm: Wasm | None) -> RootFs:
        """A root file system that runs modules, made of another. Raises ModuleNotFound, Unsupported, TemplateFailed."""
        asked = None if wasm is None else Wasm(module=wasm.module, fuel=None if wasm.fuel is None else 1)
        ready = self._ready.get((tenant, base.digest, asked))
        if ready is not None and _used(ready.layers[0]):
            return ready
        if len(self._ready) >= _MOST_READY:
            self.forget()
        made = self._ready[tenant, base.digest, asked] = await self._make(tenant, base, asked)
        return made

    async def _make(self, tenant: str, base: RootFs, wasm: Wasm | None) -> RootFs:
        if base.template.base == IMAGE:
            raise Unsupported(
                "the wasm level runs modules over the host's own template, not over an image",
                fix="leave --template out, and name the module's file as the command",
            )
        key, engine = await self._engine_layer()
        package = await asyncio.to_thread(engine_package)
        warm_up = WarmUp(interpreter=(await asyncio.to_thread(find_interpreter)).path, argv0=("wasm",))
        rootfs = RootFs(
            msgspec.structs.replace(base.template, warm_up=warm_up),
            (engine, *base.layers),
            (*base.binds, (str(package), f"{HOME}/wasmtime")),
            f"wasm:{key}:{base.digest}",
        )
        if wasm is None or not wasm.module:
            return rootfs
        layer = await self._layer(tenant, wasm.module, metered=wasm.fuel is not None)
        own = f"{tenant}:{layer.parent.name}:{rootfs.digest}"
        return msgspec.structs.replace(rootfs, layers=(layer, *rootfs.layers), digest=own)

    async def _layer(self, tenant: str, digest: str, *, metered: bool, data: bytes | None = None) -> Path:
        """The layer that holds a module's code; compiled now if `data`, or the store, has the module itself."""
        store = await self._store(tenant)
        key, _ = await self._engine_layer()
        plain = name_of(key, digest, metered=False)
        name = name_of(key, digest, metered=metered)
        found = store.find(name)
        if found is None:
            source = store.find(plain)
            if data is None and source is None:
                raise ModuleNotFound(f"no module {digest[:12]}…", fix="send it again: it was not used for long")
            if data is None:
                assert source is not None
                data = await asyncio.to_thread((source / HOME.lstrip("/") / "source.wasm").read_bytes)
            found = await store.get(name, self._build(data, metered=metered))
        if (tenant, name) not in self._verified:
            await asyncio.to_thread(_verify, store, name, found)
            self._verified.add((tenant, name))
        return found

    def _build(self, data: bytes, *, metered: bool) -> Any:
        async def build(tree: Path, _lock: int) -> dict[str, Any]:
            runtime = self._levels.require(Isolation.WASM)
            rootfs = await self.rootfs("", await self._offers.host(), None)
            kind = "component" if _form(data) else "module"
            source = [] if metered else [Entry(f"{HOME}/source.wasm", "file", 0o644, content=data)]
            await asyncio.to_thread(write_tree, tree, [directory(HOME), *source], self._offers.uid_base)
            code = tree / HOME.lstrip("/") / f"{kind}{'.metered' if metered else ''}.cwasm"
            began = time.perf_counter()
            async with self._compiling:
                sha256 = await compile_to(runtime, self._pool, rootfs, data, code, metered=metered)
            took = round((time.perf_counter() - began) * 1e3, 1)
            if self._offers.uid_base is not None:
                os.chown(code, self._offers.uid_base, self._offers.uid_base)
            _log.info("compiled", bytes=len(data), code_bytes=code.stat().st_size, compile_ms=took)
            return {"code": code.name, "sha256": sha256, "bytes": code.stat().st_size + len(data)}

        return build

    async def _engine_layer(self) -> tuple[str, Path]:
        """What compiled code depends on, as a word, and the layer that has the runner and room for wasmtime."""
        if self._engine is None:
            key = await asyncio.to_thread(engine_key)
            files = {
                RUNNER: "wasm_runner.py", f"{HOME}/wasm_engine.py": "wasm_engine.py",
                f"{HOME}/python_runner.py": "runner.py",
            }  # fmt: skip
            contents = {path: (_GUEST / name).read_bytes() for path, name in files.items()}
            entries = [directory(f"{HOME}/wasmtime")]
            entries += [Entry(path, "file", 0o644, content=content) for path, content in contents.items()]
            name = hashlib.sha256(msgspec.msgpack.encode((FORMAT, entries, self._offers.uid_base))).hexdigest()[:24]

            async def build(tree: Path, _lock: int) -> dict[str, Any]:
                await asyncio.to_thread(write_tree, tree, entries, self._offers.uid_base)
                return {}

            store = await asyncio.to_thread(LayerStore, self._settings.cache_dir / "wasm")
            self._engine = f"{key}-{name[:8]}", await store.get(f"engine-{name}", build)
        return self._engine

    def forget(self) -> None:
        """Look at everything anew, as at the first use after a start."""
        self._verified.clear()
        self._ready.clear()

    def _place(self, tenant: str) -> Path:
        return self._settings.cache_dir / "tenants" / tenant / "modules"

    def _places(self) -> builtins.list[Path]:
        return [place for place in (self._settings.cache_dir / "tenants").glob("*/modules") if place.is_dir()]

    async def _store(self, tenant: str) -> ModuleStore:
        place = self._place(tenant)
        if tenant not in self._stores or not place.is_dir():
            self._stores[tenant] = await asyncio.to_thread(self._open_store, place)
        return self._stores[tenant]

    @staticmethod
    def _open_store(place: Path) -> ModuleStore:
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return ModuleStore(place)

    def _in_use(self) -> set[str]:
        return {layer.parent.name for rootfs in self._pool.rootfs_in_use() for layer in rootfs.layers}

    def sweep(self) -> None:
        """Remove modules that nobody used for long; blocks, for a thread."""
        keep = self._in_use()
        if self._engine is not None:
            keep.add(self._engine[1].parent.name)
        for place in self._places():
            store = ModuleStore(place)
            store.remove_unused(keep, _KEPT_S)
            store.remove_set_aside(keep)
        if (self._settings.cache_dir / "wasm").is_dir():
            LayerStore(self._settings.cache_dir / "wasm").remove_unused(keep, _KEPT_S)


def engine_key() -> str:
    """What compiled code depends on beside the module: wasmtime's version, our settings, the processor's abilities."""
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as info:
        able = next((line for line in info if line.startswith(("flags", "Features"))), "")
    facts = (FORMAT, importlib.metadata.version("wasmtime"), platform.machine(), sorted(able.split()))
    return hashlib.sha256(msgspec.msgpack.encode(facts)).hexdigest()[:16]


def _form(data: bytes) -> bool:
    """Whether it is a component. Raises ModuleRefused for what is neither that nor a module."""
    if data[:8] not in {MODULE_FORM, COMPONENT_FORM}:
        raise ModuleRefused(
            "the file is no WebAssembly module or component",
            why="it is in the text format" if data.lstrip()[:1] == b"(" else "its first bytes are others",
            fix="compile it with a WASI toolchain (clang --target=wasm32-wasi, cargo build --target wasm32-wasip1)",
        )
    return data[:8] == COMPONENT_FORM


def _used(layer: Path) -> bool:
    """Note that a layer is used now, to the hour; whether it is there."""
    try:
        if time.time() - layer.parent.stat().st_mtime > _NOTED_EVERY_S:
            os.utime(layer.parent)
    except FileNotFoundError:
        return False
    return True


def _read(path: Path) -> bytes:
    if path.stat().st_size > MOST_MODULE_BYTES:
        raise ModuleRefused(f"the module is larger than {MOST_MODULE_BYTES >> 20} MiB")
    return path.read_bytes()


def _verify(store: LayerStore, name: str, tree: Path) -> None:
    """Look once at each start of the daemon whether a module's code is what was compiled. Raises ModuleNotFound."""
    facts = store.manifest(name)
    with (tree / HOME.lstrip("/") / str(facts["code"])).open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() == facts["sha256"]:
            return
    _log.error("module_damaged", name=name)
    store.remove_unused(set(store.names()) - {name}, 0.0)
    raise ModuleNotFound("the compiled module was damaged on disk and is removed", fix="send the module again")
