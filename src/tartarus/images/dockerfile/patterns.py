"""Names and patterns: Go's `filepath.Match`, which COPY uses, and `.dockerignore`, which adds ``**`` and ``!``.

Patterns come with the build context and are as hostile as it. One component is matched by a regular expression of
atomic groups, so that no choice is ever taken back, and ``**`` by remembering one place to go on from: both are at
worst quadratic.
"""

from __future__ import annotations

import functools
import posixpath
import re
from collections.abc import Sequence
from typing import Final, NamedTuple

from tartarus.images.dockerfile.limits import MAX_IGNORE_BYTES, MAX_IGNORE_PATTERNS
from tartarus.model.errors import InvalidRequest

_META: Final = re.compile(r"[*?\[]")
_TOKEN: Final = re.compile(r"\\.|\*\*/?|.", re.DOTALL)
_LONGEST: Final = 1_024
_MOST_ALTERNATIVES: Final = 32


def has_wildcards(name: str) -> bool:
    """Whether `name` is a pattern and no plain name."""
    return _META.search(name.replace("\\\\", "").replace("\\*", "").replace("\\?", "").replace("\\[", "")) is not None


@functools.lru_cache(maxsize=4_096)
def component(pattern: str) -> re.Pattern[str]:
    """One path component's pattern. Raises InvalidRequest when Go's `filepath.Match` would call it bad."""
    if len(pattern) > _LONGEST:
        raise InvalidRequest("a pattern is too long", why=f"{len(pattern)} characters, at most {_LONGEST}")
    # Runs of what is no star, each to be found as early as can be after the one before it.
    runs: list[list[str]] = [[]]
    position = 0
    while position < len(pattern):
        char = pattern[position]
        if char == "*":
            runs.append([])
            position += 1
        elif char == "?":
            runs[-1].append(r"[^/]")
            position += 1
        elif char == "[":
            text, position = _bracket(pattern, position)
            runs[-1].append(text)
        elif char == "\\":
            if position + 1 == len(pattern):
                raise InvalidRequest(f"bad pattern {pattern!r}", why="nothing follows its last backslash")
            runs[-1].append(re.escape(pattern[position + 1]))
            position += 2
        else:
            runs[-1].append(re.escape(char))
            position += 1
    texts = ["".join(run) for run in runs]
    middle = "".join(f"(?>[^/]*?{text})" for text in texts[1:-1] if text)
    # Only the last star may take a choice back, since what follows it has to stand at the end.
    end = "" if len(texts) == 1 else f"[^/]*{texts[-1]}"
    return re.compile(f"(?s:{texts[0]}{middle}{end})")


def _bracket(pattern: str, start: int) -> tuple[str, int]:
    position = start + 1
    negated = pattern[position : position + 1] == "^"
    position += negated
    ranges: list[str] = []
    while True:
        if position >= len(pattern):
            raise InvalidRequest(f"bad pattern {pattern!r}", why="a '[' is never closed")
        if pattern[position] == "]" and ranges:
            break
        low, position = _bracket_char(pattern, position)
        high = low
        if pattern[position : position + 1] == "-":
            high, position = _bracket_char(pattern, position + 1)
        if low <= high:
            ranges.append(f"{re.escape(low)}-{re.escape(high)}")
        else:
            ranges.append("")  # an empty range, that nothing is in
    inside = "".join(ranges)
    if not inside:
        return (r"[^/]" if negated else r"(?!)"), position + 1
    return (f"[^/{inside}]" if negated else f"(?!/)[{inside}]"), position + 1


def _bracket_char(pattern: str, position: int) -> tuple[str, int]:
    char = pattern[position : position + 1]
    if char == "\\":
        position += 1
        char = pattern[position : position + 1]
    elif char in {"-", "]"}:
        raise InvalidRequest(f"bad pattern {pattern!r}", why=f"'{char}' needs a backslash there")
    if not char:
        raise InvalidRequest(f"bad pattern {pattern!r}", why="a '[' is never closed")
    return char, position + 1


class _Alternative(NamedTuple):
    """A pattern cut into components; None stands for ``**``: any number of them, none included."""

    parts: tuple[re.Pattern[str] | None, ...]
    fixed: bool

    def matches(self, path: Sequence[str]) -> bool:
        if self.fixed:
            return len(path) == len(self.parts) and all(
                part is not None and part.fullmatch(name) for part, name in zip(self.parts, path, strict=True)
            )
        at = here = 0
        star, resume = -1, 0
        while here < len(path):
            part = self.parts[at] if at < len(self.parts) else None
            if at < len(self.parts) and part is None:
                star, resume = at, here
                at += 1
            elif part is not None and part.fullmatch(path[here]):
                at += 1
                here += 1
            elif star >= 0:
                resume += 1
                at, here = star + 1, resume
            else:
                return False
        return all(part is None for part in self.parts[at:])


