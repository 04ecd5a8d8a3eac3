"""One spelling for each path, so that ``..``, links, slashes and absolute spellings change no decision."""

from __future__ import annotations

import os
from pathlib import Path

from tartarus.model.errors import InvalidRequest

MAX_PATH = 4096


def canonical(workspace: Path, text: str) -> str:
    """The path that `text` leads to: relative to the workspace (``.`` is itself), absolute where it lies outside.

    Links are followed as the kernel would, also those that lead out; parts that do not exist are taken as they
    stand. Who acts must open what was judged, since links can change in between. Raises InvalidRequest.
    """
    if not text or "\0" in text or len(text.encode("utf-8", "surrogateescape")) > MAX_PATH:
        raise InvalidRequest("not a path", why="it is empty, too long, or has a NUL in it", fix="give another path")
    try:
        root = os.path.realpath(workspace)
        real = os.path.realpath(os.path.join(root, text))
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"{text!r} leads nowhere", why=str(error), fix="give another path") from error
    if real == root:
        return "."
    inside = os.path.join(root, "")
    return real.removeprefix(inside) if real.startswith(inside) else real
