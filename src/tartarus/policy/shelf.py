"""The index of rules by path: few of them are tried for an act, and none is left out that could match.

A pattern has parts that its paths must have somewhere: ``**/secrets/**`` one that is ``secrets``, ``**/id_*`` one that
begins with ``id_``, ``src/*.py`` both ``src`` and one that ends in ``.py``. Its rule waits under the one of these that
the fewest others wait under. Case is folded as the patterns' regular expressions fold it, for ASCII; a part with
anything else in it is no key, and a pattern without a key is tried for every path.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Generic, Literal, NamedTuple, TypeVar

T = TypeVar("T")
_LONGEST = 8
_MAGIC = "*?[\\"
# What else than itself an ASCII letter matches where case does not count; a test tries all characters there are.
_ALIKE = str.maketrans({"\u0130": "i", "\u0131": "i", "\u017f": "s", "\u212a": "k"})


class Key(NamedTuple):
    """What some part of a path must be, begin with, or end with."""

    kind: Literal["is", "begins", "ends"]
    text: str


class Shelf(Generic[T]):
    """Things, each with patterns of which a path must match one."""

    def __init__(self) -> None:
        self._any: list[T] = []
        self._under: dict[Key, list[T]] = defaultdict(list)
        self._beginnings: set[int] = set()
        self._endings: set[int] = set()

    def put(self, thing: T, patterns: Iterable[str] | None) -> None:
        """Add one. None: it is not about paths; patterns that begin with ``!`` only take away."""
        wanted = [pattern for pattern in patterns or () if not pattern.startswith("!")]
        places = [min(keys(pattern), key=self._crowd, default=None) for pattern in wanted]
        if not places or None in places:
            self._any.append(thing)
            return
        for key in {place for place in places if place is not None}:
            self._under[key].append(thing)
            if key.kind != "is":
                (self._beginnings if key.kind == "begins" else self._endings).add(len(key.text))

    def fitting(self, path: str | None) -> Iterator[T]:
        """Every one that may be about this path, once."""
        yield from self._any
        if path is None or not self._under:
            return
        seen: set[int] = set()
        for key in self._keys_of(path):
            for thing in self._under.get(key, ()):
                if id(thing) not in seen:
                    seen.add(id(thing))
                    yield thing

    def _keys_of(self, path: str) -> Iterator[Key]:
        for part in set(folded(path).split("/")):
            yield Key("is", part)
            for length in self._beginnings:
                yield Key("begins", part[:length])
            for length in self._endings:
                yield Key("ends", part[-length:])

    def _crowd(self, key: Key) -> int:
        return len(self._under.get(key, ()))


def folded(path: str) -> str:
    """The path with its ASCII letters, and those that match them, in lower case."""
    return path.translate(_ALIKE).lower() if not path.isascii() else path.lower()


def keys(pattern: str) -> Iterator[Key]:
    """What a path of this pattern must have among its parts; each of these alone is enough to find it by."""
    for part in pattern.split("/"):
        if not part.isascii() or not part or part == "**":
            continue
        low = part.lower()
        magic = [at for at, character in enumerate(low) if character in _MAGIC]
        if not magic:
            yield Key("is", low)
            continue
        if head := low[: magic[0]][:_LONGEST]:
            yield Key("begins", head)
        # In a set or after a backslash the last characters may not stand for themselves.
        if "[" not in low and "\\" not in low and (tail := low[magic[-1] + 1 :][-_LONGEST:]):
            yield Key("ends", tail)
