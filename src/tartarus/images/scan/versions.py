"""Which of two versions is newer, by the rules of where they come from.

PyPI's are packaging's to compare. The others are small and settled specifications, for which no maintained library
without a tail of its own exists; the tests hold Debian's against dpkg itself. A version that no rule can read is
`Incomparable`, and whoever asks has to say so: a scan never takes it for a safe one.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

# The reference implementation of PEP 440.
from packaging.version import InvalidVersion, Version

from tartarus.images.sbom.nouns import Kind

_MAX = 256


class Incomparable(ValueError):
    """Not a version by the rules of its ecosystem."""


def sort_key(kind: Kind | str) -> Callable[[str], Any]:
    """What turns versions of a package of `kind` (or of ``semver``) into keys that compare as they do.

    The function raises Incomparable for what is no version, and for kinds whose versions nobody here can compare.
    """
    if kind not in _KEYS:
        raise Incomparable(f"versions of {kind} can't be compared")
    key = _KEYS[kind]

    def guarded(version: str) -> Any:
        if not 0 < len(version) <= _MAX or not version.isascii() or not version.isprintable():
            raise Incomparable(f"{version[:40]!r} is no version")
        return key(version)

    return guarded


def _pypi(version: str) -> Version:
    try:
        return Version(version)
    except InvalidVersion as error:
        raise Incomparable(str(error)) from error


_SEMVER = re.compile(
    r"[v=]*(\d+)(?:\.(\d+))?(?:\.(\d+))?(?:-([0-9A-Za-z-]+(?:\.[0-9A-Za-z-]+)*))?(?:\+[0-9A-Za-z.-]*)?"
)


def _semver(version: str) -> tuple[Any, ...]:
    """Precedence of semver.org 2.0.0, section 11; as npm does, without minor or patch they are 0."""
    match = _SEMVER.fullmatch(version)
    if match is None:
        raise Incomparable(f"{version!r} is not semantic versioning")
    core = tuple(int(number or 0) for number in match.groups()[:3])
    if match[4] is None:
        return (*core, 1, ())
    words = tuple((0, int(word), "") if word.isdigit() else (1, 0, word) for word in match[4].split("."))
    return (*core, 0, words)


def _cran(version: str) -> tuple[int, ...]:
    """R's package_version(): numbers with dots or dashes between them."""
    if not re.fullmatch(r"\d+(?:[.-]\d+)*", version):
        raise Incomparable(f"{version!r} is no version of R's")
    return tuple(int(number) for number in re.split(r"[.-]", version))


_DEB = re.compile(r"(?:(\d+):)?([A-Za-z0-9][A-Za-z0-9.+~:-]*?)(?:-([A-Za-z0-9+.~]+))?")


def _deb(version: str) -> tuple[Any, ...]:
    """deb-version(7): an epoch, an upstream version, and a revision after the last dash."""
    match = _DEB.fullmatch(version)
    if match is None:
        raise Incomparable(f"{version!r} is no version of Debian's")
    # deb-version(7): without a revision it is as if it were 0, which is how an empty one compares, too.
    return (int(match[1] or 0), _deb_part(match[2]), _deb_part(match[3] or ""))


def _deb_part(part: str) -> tuple[Any, ...]:
    """Texts and numbers by turns, each text as the ranks of its characters and of its end."""
    pieces: list[Any] = [
        int(piece) if position % 2 else (*map(_deb_rank, piece), 0)
        for position, piece in enumerate(re.split(r"(\d+)", part))
    ]
    if pieces[-2:] == [0, (0,)]:
        del pieces[-2:]
    # A missing number counts as 0 and a missing text as empty, so both ends have one of each to compare.
    return (*pieces, 0, (0,))


def _deb_rank(character: str) -> int:
    # A tilde sorts before the end (0), letters before everything else.
    return -1 if character == "~" else ord(character) + (0 if character.isalpha() else 256)


