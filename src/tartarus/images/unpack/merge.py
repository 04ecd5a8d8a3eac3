"""Stacks of more layers than overlayfs takes: runs of layers become one each."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from tartarus.images.store import LayerStore
from tartarus.images.unpack.jailed import JailPlace, count_of, run_jailed
from tartarus.images.unpack.layers import own
from tartarus.images.unpack.limits import Limits
from tartarus.model.errors import TemplateFailed

MAX_STACK = 48
"""Most layers of one overlay: the kernel takes 500, but their paths must fit in mount(2)'s page of options."""
_RUN = 16
_FORMAT = 1
_OPAQUE = "user.overlay.opaque"


def cut_opaque(layers: Sequence[Path]) -> list[Path]:
    """The layers (top first) that count: overlayfs does not ask whether a layer's root hides what is below it."""
    kept: list[Path] = []
    for layer in layers:
        kept.append(layer)
        try:
            if os.getxattr(layer, _OPAQUE) == b"y":
                break
        except OSError:
            continue
    return kept


async def merge_layers(
    store: LayerStore, layers: Sequence[Path], uid_base: int | None, limits: Limits | None = None
) -> list[Path]:
    """A stack of at most `MAX_STACK` directories that shows what `layers` (top first) would show.

    `layers` are directories of `store`. Runs are counted from the bottom, so that a layer added on top leaves the
    merged ones as they are. Files are shared by hard links. Raises as `unpack_layer`.
    """
    stack = cut_opaque(layers)
    while len(stack) > MAX_STACK:
        stack = await _merge_runs(store, stack, uid_base, limits or Limits())
    return stack


async def _merge_runs(store: LayerStore, stack: list[Path], uid_base: int | None, limits: Limits) -> list[Path]:
    merged: list[Path] = []
    while len(stack) + len(merged) > MAX_STACK and len(stack) > 1:
        run, stack = stack[-_RUN:], stack[:-_RUN]
        merged.insert(0, await _merge(store, run, merged, uid_base, limits))
    return [*stack, *merged]


async def _merge(store: LayerStore, run: list[Path], beneath: list[Path], uid_base: int | None, limits: Limits) -> Path:
    """One layer that shows, on top of `beneath`, what `run` shows there."""
    names = [layer.parent.name for layer in (*run, *beneath)]
    digest = hashlib.sha256(f"{_FORMAT} {len(run)} {' '.join(names)}".encode()).hexdigest()

    async def build(tree: Path, lock: int) -> dict[str, object]:
        own(tree, uid_base)
        root = tree.parent.parent
        if any(layer != root / layer.parent.name / "tree" for layer in (*run, *beneath)):
            raise TemplateFailed("can't merge layers", why=f"some are not in the layer store {root}")
        # One place for all: hard links can't cross from one mount to another.
        facts = await run_jailed(
            "merge",
            "a run of layers",
            [JailPlace(str(root), "/store", link=True)],
            uid_base,
            limits,
            lock=lock,
            layers=[f"/store/{name}/tree" for name in names[: len(run)]],
            beneath=[f"/store/{name}/tree" for name in names[len(run) :]],
            into=f"/store/{tree.parent.name}/tree",
        )
        return {"merged": names[: len(run)], **{name: count_of(facts, name) for name in ("entries", "bytes")}}

    return await store.get(f"merged-{digest[:32]}-{'own' if uid_base is None else uid_base}", build)
