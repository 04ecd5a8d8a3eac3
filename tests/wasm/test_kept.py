"""Modules that are kept: what a tenant sees of them, how they go, and what a hostile tenant can't do with that."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.node.conftest import TENANT, finish

from tartarus.model.errors import InvalidRequest, ModuleNotFound, NoSpace
from tartarus.model.sandbox import ExecSpec, SandboxSpec, Wasm
from tartarus.node import modulestore
from tartarus.node.service import Node

from . import modules
from .conftest import add

pytestmark = [pytest.mark.anyio, pytest.mark.needs("root")]
OTHER = "uid-4242"


@pytest.fixture(autouse=True)
async def none_kept(node: Node) -> None:
    for tenant in (TENANT, OTHER):
        for kept in await node.modules.list(tenant):
            await node.modules.remove(tenant, kept.digest)


def on_disk(state_dir: Path, tenant: str = TENANT) -> list[str]:
    place = state_dir / "cache" / "tenants" / tenant / "modules"
    return sorted(path.name for path in place.iterdir()) if place.is_dir() else []


async def ran(node: Node, digest: str, **wasm: int) -> bytes:
    spec = SandboxSpec(command=ExecSpec(argv=("prog",)), wasm=Wasm(module=digest, **wasm))
    return (await finish(await node.create(TENANT, spec))).out


async def test_modules_are_listed_with_what_they_take(node: Node) -> None:
    hello, component = await add(node, modules.HELLO), await add(node, modules.SPEAKING)
    listed = {kept.digest: kept for kept in await node.modules.list(TENANT)}
    assert listed.keys() == {hello, component}
    assert (listed[hello].kind, listed[component].kind) == ("module", "component")
    assert listed[hello].size_bytes == len(modules.HELLO)
    assert listed[hello].ready
    before = listed[hello].disk_bytes
    assert before > len(modules.HELLO)
    assert await ran(node, hello, fuel=100_000) == b"hello\n"
    (again,) = [kept for kept in await node.modules.list(TENANT) if kept.digest == hello]
    assert again.disk_bytes > before  # its form with fuel, too
    assert again.size_bytes == len(modules.HELLO)


async def test_a_module_of_another_wasmtime_is_listed_as_not_ready(node: Node, state_dir: Path) -> None:
    hello = await add(node, modules.HELLO)
    (name,) = [name for name in on_disk(state_dir) if hello in name]
    place = state_dir / "cache" / "tenants" / TENANT / "modules"
    (place / name).rename(place / f"module-{'0' * 16}-{'0' * 8}-{hello}")
    (kept,) = await node.modules.list(TENANT)
    assert (kept.digest, kept.ready) == (hello, False)
    await node.modules.remove(TENANT, hello)
    assert on_disk(state_dir) == []


async def test_sandboxes_go_on_without_the_module_that_they_were_made_of(node: Node, state_dir: Path) -> None:
    hello = await add(node, modules.HELLO)
    live = await node.create(TENANT, SandboxSpec(wasm=Wasm(module=hello)))
    await node.modules.remove(TENANT, hello[:8])
    assert await node.modules.list(TENANT) == []
    with pytest.raises(ModuleNotFound):
        await node.modules.find(TENANT, hello)
    with pytest.raises(ModuleNotFound):
        await ran(node, hello)
    for _ in range(2):  # the second by a process that was forked after the removal
        process = await live.exec(ExecSpec(argv=("prog",)))
        assert await process.read() == (1, b"hello\n")
        assert (await process.wait()).code == 7
    assert [name for name in on_disk(state_dir) if hello in name]
    assert await add(node, modules.HELLO) == hello  # anew, beside it
    assert await ran(node, hello) == b"hello\n"
    await node.modules.remove(TENANT, hello)
    await live.kill()
    for _ in range(500):
        await node._reconcile_once()
        if not on_disk(state_dir):
            break
    assert on_disk(state_dir) == []


async def test_what_was_set_aside_is_gone_after_a_start(node: Node, state_dir: Path) -> None:
    hello = await add(node, modules.HELLO)
    await ran(node, hello)
    store = await node.modules._store(TENANT)
    store.set_aside(hello)  # and then the daemon is killed
    assert on_disk(state_dir)
    await node.modules.open()
    assert on_disk(state_dir) == []


async def test_another_tenant_s_modules_are_neither_seen_nor_removed(node: Node) -> None:
    hello = await add(node, modules.HELLO)
    assert await node.modules.list(OTHER) == []
    with pytest.raises(ModuleNotFound):
        await node.modules.remove(OTHER, hello)
    await add(node, modules.HELLO, OTHER)
    await node.modules.remove(OTHER, hello)
    assert [kept.digest for kept in await node.modules.list(TENANT)] == [hello]
    assert await ran(node, hello) == b"hello\n"


async def test_words_that_are_no_module(node: Node) -> None:
    await add(node, modules.HELLO)
    for word in ("", "ab", "../../..", ".making-x", "*", "f" * 63 + "\n", "Z" * 64, "g" * 64):
        with pytest.raises((ModuleNotFound, InvalidRequest)):
            await node.modules.remove(TENANT, word)
    assert len(await node.modules.list(TENANT)) == 1


async def test_a_beginning_that_fits_two(node: Node, state_dir: Path) -> None:
    hello = await add(node, modules.HELLO)
    (name,) = on_disk(state_dir)
    place = state_dir / "cache" / "tenants" / TENANT / "modules"
    twin = hello[:40] + "0" * 24
    (place / name).rename(place / name.replace(hello, twin))
    assert await add(node, modules.HELLO) == hello
    with pytest.raises(InvalidRequest, match="fits several"):
        await node.modules.remove(TENANT, hello[:40])
    await node.modules.remove(TENANT, hello)
    assert [kept.digest for kept in await node.modules.list(TENANT)] == [twin]


async def test_a_tenant_can_not_fill_the_disk_by_using_and_removing(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    hello = await add(node, modules.HELLO)
    live = await node.create(TENANT, SandboxSpec(wasm=Wasm(module=hello)))
    await node.modules.remove(TENANT, hello)
    monkeypatch.setattr(modulestore, "MOST_TENANT_BYTES", 1000)
    with pytest.raises(NoSpace, match="that your sandboxes use"):
        await add(node, modules.CAT)
    await live.kill()


async def test_a_tenant_has_so_many_modules(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modulestore, "MOST_TENANT_MODULES", 1)
    for data in (modules.HELLO, modules.CAT, modules.LOOP):
        newest = await add(node, data)
    assert [kept.digest for kept in await node.modules.list(TENANT)] == [newest]