_APK = re.compile(
    r"(?P<first>\d+)(?P<more>(?:\.\d+)*)(?P<letter>[a-z]?)"
    r"(?P<suffixes>(?:_(?:alpha|beta|pre|rc|cvs|svn|git|hg|p)\d*)*)(?:~[0-9a-f]+)?(?:-r(?P<revision>\d+))?"
)
_APK_BEFORE, _APK_AFTER = ("alpha", "beta", "pre", "rc"), ("cvs", "svn", "git", "hg", "p")
# What a part is ranks before what it says: 1.0_rc1 < 1.0 < 1.0-r1 < 1.0_p1 < 1.0a < 1.0.1.
_APK_PRE, _APK_END, _APK_REVISION, _APK_NUMBER, _APK_POST, _APK_LETTER, _APK_DIGITS = range(7)


def _apk(version: str) -> Any:
    """Alpine's package policies: digits{.digits}{letter}{_suffix{number}}{~hash}{-r#}."""
    match = _APK.fullmatch(version)
    if match is None:
        raise Incomparable(f"{version!r} is no version of Alpine's")
    parts: list[tuple[int, Any]] = [(_APK_DIGITS, int(match["first"]))]
    parts += [(_APK_DIGITS, digits) for digits in match["more"].split(".")[1:]]
    if match["letter"]:
        parts.append((_APK_LETTER, match["letter"]))
    for name, number in re.findall(r"_([a-z]+)(\d*)", match["suffixes"]):
        before = name in _APK_BEFORE
        parts.append((_APK_PRE, _APK_BEFORE.index(name)) if before else (_APK_POST, _APK_AFTER.index(name)))
        if number:
            parts.append((_APK_NUMBER, int(number)))
    if match["revision"]:
        parts.append((_APK_REVISION, int(match["revision"])))
    return _apk_ordered([*parts, (_APK_END, 0)])


def _apk_compare(left: list[tuple[int, Any]], right: list[tuple[int, Any]]) -> int:
    for (kind, value), (other_kind, other) in zip(left, right, strict=False):
        if kind != other_kind:
            return kind - other_kind
        if isinstance(value, str) and kind == _APK_DIGITS and not (value.startswith("0") or other.startswith("0")):
            value, other = int(value), int(other)  # noqa: PLW2901 - a leading zero makes it a fraction: text
        if value != other:
            return -1 if value < other else 1
    return 0


_apk_ordered = functools.cmp_to_key(_apk_compare)

_RPM = re.compile(r"(?:(\d+):)?([A-Za-z0-9._+~^]+)(?:-([A-Za-z0-9._+~^]+))?")
_RPM_PIECE = re.compile(r"~|\^|\d+|[A-Za-z]+")
# What comes at a place ranks before what it says; the end of a version is between "~" and everything else.
_RPM_TILDE, _RPM_END, _RPM_CARET, _RPM_LETTERS, _RPM_DIGITS = range(5)


def _rpm(version: str) -> tuple[Any, ...]:
    """rpm-version(7): an epoch, a version and a release; pieces of digits or letters, what is between is nothing."""
    match = _RPM.fullmatch(version)
    if match is None:
        raise Incomparable(f"{version!r} is no version of rpm's")
    return (int(match[1] or 0), _rpm_part(match[2]), _rpm_part(match[3] or ""))


def _rpm_part(part: str) -> tuple[Any, ...]:
    pieces: list[tuple[int, Any]] = []
    for piece in _RPM_PIECE.findall(part):
        if piece in "~^":
            pieces.append((_RPM_TILDE if piece == "~" else _RPM_CARET, 0))
        else:
            pieces.append((_RPM_DIGITS, int(piece)) if piece.isdigit() else (_RPM_LETTERS, piece))
    return (*pieces, (_RPM_END, 0))


_KEYS: dict[str, Callable[[str], Any]] = {
    "pypi": _pypi, "npm": _semver, "semver": _semver, "cran": _cran, "deb": _deb, "apk": _apk,
    "rpm": _rpm,
}  # fmt: skip
