"""The instructions of a Dockerfile, as data: checked for their form, their variables not yet put in."""

from __future__ import annotations

import msgspec


class Instruction(msgspec.Struct, frozen=True, kw_only=True):
    """`line`: where it begins, counted from 1. `text`: as written, on one line, for messages."""

    line: int
    text: str


class Arg(Instruction, frozen=True, kw_only=True):
    """Names and their default values, None where there is none."""

    pairs: tuple[tuple[str, str | None], ...]


class From(Instruction, frozen=True, kw_only=True):
    """Begins a stage. `name` is in lower case, and empty when the stage has none."""

    base: str
    name: str = ""
    platform: str = ""


class Env(Instruction, frozen=True, kw_only=True):
    """Variables for the steps that follow and for the image."""

    pairs: tuple[tuple[str, str], ...]


class Label(Instruction, frozen=True, kw_only=True):
    """Labels of the image."""

    pairs: tuple[tuple[str, str], ...]


class Command(Instruction, frozen=True, kw_only=True):
    """A program and its arguments, or, with `in_shell`, one string for the stage's shell."""

    argv: tuple[str, ...]
    in_shell: bool


class Run(Command, frozen=True, kw_only=True):
    """A command to run now; its changes are the layer."""


class Cmd(Command, frozen=True, kw_only=True):
    """The image's default command or arguments."""


class Entrypoint(Command, frozen=True, kw_only=True):
    """The image's program."""


class Inline(msgspec.Struct, frozen=True):
    """A file whose content stands in the Dockerfile."""

    name: str
    content: str
    expand: bool


class Copy(Instruction, frozen=True, kw_only=True):
    """COPY, or ADD when `unpack`. `origin` is a stage's name or number or an image; empty for the build context."""

    sources: tuple[str, ...]
    destination: str
    origin: str = ""
    chown: str = ""
    chmod: str = ""
    unpack: bool = False
    inline: tuple[Inline, ...] = ()


class Workdir(Instruction, frozen=True, kw_only=True):
    """The directory of the steps that follow and of the image; made when it is missing."""

    path: str


class User(Instruction, frozen=True, kw_only=True):
    """The user of the steps that follow and of the image: name or number, perhaps with ``:group``."""

    user: str


class Shell(Instruction, frozen=True, kw_only=True):
    """The program that commands in shell form are given to."""

    argv: tuple[str, ...]


class Expose(Instruction, frozen=True, kw_only=True):
    """Ports as written."""

    ports: str


class Healthcheck(Instruction, frozen=True, kw_only=True):
    """`test` as in the image configuration: ``NONE``, ``CMD`` and arguments, or ``CMD-SHELL`` and a string."""

    test: tuple[str, ...]


class StopSignal(Instruction, frozen=True, kw_only=True):
    """A signal's name or number."""

    signal: str


class Noted(Instruction, frozen=True, kw_only=True):
    """An instruction without an effect here; `why` says so to the reader of the build's output."""

    why: str


class Stage(msgspec.Struct, frozen=True):
    """One FROM and what follows it. `index` counts from 0."""

    index: int
    start: From
    steps: tuple[Instruction, ...]

    @property
    def name(self) -> str:
        """What people call it: its name, or its number."""
        return self.start.name or str(self.index)


class Dockerfile(msgspec.Struct, frozen=True):
    """A whole Dockerfile. `arguments` are the ARGs in front of the first FROM."""

    arguments: tuple[Arg, ...]
    stages: tuple[Stage, ...]
    escape: str = "\\"
