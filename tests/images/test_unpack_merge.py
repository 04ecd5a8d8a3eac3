"""Runs of layers as one: what overlayfs shows of the one is what it shows of the many."""

from __future__ import annotations

import os
import random
import stat
from pathlib import Path
from typing import Any

import pytest
from tests.escape.images.archives import END, blob, directory, file
from tests.escape.images.ground import SMALL, UID_BASE, Ground, kinds
from tests.images.overlays import views

from tartarus.images.store import LayerStore
from tartarus.images.unpack.limits import Limits
from tartarus.images.unpack.merge import MAX_STACK, _merge, cut_opaque, merge_layers
from tartarus.model.errors import ImageRefused, TemplateFailed

pytestmark = [pytest.mark.anyio, pytest.mark.needs("user-namespaces", "root")]

_NAMES = ("a", "b", "c")
_SEEDS = 12


def fill(folder: Path, chance: random.Random, depth: int = 0) -> None:
    """Put a few random things into a layer's directory, as unpacking leaves them."""
    assert UID_BASE is not None
    for name in _NAMES:
        path = folder / name
        kind = chance.choice(
            ["nothing", "file", "file", "link", "directory", "directory", "whiteout", "opaque", "pipe"]
        )
        if kind == "file":
            path.write_text(str(chance.random()))
            path.chmod(chance.choice([0o644, 0o600, 0o4755]))
        elif kind == "link":
            path.symlink_to(chance.choice(_NAMES))
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "whiteout":
            os.mknod(path, stat.S_IFCHR, 0)
        elif kind in {"directory", "opaque"}:
            path.mkdir(chance.choice([0o755, 0o700, 0o1777]))
            if kind == "opaque":
                os.setxattr(path, "user.overlay.opaque", b"y")
            if chance.random() < 0.5:
                os.setxattr(path, "user.mark", str(chance.random()).encode())
            if depth < 2:
                fill(path, chance, depth + 1)
        if kind not in {"nothing", "whiteout"}:
            os.chown(path, UID_BASE + chance.randrange(3), UID_BASE, follow_symlinks=False)


async def add(store: LayerStore, name: str, seed: int) -> Path:
    async def build(tree: Path, _lock: int) -> dict[str, Any]:
        assert UID_BASE is not None
        os.chown(tree, UID_BASE, UID_BASE)
        fill(tree, random.Random(seed))
        return {}

    return await store.get(name, build)


async def test_a_merged_run_shows_what_the_layers_show(tmp_path: Path) -> None:
    store = LayerStore(tmp_path / "store")
    stacks: list[list[Path]] = []
    for seed in range(_SEEDS):
        layers = [await add(store, f"layer-{seed}-{number}", 100 * seed + number) for number in range(6)]
        # A run in the middle: what it deletes must still be deleted below it.
        merged = await _merge(store, layers[1:4], layers[4:], UID_BASE, Limits())
        lowest = await _merge(store, layers[3:], [], UID_BASE, Limits())
        stacks += [layers, [layers[0], merged, *layers[4:]], [*layers[:3], lowest]]
    shown = views(tmp_path, stacks)
    for seed in range(_SEEDS):
        assert shown[3 * seed] == shown[3 * seed + 1], f"seed {seed}, a run in the middle"
        assert shown[3 * seed] == shown[3 * seed + 2], f"seed {seed}, the lowest run"
    assert sum(len(view) for view in shown) > 10 * _SEEDS


async def test_deletions_that_delete_nothing_are_dropped(tmp_path: Path) -> None:
    ground = Ground(tmp_path)
    base = await ground.unpack(blob(file(b"base/a") + file(b"base/b") + END))
    made = await ground.unpack(blob(file(b"new/a") + file(b"new/b") + END))
    gone = await ground.unpack(blob(file(b"new/.wh.a") + file(b"base/.wh.a") + file(b".wh.never") + END))
    merged = await _merge(ground.store, [gone, made], [base], UID_BASE, SMALL)
    # Overlayfs would list new/a, though nothing were there: no other layer has that directory.
    assert kinds(merged) == {"new": "d", "new/b": "f", "base": "d", "base/a": "w"}
    lowest = await _merge(ground.store, [gone, made, base], [], UID_BASE, SMALL)
    assert kinds(lowest) == {"new": "d", "new/b": "f", "base": "d", "base/b": "f"}


async def test_an_image_of_128_layers(tmp_path: Path) -> None:
    store = LayerStore(tmp_path / "store")

    async def build(tree: Path, _lock: int) -> dict[str, Any]:
        assert UID_BASE is not None
        number = int(tree.parent.name.rpartition("-")[2])
        (tree / "d").mkdir()
        (tree / "d" / f"f{number}").write_text(str(number))
        (tree / "d" / "last").write_text(str(number))
        if number % 3 == 0 and number:
            os.mknod(tree / "d" / f"f{number - 1}", stat.S_IFCHR, 0)
        for path in (tree, *tree.rglob("*")):
            os.chown(path, UID_BASE, UID_BASE, follow_symlinks=False)
        return {}

    layers = [await store.get(f"layer-{number}", build) for number in reversed(range(128))]
    stack = await merge_layers(store, layers, UID_BASE)
    assert len(stack) <= MAX_STACK
    (view,) = views(tmp_path, [stack])
    assert {path for path in view if path.startswith("d/f")} == {
        f"d/f{number}" for number in range(128) if (number + 1) % 3 or number == 127
    }
    # A layer on top finds the merged ones as they are; files are shared, not copied.
    again = await merge_layers(store, [await store.get("layer-128", build), *layers], UID_BASE)
    assert again[-5:] == stack[-5:]
    assert (layers[-1] / "d" / "f0").stat().st_ino == (stack[-1] / "d" / "f0").stat().st_ino
    manifest = store.manifest(stack[-1].parent.name)
    assert manifest["bytes"] > 0


async def test_a_short_stack_is_left_as_it_is(tmp_path: Path) -> None:
    store = LayerStore(tmp_path / "store")
    layers = [await add(store, f"layer-{number}", number) for number in range(5)]
    assert await merge_layers(store, layers, UID_BASE) == layers


async def test_a_layer_whose_root_is_opaque_hides_all_below(tmp_path: Path) -> None:
    ground = Ground(tmp_path)
    below = await ground.unpack(blob(file(b"old") + END))
    hiding = await ground.unpack(blob(file(b".wh..wh..opq") + file(b"new") + END))
    above = await ground.unpack(blob(directory(b"d") + END))
    assert cut_opaque([above, hiding, below]) == [above, hiding]
    assert await merge_layers(ground.store, [above, hiding, below], UID_BASE) == [above, hiding]


async def test_layers_of_another_store_are_refused(tmp_path: Path) -> None:
    store, other = LayerStore(tmp_path / "store"), LayerStore(tmp_path / "other")
    layers = [await add(other, f"layer-{number}", number) for number in range(MAX_STACK + 1)]
    with pytest.raises(TemplateFailed, match="not in the layer store"):
        await merge_layers(store, layers, UID_BASE)


async def test_the_limits_hold_for_the_sum(tmp_path: Path) -> None:
    store = LayerStore(tmp_path / "store")
    layers = [await add(store, f"layer-{number}", number) for number in range(3)]
    assert sum(len(kinds(layer)) for layer in layers) > 5
    with pytest.raises(ImageRefused, match="too many entries"):
        await _merge(store, layers, [], UID_BASE, Limits(entries=2))
