"""What the builder asks of the node, and what it tells whoever watches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, Protocol

import msgspec

from tartarus.images.oci import ImageConfig

Output = Callable[[int, bytes], None]
"""Takes a step's output as it comes: 1 for standard output or 2 for standard error, and the bytes."""


class Base(msgspec.Struct, frozen=True):
    """What a FROM names, ready to be built on. `layers` top first.

    `key` identifies the content and must change with it: an image's digest, a template's.
    """

    layers: tuple[Path, ...]
    config: ImageConfig
    key: str


class RunStep(msgspec.Struct, frozen=True):
    """A RUN. `layers` top first; `argv` is complete; `env` is all that the build says of it, HOME is not in it.

    `user` is as a Dockerfile writes it, and empty for root; `name` is the step for people.
    """

    layers: tuple[Path, ...]
    argv: tuple[str, ...]
    env: Mapping[str, str]
    workdir: str
    user: str
    name: str


class StepRunner(Protocol):
    """The effects that are not the builder's own. The node implements it."""

    async def base(self, reference: str, say: Callable[[str], None]) -> Base:
        """Pull or find what `reference` names, an image or a template. `say` takes lines of progress."""
        ...

    async def run(self, step: RunStep, tree: Path, lock: int, output: Output) -> int:
        """Run the step in a sandbox. With 0, the empty directory `tree` is to be the layer of its changes.

        `lock` is the file that guards `tree`, for processes that write to it to inherit. Returns the exit status.
        """
        ...

    async def keep_failed(self, layers: tuple[Path, ...], config: ImageConfig) -> str:
        """Keep the state before a step that failed as a template, for people to look into; returns its id."""
        ...


class Event(msgspec.Struct, frozen=True):
    """Something happened in a build.

    `step` of `steps` counts from 1; 0 before the first. `line` is the Dockerfile's. `text` is the step's, a line of
    progress, or a piece of output with its line ends.
    """

    kind: Literal["started", "progress", "output", "cached", "done", "note"]
    text: str
    step: int = 0
    steps: int = 0
    line: int = 0


Watcher = Callable[[Event], None]


class Built(msgspec.Struct, frozen=True):
    """A finished build. `layers` top first; `names` are those of the layers that it made or found made, in order.

    `key` identifies the result: base, files and commands. `notes` is what the reader of the Dockerfile should know.
    """

    layers: tuple[Path, ...]
    config: ImageConfig
    key: str
    names: tuple[str, ...]
    notes: tuple[str, ...]
    cached: int
    steps: int