class _Rule(NamedTuple):
    alternatives: tuple[_Alternative, ...]
    keeps: bool

    def matches(self, path: Sequence[str]) -> bool:
        return any(alternative.matches(path) for alternative in self.alternatives)


class Ignore:
    """The rules of a `.dockerignore`: the last one that matches a path, or a directory above it, decides."""

    def __init__(self, text: str = "") -> None:
        """Read the file's content. Raises InvalidRequest for a bad pattern, with its line."""
        if len(text) > MAX_IGNORE_BYTES:
            raise InvalidRequest(".dockerignore is too long", why=f"at most {MAX_IGNORE_BYTES} characters are read")
        self._rules: list[_Rule] = []
        spellings = 0
        for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), 1):
            if line.startswith("#") or not line.strip():
                continue
            try:
                rule = _rule(line.strip())
            except InvalidRequest as error:
                raise InvalidRequest(f".dockerignore line {number}: {error.what}", why=error.why) from error
            if rule is not None:
                self._rules.append(rule)
                spellings += len(rule.alternatives)
            if spellings > MAX_IGNORE_PATTERNS:
                raise InvalidRequest(".dockerignore has too many patterns", why=f"at most {MAX_IGNORE_PATTERNS}")
        self.keeps_some = any(rule.keeps for rule in self._rules)
        """Whether something below an ignored directory may be kept."""
        self.top: tuple[bool, ...] = (False,) * len(self._rules)
        """What `check` takes as the state of the parent for names at the top of the context."""

    def check(
        self, path: Sequence[str], above: tuple[bool, ...], *, leaf: bool = False
    ) -> tuple[bool, tuple[bool, ...]]:
        """(whether `path` is ignored, the state to pass for what is below it).

        `path` in components; `above`: the state of its parent directory; `leaf`: nothing is below it.
        """
        if not self._rules:
            return False, above
        ignored = False
        state = list(above)
        for index, rule in enumerate(self._rules):
            if not state[index]:
                # A rule that could not change the answer is not tried where nobody needs its state.
                if leaf and rule.keeps != ignored:
                    continue
                state[index] = rule.matches(path)
            if state[index]:
                ignored = not rule.keeps
        return ignored, tuple(state)

    def ignores(self, path: str) -> bool:
        """Whether the relative path is ignored."""
        state = self.top
        ignored = False
        parts = [part for part in path.split("/") if part]
        for depth in range(1, len(parts) + 1):
            ignored, state = self.check(parts[:depth], state)
        return ignored


def _rule(text: str) -> _Rule | None:
    keeps = text.startswith("!")
    text = text[1:].strip() if keeps else text
    if not text:
        raise InvalidRequest("'!' needs a pattern")
    text = posixpath.normpath(text).lstrip("/")
    if text in {"", "."}:
        # Docker's: the context itself can't be left out.
        return None
    if text == ".." or text.startswith("../"):
        return None  # nothing of the context is there
    return _Rule(tuple(_alternative(each) for each in _spellings(text)), keeps)


def _spellings(text: str) -> list[str]:
    """The pattern in whole components, of which a NUL is ``**``: ``a**b`` is spelled ``ab`` and ``a*/**/b``."""
    if "\0" in text:
        raise InvalidRequest("a NUL character in a pattern")
    marked = ""
    for token in _TOKEN.findall(text):
        if not token.startswith("**"):
            marked += token
        elif not marked or marked.endswith("/"):
            marked += token.replace("**", "\0")
        else:
            # Docker takes a slash behind "**" for a part of it.
            marked += "\0"
    spelled = [""]
    for number, part in enumerate(marked.split("/")):
        spelled = [before + ("/" if number else "") + each for before in spelled for each in _choices(part)]
        if len(spelled) > _MOST_ALTERNATIVES:
            raise InvalidRequest("a pattern has too many '**'", why=f"in {text[:60]!r}")
    return spelled


def _choices(part: str) -> list[str]:
    if not part.strip("\0"):
        return [part[:1]]
    first, *pieces = part.split("\0")
    choices = [first]
    for piece in pieces:
        if piece:
            choices = [each for choice in choices for each in (f"{choice}{piece}", f"{choice}*/\0/{piece}")]
        if len(choices) > _MOST_ALTERNATIVES:
            return choices
    # At the end it takes all that is below, which what it stands behind takes with it.
    return choices if pieces[-1:] != [""] else [f"{choice}*" for choice in choices]


def _alternative(text: str) -> _Alternative:
    parts: list[re.Pattern[str] | None] = []
    for name in text.split("/"):
        if name != "\0":
            parts.append(component(name))
        elif not parts or parts[-1] is not None:
            parts.append(None)
    if parts[-1] is None:
        # "a/**" is what is below a, not a itself.
        parts[-1:] = [None, component("*")]
    return _Alternative(tuple(parts), all(part is not None for part in parts))
