"""Which command lines a parked Node.js or R can run as a fresh interpreter would, and what it is told for them.

Decided here, on the host, before a parked interpreter is spent on a command. Only the forms below are known; any
other option, and any variable that interpreters read while they start, is the reason for a cold start.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

import msgspec

Kind = Literal["node", "r"]
CONTEXT = "tartarus-context"
"""In the place of a command line: serve code cells (contexts.py)."""

_NODE_EVAL = {"-e": "text", "--eval": "text", "-p": "print", "--print": "print", "-pe": "print"}
_NODE_SUBCOMMANDS = frozenset({"inspect", "debug"})
# In the text of a program, node resolves import() by means that only it has, and before version 23 it takes `crypto`
# for the module instead of the global.
_NODE_OWN = re.compile(r"\b(import|crypto)\b")
_READ_AT_START = {
    # Its own options, libuv's, the loader's, libc's; ICU takes its language and OpenSSL its files at the start;
    # NODE_PATH's neighbour, the module directory in HOME, is looked up then too.
    "node": re.compile(r"(NODE|UV|LD|LC|SSL|OPENSSL|ICU|MALLOC|GLIBC)_.*|LANG|LANGUAGE|HOME|TZDIR"),
    # Its own, the front end's and what etc/Renviron sets; number libraries start their threads as they are loaded;
    # the session's temporary directory, what a display can do, and what `~` means are found out once.
    "r": re.compile(
        r"(_?R|LD|LC|OMP|OPENBLAS|GOTO|MKL|BLIS|VECLIB|MALLOC|GLIBC|JAVA)_.*|LANG|LANGUAGE|HOME|TMPDIR|TMP|TEMP"
        r"|DISPLAY|EDITOR|VISUAL|PAGER|BROWSER|TAR|LN_S|MAKE|SED|UNZIP|ZIP|COLUMNS|TERM|RSTUDIO"
    ),
}
# The front end `R` is a shell script: what it splits words at, and how it writes a blank and a line's end.
_R_SPLITS = re.compile(r"[\t\r\v\f]|~\+~|~n~")


class Program(msgspec.Struct, frozen=True):
    """What to run.

    `mode`: file (`program` is its path), text, print (text whose value is shown), input (the program comes on standard
    input) or context. `option` is what stood before the text, as Node.js tells it in `process.execArgv`.
    """

    mode: Literal["file", "text", "print", "context", "input"]
    program: str
    arguments: tuple[str, ...]
    option: str = ""


class NotKnown(ValueError):
    """A command line that needs an interpreter of its own; the text says why."""


def program_of(kind: Kind, argv: tuple[str, ...]) -> Program:
    """What a command line asks for. Raises NotKnown."""
    if argv == (CONTEXT,):
        return Program("context", "", ())
    return _node(argv[1:]) if kind == "node" else _r(argv[1:])


def steering_variable(kind: Kind, parked: Mapping[str, str], wanted: Mapping[str, str]) -> str:
    """A variable that differs and is read only at an interpreter's start; "" when there is none."""
    pattern = _READ_AT_START[kind]
    differing = (name for name in {*parked, *wanted} if parked.get(name) != wanted.get(name))
    return min((name for name in differing if pattern.fullmatch(name)), default="")


def _node(words: tuple[str, ...]) -> Program:
    if words[:1] in {(), ("-",)}:
        return Program("input", "", words)
    first, rest = words[0], words[1:]
    mode = _NODE_EVAL.get(first)
    if mode is None:
        if not first or first.startswith("-") or first in _NODE_SUBCOMMANDS:
            raise NotKnown(f"option {first!r}")
        return Program("file", first, rest)
    if not rest or not rest[0] or rest[0].startswith("-"):
        raise NotKnown(f"{first} without a program")
    if own := _NODE_OWN.search(rest[0]):
        raise NotKnown(f"{own[0]!r} means more to a fresh interpreter")
    arguments = rest[1:]
    if arguments and arguments[0].startswith("-"):
        raise NotKnown(f"option {arguments[0]!r}")
    return Program("print" if mode == "print" else "text", rest[0], arguments, first)


def _r(words: tuple[str, ...]) -> Program:
    lines: list[str] = []
    while words[:1] == ("-e",):
        if len(words) < 2 or not words[1] or words[1].startswith("-") or _R_SPLITS.search(words[1]):
            raise NotKnown("an expression that the front end changes")
        lines.append(words[1])
        words = words[2:]
    if not lines:
        if not words:
            raise NotKnown("no program")
        lines, words = [words[0]], words[1:]
        if not lines[0] or lines[0].startswith("-") or _R_SPLITS.search(lines[0]) or "\n" in lines[0]:
            raise NotKnown(f"option {lines[0]!r}")
        program = Program("file", lines[0], (f"--file={_r_word(lines[0])}",))
    else:
        if words and words[0].startswith("-"):
            raise NotKnown(f"option {words[0]!r}")
        told = tuple(word for line in lines for word in ("-e", _r_word(line)))
        program = Program("text", "\n".join(lines), told)
    return msgspec.structs.replace(program, arguments=(*program.arguments, *(("--args", *words) if words else ())))


def _r_word(text: str) -> str:
    """As the front end hands it on, and commandArgs() shows it."""
    return text.rstrip("\n").replace(" ", "~+~").replace("\n", "~n~")
