"""What must be true of any Dockerfile, any .dockerignore, any archive and any tree of links, whoever made them."""

from __future__ import annotations

import contextlib
import io
import os
import posixpath
import re
import tarfile
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from tartarus.images.dockerfile.archives import unpack
from tartarus.images.dockerfile.context import FileTree, Watch
from tartarus.images.dockerfile.instructions import Dockerfile
from tartarus.images.dockerfile.layer import LayerWriter, Owner
from tartarus.images.dockerfile.limits import CopyLimits
from tartarus.images.dockerfile.parser import parse
from tartarus.images.dockerfile.patterns import Ignore, component
from tartarus.images.dockerfile.planning import make_plan
from tartarus.images.dockerfile.words import Budget, expand, split_words
from tartarus.images.oci import Platform
from tartarus.images.stackview import StackView
from tartarus.model.errors import InvalidRequest

FEW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
MANY = settings(max_examples=400, deadline=None)
CONTAINED = (InvalidRequest, OSError)

WORDS = st.sampled_from(
    ["FROM", "RUN", "COPY", "ADD", "ENV", "ARG", "LABEL", "CMD", "WORKDIR", "SHELL", "HEALTHCHECK", "ONBUILD", "USER",
     "a", "AS", "b", "scratch", "$X", "${X:-y}", "${", "A=1", '"', "'", "\\", "\\\n", "\n", "\n", "<<EOF", "EOF", "[", '["a"]',
     "--from=0", "--chown=1", "--mount=x", "#", "# escape=`\n", "`", "=", " ", "\t", "\r", "\0", "é", "\u2028"]
)  # fmt: skip
TEXTS = st.one_of(st.text(), st.lists(WORDS, max_size=40).map(" ".join), st.lists(WORDS, max_size=40).map("".join))


@MANY
@given(TEXTS)
@example("FROM a\nRUN <<EOF\nEOF")
def test_any_text_is_a_dockerfile_or_refused(text):
    try:
        found = parse(text)
    except InvalidRequest:
        return
    assert isinstance(found, Dockerfile)
    assert parse(text) == found
    numbers = [step.line for stage in found.stages for step in (stage.start, *stage.steps)]
    assert numbers == sorted(numbers)
    assert all(1 <= number <= text.count("\n") + 1 for number in numbers)
    assert all(step.text.isprintable() for stage in found.stages for step in stage.steps)
    with contextlib.suppress(InvalidRequest):
        plan = make_plan(found, "", {}, Platform(), Budget())
        # Only what lies above can be built on.
        for each in plan.stages:
            assert all(
                index < each.stage.index for index in (each.base, *each.origins.values()) if isinstance(index, int)
            )


@MANY
@given(TEXTS, st.dictionaries(st.sampled_from("XYZ"), st.text(), max_size=3))
def test_any_text_expands_or_is_refused(text, variables):
    with contextlib.suppress(InvalidRequest):
        assert isinstance(expand(text, variables), str)
        assert "".join(split_words(text)) == re.sub(r"[ \t\v\f\r\n]", "", text) or set(text) & set("'\"\\")


@MANY
@given(st.text().filter(lambda text: "'" not in text), st.dictionaries(st.sampled_from("XYZ"), st.text()))
def test_quoted_text_stays_as_it_is(text, variables):
    assert expand(f"'{text}'", variables) == text
    assert split_words(f"a '{text}' b") == ["a", f"'{text}'", "b"]
    escaped = "".join(f"\\{char}" for char in text)
    assert expand(escaped, variables) == text
    assert expand("$X", {"X": text}) == text


SMALL = st.text("ab*?[]^-\\", max_size=8)
NAMES = st.text("ab-^]", min_size=1, max_size=6)


