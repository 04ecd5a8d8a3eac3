"""From a Dockerfile's text to its logical lines: directives, comments, continuations, here-documents."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final, NamedTuple

from tartarus.images.dockerfile.limits import MAX_INSTRUCTIONS, MAX_TEXT_BYTES
from tartarus.images.dockerfile.words import split_words
from tartarus.model.errors import InvalidRequest

_DIRECTIVE: Final = re.compile(r"#\s*([A-Za-z][A-Za-z0-9]*)\s*=\s*(.*?)\s*", re.DOTALL)
_HEREDOC: Final = re.compile(r"([0-9]*)<<(-?)([^<]+)")
_HEREDOC_NAME: Final = re.compile(r"[A-Za-z0-9_+-][A-Za-z0-9_.+-]{0,199}")
_WITH_HEREDOCS: Final = ("run", "copy", "add")
_SYNTAX: Final = re.compile(r"(?:docker\.io/)?docker/dockerfile:1(?:[.-][A-Za-z0-9.-]+)?(?:@sha256:[0-9a-f]{64})?")
_BLANK: Final = " \t\v\f\r"


class Heredoc(NamedTuple):
    """A here-document: its name, its lines as written, whether variables are put in, whether tabs are stripped."""

    name: str
    content: str
    expand: bool
    strip_tabs: bool

    @property
    def text(self) -> str:
        """The content, without the tabs in front where ``<<-`` asked for that."""
        if not self.strip_tabs:
            return self.content
        return "".join(line.lstrip("\t") for line in self.content.splitlines(keepends=True))


class Line(NamedTuple):
    """An instruction as one line: its name in lower case, what follows, and the number of its first line."""

    number: int
    name: str
    rest: str
    heredocs: tuple[Heredoc, ...]


def read_lines(text: str) -> tuple[str, list[Line]]:
    """(escape character, logical lines). Raises InvalidRequest with the number of the line that is wrong."""
    try:
        too_long = len(text) > MAX_TEXT_BYTES or len(text.encode()) > MAX_TEXT_BYTES
    except UnicodeEncodeError as error:
        raise InvalidRequest("the Dockerfile is not UTF-8") from error
    if too_long:
        raise InvalidRequest("the Dockerfile is too long", why=f"at most {MAX_TEXT_BYTES} bytes are read")
    if "\0" in text:
        number = text.count("\n", 0, text.index("\0")) + 1
        raise InvalidRequest(f"line {number}: a NUL byte", why="a Dockerfile is text")
    # Only line feeds end lines: str.splitlines knows many more, which can be inside of a command.
    physical = [line.removesuffix("\r") for line in text.removeprefix("\ufeff").split("\n")]
    escape, start = _directives(physical)
    lines: list[Line] = []
    for line in _logical(physical, start, escape):
        if len(lines) == MAX_INSTRUCTIONS:
            raise InvalidRequest(f"line {line.number}: too many instructions", why=f"at most {MAX_INSTRUCTIONS}")
        lines.append(line)
    return escape, lines


def _directives(physical: list[str]) -> tuple[str, int]:
    """The escape character, and the index of the first line that is no parser directive."""
    seen: dict[str, str] = {}
    index = 0
    for index, text in enumerate(physical):
        found = _DIRECTIVE.fullmatch(text.strip(_BLANK)) if len(text) < 1_000 else None
        if found is None or found[1].lower() not in {"syntax", "escape", "check"}:
            break
        name = found[1].lower()
        if name in seen:
            raise InvalidRequest(f"line {index + 1}: the directive '{name}' is given twice")
        seen[name] = found[2]
    syntax = seen.get("syntax")
    if syntax is not None and not _SYNTAX.fullmatch(syntax):
        raise InvalidRequest(
            f"'# syntax={syntax}' is not supported",
            why="a Dockerfile may not choose a program to read it with",
            fix="remove the line, or write '# syntax=docker/dockerfile:1'",
        )
    escape = seen.get("escape", "\\")
    if escape not in {"\\", "`"}:
        raise InvalidRequest(f"'# escape={escape}': the escape character can be \\ or `")
    return escape, index


def _logical(physical: list[str], start: int, escape: str) -> Iterator[Line]:
    index = start
    while index < len(physical):
        first = physical[index].lstrip(_BLANK)
        if not first or first.startswith("#"):
            index += 1
            continue
        number = index + 1
        parts: list[str] = []
        text = first
        while True:
            index += 1
            body, goes_on = _continuation(text, escape)
            parts.append(body)
            if not goes_on:
                break
            # Comments and, for old files, empty lines inside of a continued line do not end it.
            while index < len(physical) and _passed_over(physical[index]):
                index += 1
            if index == len(physical):
                break
            text = physical[index]
        name, _, rest = _partition("".join(parts))
        heredocs: list[Heredoc] = []
        if name.lower() in _WITH_HEREDOCS:
            for opening in _openings(rest, escape):
                heredoc, index = _heredoc(physical, index, number, opening)
                heredocs.append(heredoc)
        yield Line(number, name.lower(), rest.strip(_BLANK), tuple(heredocs))


def _continuation(line: str, escape: str) -> tuple[str, bool]:
    """(the line without its escape at the end, whether it goes on). A doubled escape is one that was meant."""
    bare = line.rstrip(" \t")
    if bare.endswith(escape) and not bare.endswith(escape * 2):
        return bare[:-1], True
    return line, False


def _passed_over(line: str) -> bool:
    bare = line.strip(_BLANK)
    return not bare or bare.startswith("#")


def _partition(line: str) -> tuple[str, str, str]:
    for position, char in enumerate(line):
        if char in _BLANK:
            return line[:position], char, line[position:]
    return line, "", ""


def _openings(rest: str, escape: str) -> list[tuple[str, bool, bool]]:
    """The here-documents that a line opens: (name, whether variables are put in, whether tabs are stripped)."""
    openings: list[tuple[str, bool, bool]] = []
    if "<<" not in rest:
        return openings
    for word in split_words(rest, escape):
        found = _HEREDOC.fullmatch(word)
        if found is None:
            continue
        bare = found[3].replace('"', "").replace("'", "")
        if _HEREDOC_NAME.fullmatch(bare):
            openings.append((bare, bare == found[3], bool(found[2])))
    return openings


def _heredoc(physical: list[str], index: int, number: int, opening: tuple[str, bool, bool]) -> tuple[Heredoc, int]:
    name, expands, strip_tabs = opening
    content: list[str] = []
    while index < len(physical):
        line = physical[index]
        index += 1
        if (line.lstrip("\t") if strip_tabs else line) == name:
            return Heredoc(name, "".join(content), expands, strip_tabs), index
        content.append(f"{line}\n")
    raise InvalidRequest(
        f"line {number}: the here-document '{name}' is never closed", fix=f"end it with a line '{name}'"
    )
