"""Patterns of rules, compiled once: globs over paths, words of commands, plain values.

Path globs are wcmatch's (well kept; knows ``**`` and exclusion), translated to one regular expression for each value.
What makes a decision stricter compares paths without regard to case: a file system may not regard it either.
"""

from __future__ import annotations

import fnmatch
import posixpath
import re
from collections.abc import Callable, Sequence

from wcmatch import glob

from tartarus.model.errors import InvalidRequest

_FLAGS = glob.GLOBSTAR | glob.DOTMATCH | glob.FORCEUNIX
_MAX_PATTERN = 4096
SYSTEM_DIRECTORIES = frozenset({"/bin", "/sbin", "/usr/bin", "/usr/sbin", "/usr/local/bin", "/usr/local/sbin"})
"""A command's bare name in a rule means the program of that name here, and nowhere else."""

Test = Callable[[str], bool]


def values(patterns: Sequence[str]) -> Test:
    """Whether a plain value is one of these, where ``*`` and ``?`` stand for any characters and one."""
    exact = frozenset(pattern for pattern in patterns if not _has_magic(pattern))
    globs = [re.compile(fnmatch.translate(pattern)).match for pattern in patterns if _has_magic(pattern)]
    if not globs:
        return exact.__contains__
    return lambda value: value in exact or any(match(value) for match in globs)


def paths(patterns: Sequence[str], *, strict: bool) -> Test:
    """Whether a canonical path is one of these; one that begins with ``!`` takes paths away again.

    `strict`: a match makes the decision stricter, so that case does not count. ``a/**`` is also ``a`` itself.
    """
    included = [pattern for pattern in patterns if not pattern.startswith("!")]
    excluded = [pattern[1:] for pattern in patterns if pattern.startswith("!")]
    inside = _one_of(included, fold=strict)
    outside = _one_of(excluded, fold=not strict)
    if not excluded:
        return inside
    return lambda path: inside(path) and not outside(path)


def _one_of(patterns: Sequence[str], *, fold: bool) -> Test:
    if not patterns:
        return lambda _path: False
    for pattern in patterns:
        if not pattern or len(pattern) > _MAX_PATTERN or "\0" in pattern:
            raise InvalidRequest("not a pattern of paths", fix="write it like src/** or *.py")
        if ".." in pattern.split("/"):
            raise InvalidRequest(f"{pattern!r} matches nothing", why="no canonical path has .. in it")
    flags = _FLAGS | (glob.IGNORECASE if fold else glob.CASE)
    plain = [pattern.rstrip("/") or "/" for pattern in patterns]
    # `a/**` stands for zero parts too.
    spelled = [*plain, *(pattern.removesuffix("/**") for pattern in plain if pattern.endswith("/**"))]
    expressions, _ = glob.translate(spelled, flags=flags, limit=0)
    match = re.compile("|".join(expressions)).match
    return lambda path: match(path) is not None


def command(patterns: Sequence[Sequence[str]]) -> Callable[[Sequence[str], str], bool]:
    """Whether a command is one of these. A pattern is words; the last one may be ``**`` for any further words.

    The first word is a program: its absolute path, or a bare name for the one in a system directory. What counts is
    the file that runs, not what the caller called it.
    """
    compiled = [(_program(words[0]), tuple(words[1:])) for words in patterns if words]

    def test(argv: Sequence[str], executable: str) -> bool:
        if not argv or not executable:
            return False
        return any(program(executable) and _fits(words, argv[1:]) for program, words in compiled)

    return test


def _program(pattern: str) -> Test:
    matches = values([pattern])
    if "/" in pattern:
        return matches

    def test(executable: str) -> bool:
        directory, name = posixpath.split(executable)
        return directory in SYSTEM_DIRECTORIES and matches(name)

    return test


def _fits(wanted: Sequence[str], given: Sequence[str]) -> bool:
    if wanted and wanted[-1] == "**":
        wanted = wanted[:-1]
        given = given[: len(wanted)]
    return len(given) == len(wanted) and all(map(fnmatch.fnmatchcase, given, wanted))


def _has_magic(pattern: str) -> bool:
    return any(character in pattern for character in "*?[")