def go_match(pattern: str, name: str) -> bool:
    """filepath.Match for one component, slowly and obviously. ValueError for a bad pattern."""
    if not pattern:
        return not name
    char, rest = pattern[0], pattern[1:]
    if char == "*":
        found = [go_match(rest, name[cut:]) for cut in range(len(name) + 1)]
        return any(found)
    if char == "?":
        return bool(name) and go_match(rest, name[1:])
    if char == "\\":
        if not rest:
            raise ValueError
        return name[:1] == rest[0] and go_match(rest[1:], name[1:])
    if char == "[":
        negated = rest.startswith("^")
        rest = rest[negated:]
        ranges: list[tuple[str, str]] = []
        while not (rest.startswith("]") and ranges):
            low, rest = bracket_char(rest)
            high = low
            if rest.startswith("-"):
                high, rest = bracket_char(rest[1:])
            ranges.append((low, high))
        inside = bool(name) and any(low <= name[0] <= high for low, high in ranges)
        return bool(name) and inside != negated and go_match(rest[1:], name[1:])
    return name[:1] == char and go_match(rest, name[1:])


def bracket_char(text: str) -> tuple[str, str]:
    if not text or text[0] in "-]":
        raise ValueError
    if text[0] == "\\":
        text = text[1:]
    if len(text) < 2:  # a ']' must follow
        raise ValueError
    return text[0], text[1:]


@MANY
@given(SMALL, NAMES)
def test_components_match_as_the_obvious_matcher_does(pattern, name):
    try:
        found = bool(component(pattern).fullmatch(name))
    except InvalidRequest:
        return
    with contextlib.suppress(ValueError):
        # The obvious one reads only as much of the pattern as it needs, and may miss that it is bad.
        assert found == go_match(pattern, name)


def moby_regex(pattern: str) -> re.Pattern[str]:
    """The expression that Docker makes of a pattern of .dockerignore (moby/patternmatcher), brackets left out."""
    out, position = "^", 0
    while position < len(pattern):
        char = pattern[position]
        position += 1
        if char == "*":
            if pattern[position : position + 1] == "*":
                position += 1
                if pattern[position : position + 1] == "/":
                    position += 1
                out += ".*" if position == len(pattern) else "(.*/)?"
            else:
                out += "[^/]*"
        else:
            out += "[^/]" if char == "?" else re.escape(char)
    return re.compile(out + "$", re.DOTALL)


def moby_ignores(patterns: list[str], path: str) -> bool:
    parts = path.split("/")
    ignored = False
    for pattern in patterns:
        keeps = pattern.startswith("!")
        expression = moby_regex(posixpath.normpath(pattern.removeprefix("!")).lstrip("/"))
        if any(expression.match("/".join(parts[:depth])) for depth in range(1, len(parts) + 1)):
            ignored = not keeps
    return ignored


PATTERN = st.builds(
    lambda sign, parts: sign + "/".join(parts),
    st.sampled_from(["", "", "!"]),
    st.lists(st.sampled_from(["a", "b", "ab", "*", "**", "a*", "*b", "?", "a?", "a**", "**b", "a**b", "*a*", "***", "**a**", "a***b", "****"]), min_size=1, max_size=4),
)  # fmt: skip
PATHS = st.lists(st.sampled_from(["a", "b", "ab", "aab", "abb", "ba"]), min_size=1, max_size=4).map("/".join)


@MANY
@given(st.lists(PATTERN, max_size=4), PATHS)
@example(["a**b"], "ab/b")
@example(["**/a"], "a")
@example(["a**/a**b"], "a/a/ab")
def test_dockerignore_ignores_what_docker_s_expressions_do(patterns, path):
    try:
        rules = Ignore("\n".join(patterns))
    except InvalidRequest as error:
        assume("too many" not in error.what)
        raise
    assert rules.ignores(path) == moby_ignores(patterns, path)


@MANY
@given(st.text(), PATHS)
def test_any_dockerignore_is_read_or_refused(text, path):
    with contextlib.suppress(InvalidRequest):
        assert Ignore(text).ignores(path) in {True, False}


# Trees: every way to name a place, in a stack whose links were chosen by an enemy.

SPOT = st.lists(st.sampled_from(["a", "b", "c", "..", ".", ""]), min_size=1, max_size=5).map("/".join)
TARGET = st.one_of(
    SPOT, SPOT.map(lambda spot: f"/{spot}"), st.sampled_from(["/", "..", "../../../../outside", "/outside"])
)
ENTRY = st.tuples(st.sampled_from(["dir", "file", "link"]), SPOT, TARGET)


