"""The API's operations on failed runs, as data; see `calls`."""

from __future__ import annotations

import builtins
from collections.abc import Callable
from typing import Any, TypeVar, cast

import msgspec

from tartarus.model.lamentations import Lamentation, LamentationFilter, Purged
from tartarus.model.sandbox import SandboxRecord
from tartarus.sdk.http import Call, target

T = TypeVar("T")


def _reads(kind: type[T]) -> Callable[[bytes], T]:
    return cast("Callable[[bytes], T]", msgspec.json.Decoder(cast("Any", kind)).decode)


def lamentations(wanted: LamentationFilter) -> Call[builtins.list[Lamentation]]:
    """Those that fit."""
    where = target(
        "lamentations", sandbox=wanted.sandbox_id, category=None if wanted.category is None else wanted.category.value,
        since=wanted.since, until=wanted.until, dead_letters="true" if wanted.dead_letters else None,
        limit=wanted.limit,
    )  # fmt: skip
    return Call("GET", where, _reads(list[Lamentation]))


def lamentation(lament_id: str) -> Call[Lamentation]:
    """One of them."""
    return Call("GET", target("lamentations", lament_id), _reads(Lamentation))


def retry(lament_id: str) -> Call[SandboxRecord]:
    """Try a dead letter again."""
    return Call("POST", target("lamentations", lament_id, "retry"), _reads(SandboxRecord))


def purge(older_than_s: float) -> Call[Purged]:
    """Forget the older ones."""
    return Call("DELETE", target("lamentations", older_than_s=older_than_s), _reads(Purged))
