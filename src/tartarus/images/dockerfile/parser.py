"""A Dockerfile's text to typed instructions. The whole file is refused for one instruction that is not understood.

Our own parser: the packaged ones return untyped words, know neither here-documents nor the escape directive, and
set no bound to what they read.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from typing import Final

import msgspec

from tartarus.images.dockerfile import instructions as are
from tartarus.images.dockerfile.limits import MAX_STAGES
from tartarus.images.dockerfile.lines import Line, read_lines
from tartarus.images.dockerfile.words import printable, split_words
from tartarus.model.errors import InvalidRequest

_STAGE_NAME: Final = re.compile(r"[a-z][a-z0-9_.-]{0,127}")
_ARG_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_REMOTE: Final = re.compile(r"(?:https?|ftp|git|ssh)://|git@", re.IGNORECASE)
_DURATION: Final = re.compile(r"(?:[0-9]{1,9}(?:\.[0-9]{1,9})?(?:ns|us|µs|ms|s|m|h))+|0")
_SHOWN: Final = 200
_NO_MOUNT: Final = {
    "mount": "steps have no mounts: leave it out; a secret belongs in no image, a cache is kept by layers",
    "network": "the network is chosen for the whole build: leave it out",
    "security": "every step runs with the same confinement: leave it out",
    "device": "steps have no devices: leave it out",
}
_NO_COPY: Final = {
    "parents": "copy directory by directory",
    "exclude": "use .dockerignore",
    "checksum": "it is for URLs, which are not fetched",
    "keep-git-dir": "it is for git repositories, which are not fetched",
    "unpack": "ADD unpacks local archives, COPY does not",
}


def parse(text: str) -> are.Dockerfile:
    """Read a Dockerfile. Raises InvalidRequest that names the line, what is wrong, and what to write instead."""
    try:
        return _parse(*read_lines(text))
    except InvalidRequest as error:
        raise printable(error) from error


def _parse(escape: str, lines: list[Line]) -> are.Dockerfile:
    arguments: list[are.Arg] = []
    stages: list[are.Stage] = []
    start: are.From | None = None
    steps: list[are.Instruction] = []
    for line in lines:
        instruction = _instruction(line, escape)
        if isinstance(instruction, are.From):
            if start is not None:
                stages.append(are.Stage(len(stages), start, tuple(steps)))
            if len(stages) == MAX_STAGES:
                raise InvalidRequest(f"line {line.number}: too many stages", why=f"at most {MAX_STAGES}")
            if instruction.name and instruction.name in {stage.start.name for stage in stages}:
                raise InvalidRequest(f"line {line.number}: a second stage is called '{instruction.name}'")
            start, steps = instruction, []
        elif start is not None:
            steps.append(instruction)
        elif isinstance(instruction, are.Arg):
            arguments.append(instruction)
        else:
            raise InvalidRequest(
                f"line {line.number}: {line.name.upper()} before the first FROM",
                why="only ARG may stand there",
                fix="begin with FROM and the image to build on",
            )
    if start is None:
        raise InvalidRequest("the Dockerfile has no FROM", fix="begin with FROM and the image to build on")
    stages.append(are.Stage(len(stages), start, tuple(steps)))
    return are.Dockerfile(tuple(arguments), tuple(stages), escape)


def _instruction(line: Line, escape: str) -> are.Instruction:
    read = _READERS.get(line.name)
    if read is None:
        near = difflib.get_close_matches(line.name[:40], _READERS, n=1)
        raise InvalidRequest(
            f"line {line.number}: unknown instruction {line.name[:40].upper()!r}",
            fix=f"did you mean {near[0].upper()}?" if near else f"known are {', '.join(sorted(_READERS)).upper()}",
        )
    try:
        if not line.rest:
            raise InvalidRequest("it needs an argument")
        return read(line, escape)
    except InvalidRequest as error:
        what = f"line {line.number}: {line.name.upper()}: {error.what}"
        raise InvalidRequest(what, why=error.why, fix=error.fix) from error


def _shown(line: Line) -> str:
    # It is shown on people's terminals: no control characters.
    text = "".join(char if char.isprintable() else "?" for char in " ".join(line.rest[:10_000].split()))
    text = f"{line.name.upper()} {text}"
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


def _from(line: Line, escape: str) -> are.From:
    flags, rest = _flags(line, escape, {"platform"}, {})
    words = rest.split()
    name = ""
    if len(words) == 3 and words[1].lower() == "as":
        name = words[2].lower()
        if not _STAGE_NAME.fullmatch(name):
            raise InvalidRequest(f"'{name[:60]}' can't name a stage", why="a letter, then letters, digits, '_.-'")
    elif len(words) != 1:
        raise InvalidRequest("write 'FROM image' or 'FROM image AS name'")
    return are.From(line=line.number, text=_shown(line), base=words[0], name=name, platform=flags.get("platform", ""))


def _arg(line: Line, escape: str) -> are.Arg:
    pairs: list[tuple[str, str | None]] = []
    for word in split_words(line.rest, escape):
        name, equals, value = word.partition("=")
        if not _ARG_NAME.fullmatch(name):
            raise InvalidRequest(f"'{name[:60]}' is no name", why="letters, digits and '_'; a digit not first")
        pairs.append((name, value if equals else None))
    return are.Arg(line=line.number, text=_shown(line), pairs=tuple(pairs))


def _pairs(line: Line, escape: str) -> tuple[tuple[str, str], ...]:
    words = split_words(line.rest, escape)
    if "=" not in words[0]:
        # The old form: one name, a blank, and all the rest is its value.
        name, value = words[0], line.rest[len(words[0]) :].strip()
        if not value:
            raise InvalidRequest(f"'{name[:60]}' has no value", fix="write NAME=value")
        return ((name, value),)
    pairs: list[tuple[str, str]] = []
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise InvalidRequest(f"'{word[:60]}' is no NAME=value", fix="put values with blanks in double quotes")
        pairs.append((name, value))
    return tuple(pairs)


def _env(line: Line, escape: str) -> are.Env:
    return are.Env(line=line.number, text=_shown(line), pairs=_pairs(line, escape))


def _label(line: Line, escape: str) -> are.Label:
    return are.Label(line=line.number, text=_shown(line), pairs=_pairs(line, escape))


def _json(text: str) -> tuple[str, ...] | None:
    """The strings of a JSON array; None for what is none, and so a command in shell form."""
    if not text.startswith("["):
        return None
    try:
        words = msgspec.json.decode(text.encode(), type=list[str])
    except msgspec.ValidationError as error:
        raise InvalidRequest("every element of the array must be a string", why=str(error)) from error
    except (msgspec.DecodeError, RecursionError, UnicodeError):
        return None
    if any("\0" in word for word in words):
        raise InvalidRequest("a NUL character in an argument")
    return tuple(words)


def _command(rest: str) -> tuple[tuple[str, ...], bool]:
    argv = _json(rest)
    return ((rest,), True) if argv is None else (argv, False)


def _run(line: Line, escape: str) -> are.Run:
    _, rest = _flags(line, escape, set(), _NO_MOUNT)
    if line.heredocs:
        return are.Run(line=line.number, text=_shown(line), argv=(_script(line, rest),), in_shell=True)
    argv, shell = _command(rest)
    if not argv or not argv[0]:
        raise InvalidRequest("it needs a command")
    return are.Run(line=line.number, text=_shown(line), argv=argv, in_shell=shell)


def _script(line: Line, rest: str) -> str:
    first = line.heredocs[0]
    if len(rest.split()) == 1:
        # Nothing but the here-document: its text is the script, so that any shell will do.
        if first.text.startswith("#!"):
            raise InvalidRequest(
                "a here-document that begins with '#!' is not supported",
                fix="name the program: RUN python3 <<EOF",
            )
        return first.text
    return "\n".join([rest, *(f"{document.content}{document.name}" for document in line.heredocs)])


def _cmd(line: Line, escape: str) -> are.Cmd:  # noqa: ARG001 - all readers are called alike
    argv, shell = _command(line.rest)
    return are.Cmd(line=line.number, text=_shown(line), argv=argv, in_shell=shell)


def _entrypoint(line: Line, escape: str) -> are.Entrypoint:  # noqa: ARG001
    argv, shell = _command(line.rest)
    return are.Entrypoint(line=line.number, text=_shown(line), argv=argv, in_shell=shell)


def _shell(line: Line, escape: str) -> are.Shell:  # noqa: ARG001
    argv = _json(line.rest)
    if not argv or not argv[0]:
        raise InvalidRequest("the shell must be a JSON array", fix='write SHELL ["/bin/bash", "-c"]')
    return are.Shell(line=line.number, text=_shown(line), argv=argv)


def _copy(line: Line, escape: str) -> are.Copy:
    unpack = line.name == "add"
    known = {"chown", "chmod", "link"} if unpack else {"chown", "chmod", "link", "from"}
    flags, rest = _flags(line, escape, known, _NO_COPY)
    words = list(_json(rest) or split_words(rest, escape))
    if len(words) < 2:
        raise InvalidRequest("it needs a source and a destination")
    *sources, destination = words
    inline = [are.Inline(document.name, document.text, document.expand) for document in line.heredocs]
    if inline:
        names = {
            f"<<{dash}{quote}{document.name}{quote}" for document in inline for dash in ("", "-") for quote in "'\""
        }
        names |= {f"<<{dash}{document.name}" for document in inline for dash in ("", "-")}
        sources = [source for source in sources if source not in names]
    for source in sources:
        if _REMOTE.match(source):
            raise InvalidRequest(
                f"'{source[:100]}' is not fetched",
                why="a build takes files from its context only",
                fix="put the file into the build context, or fetch it in a RUN",
            )
    origin = flags.get("from", "")
    if inline and origin:
        raise InvalidRequest("here-documents and --from don't go together")
    if "$" in origin:
        raise InvalidRequest("no variable is put into --from", fix="give a stage a name: FROM image AS name")
    return are.Copy(
        line=line.number, text=_shown(line), sources=tuple(sources), destination=destination, origin=origin,
        chown=flags.get("chown", ""), chmod=flags.get("chmod", ""), unpack=unpack, inline=tuple(inline),
    )  # fmt: skip


def _workdir(line: Line, escape: str) -> are.Workdir:  # noqa: ARG001
    return are.Workdir(line=line.number, text=_shown(line), path=line.rest)


def _user(line: Line, escape: str) -> are.User:  # noqa: ARG001
    return are.User(line=line.number, text=_shown(line), user=line.rest)


def _expose(line: Line, escape: str) -> are.Expose:  # noqa: ARG001
    return are.Expose(line=line.number, text=_shown(line), ports=line.rest)


def _healthcheck(line: Line, escape: str) -> are.Healthcheck:
    flags, rest = _flags(line, escape, {"interval", "timeout", "start-period", "start-interval", "retries"}, {})
    for name, value in flags.items():
        if not (value.isdecimal() if name == "retries" else _DURATION.fullmatch(value)):
            raise InvalidRequest(f"--{name}={value[:60]} makes no sense", fix="a duration is written 30s or 1m30s")
    kind, command = [*rest.split(None, 1), ""][:2]
    if kind.upper() == "NONE" and not command.strip() and not flags:
        return are.Healthcheck(line=line.number, text=_shown(line), test=("NONE",))
    argv, shell = _command(command.strip())
    if kind.upper() != "CMD" or not argv or not argv[0]:
        raise InvalidRequest("write 'HEALTHCHECK NONE' or 'HEALTHCHECK CMD command'")
    return are.Healthcheck(line=line.number, text=_shown(line), test=("CMD-SHELL" if shell else "CMD", *argv))


def _stopsignal(line: Line, escape: str) -> are.StopSignal:  # noqa: ARG001
    return are.StopSignal(line=line.number, text=_shown(line), signal=line.rest)


def _volume(line: Line, escape: str) -> are.Noted:  # noqa: ARG001
    why = "a sandbox has no volumes; the directory is an ordinary one"
    return are.Noted(line=line.number, text=_shown(line), why=why)


def _maintainer(line: Line, escape: str) -> are.Noted:  # noqa: ARG001
    why = "MAINTAINER is given up by Docker; write LABEL org.opencontainers.image.authors=…"
    return are.Noted(line=line.number, text=_shown(line), why=why)


def _onbuild(line: Line, escape: str) -> are.Instruction:  # noqa: ARG001
    raise InvalidRequest(
        "it is not supported", why="a template is not built on by others' Dockerfiles", fix="leave it out"
    )


def _flags(line: Line, escape: str, known: set[str], refused: dict[str, str]) -> tuple[dict[str, str], str]:
    """(the ``--name=value`` in front, what follows them)."""
    flags: dict[str, str] = {}
    rest = line.rest
    while rest.startswith("--"):
        word = split_words(rest, escape)[0] if len(rest) < 10_000 else rest.split(None, 1)[0]
        if word == "--":
            rest = rest[2:].lstrip()
            break
        name, equals, value = word.removeprefix("--").partition("=")
        if name in refused:
            raise InvalidRequest(f"--{name} is not supported", fix=refused[name])
        if name not in known:
            near = difflib.get_close_matches(name[:40], known, n=1)
            raise InvalidRequest(f"unknown option --{name[:40]}", fix=f"did you mean --{near[0]}?" if near else "")
        if name in flags:
            raise InvalidRequest(f"--{name} is given twice")
        if name != "link" and not (equals and value):
            raise InvalidRequest(f"--{name} needs a value", fix=f"write --{name}=value")
        flags[name] = value
        rest = rest[len(word) :].lstrip()
    if not rest:
        raise InvalidRequest("it needs an argument")
    return flags, rest


_READERS: Final[dict[str, Callable[[Line, str], are.Instruction]]] = {
    "add": _copy,
    "arg": _arg,
    "cmd": _cmd,
    "copy": _copy,
    "entrypoint": _entrypoint,
    "env": _env,
    "expose": _expose,
    "from": _from,
    "healthcheck": _healthcheck,
    "label": _label,
    "maintainer": _maintainer,
    "onbuild": _onbuild,
    "run": _run,
    "shell": _shell,
    "stopsignal": _stopsignal,
    "user": _user,
    "volume": _volume,
    "workdir": _workdir,
}