def snapshot(place: Path) -> list[tuple[str, bytes | str]]:
    found: list[tuple[str, bytes | str]] = []
    for folder, folders, files in os.walk(place):
        for name in [*folders, *files]:
            path = Path(folder) / name
            content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else ""
            found.append((str(path), content))
    return sorted(found, key=lambda pair: pair[0])


def put(writer: LayerWriter, kind: str, spot: str, target: str) -> None:
    path = f"/{spot}"
    parent = writer.resolve(posixpath.dirname(path), create=Owner())
    assert parent is not None
    place = posixpath.join(parent, posixpath.basename(path))
    if kind == "dir":
        writer.directory(place, 0o755, Owner())
    elif kind == "file":
        writer.file(place, [b"new"], 0o644, Owner())
    else:
        writer.symlink(place, target, Owner())


@FEW
@given(st.lists(ENTRY, max_size=6), st.lists(ENTRY, max_size=8))
@example([("link", "a", "/outside")], [("file", "a/b", ""), ("dir", "a", "")])
@example([], [("link", "a", "../../../../outside"), ("file", "a/secret", "")])
def test_nothing_is_written_outside_of_a_layer(below, entries):
    with tempfile.TemporaryDirectory() as name:
        base, tree, outside = (Path(name) / each for each in ("base", "tree", "outside"))
        for place in (base, tree, outside):
            place.mkdir()
        (outside / "secret").write_text("secret")
        for view, target, wanted in ((None, base, below), (base, tree, entries)):
            stack = StackView([view]) if view is not None else contextlib.nullcontext()
            with stack as under, LayerWriter(target, under, None) as writer:
                for entry in wanted:
                    with contextlib.suppress(*CONTAINED):
                        put(writer, *entry)
                writer.finish()
                made = {path.removeprefix(str(target)) for path, _ in snapshot(target)}
                # What the writer believes to have made is what is there.
                assert made == writer._made.keys() - {"/"}
        assert snapshot(outside) == [(f"{outside}/secret", b"secret")]
        assert sorted(path.name for path in Path(name).iterdir()) == ["base", "outside", "tree"]


def archive() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as packed:
        for name, kind, target in (
            ("d", tarfile.DIRTYPE, ""),
            ("d/f", tarfile.REGTYPE, ""),
            ("d/l", tarfile.SYMTYPE, "/outside"),
            ("d/h", tarfile.LNKTYPE, "d/f"),
            ("é" * 60, tarfile.REGTYPE, ""),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, target, 5 if kind == tarfile.REGTYPE else 0
            packed.addfile(info, io.BytesIO(b"12345"))
    return out.getvalue()


ARCHIVE = archive()
# Headers are where it hurts: their fields, with a checksum made right again.
CHANGE = st.tuples(st.integers(0, len(ARCHIVE) // 512 - 1), st.integers(0, 511), st.binary(min_size=1, max_size=12))


@FEW
@given(st.lists(CHANGE, max_size=4), st.booleans(), st.integers(0, len(ARCHIVE)))
def test_a_changed_archive_is_unpacked_inside_or_refused(changes, fix, cut):
    data = bytearray(ARCHIVE)
    for block, offset, new in changes:
        start = block * 512
        data[start + offset : start + offset + len(new)] = new
        if fix:
            data[start + 148 : start + 156] = b" " * 8
            data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
    with tempfile.TemporaryDirectory() as name:
        context, tree, outside = (Path(name) / each for each in ("context", "tree", "outside"))
        for place in (context, tree, outside):
            place.mkdir()
        (context / "x").write_bytes(data if cut % 3 else data[:cut])
        watch = Watch(CopyLimits(entries=100, bytes=1 << 20))
        with FileTree([context], None, is_context=True, what="the build context") as source:
            (picked,) = source.pick("x", watch)
            with LayerWriter(tree, None, None) as writer, contextlib.suppress(*CONTAINED):
                unpack(writer, source, picked.top, "/", Owner(), watch)
        assert list(outside.iterdir()) == []
        assert sorted(path.name for path in Path(name).iterdir()) == ["context", "outside", "tree"]
