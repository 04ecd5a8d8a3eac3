"""What a build may ask of us at most: a Dockerfile, its build context and its images are foreign bytes."""

from __future__ import annotations

from typing import Final

import msgspec

MAX_TEXT_BYTES: Final = 1024**2
"""A Dockerfile's size. The longest that are written by hand have some tens of kilobytes."""
MAX_INSTRUCTIONS: Final = 1_000
MAX_STAGES: Final = 100
MAX_WORDS: Final = 4_096
"""Words in one instruction: sources of a COPY, pairs of an ENV."""
MAX_VALUE: Final = 128 * 1024
"""Characters of one value after expansion: execve(2) takes no longer string (MAX_ARG_STRLEN)."""
MAX_EXPANDED: Final = 16 * 1024**2
"""Characters that all expansions of one build may produce together."""
MAX_NESTING: Final = 16
"""Levels of ``${a:-${b:-…}}``."""
MAX_BUILD_ARGS: Final = 256
MAX_VARIABLES: Final = 4_096
"""Variables, or labels, of one image."""
MAX_PORTS: Final = 1_024
MAX_IGNORE_BYTES: Final = 256 * 1024
MAX_IGNORE_PATTERNS: Final = 1_000
MAX_PATH_BYTES: Final = 4_095
"""PATH_MAX without its final NUL."""


class CopyLimits(msgspec.Struct, frozen=True):
    """What one COPY or ADD may take: files and directories, bytes in all, levels of directories, seconds."""

    entries: int = 300_000
    bytes: int = 32 * 1024**3
    depth: int = 256
    seconds: float = 1_800.0
