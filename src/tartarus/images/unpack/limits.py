"""How much one layer may be. Every number is a cap on something that a hostile archive chooses."""

from __future__ import annotations

from typing import NamedTuple

IDS = 65536
"""How many user and group ids a sandbox has: 0 to 65535."""
NOBODY = 65534
"""Who owns what an archive gives to an id beyond `IDS`."""
MAX_DEPTH = 200
"""Directories are never nested deeper, whatever the limits say: they must be removable by shutil.rmtree, which needs
a stack frame for each level."""
REPORT_EVERY = 8 << 20
"""Progress is reported each time so many more uncompressed bytes are done."""


class Limits(NamedTuple):
    """The caps for one layer.

    `bytes`: the archive uncompressed, and the sizes of its files together, holes included. `ratio`: how many times
    the compressed size the archive may grow, beyond the first `ratio_free_bytes` (deflate reaches 1032, a layer of
    text about 10). `header_bytes`: extended headers and sparse maps of one entry. `xattr_bytes`: attributes of one
    entry (the kernel's limit for one is 64 KiB). `memory_bytes` and `cpu_s` hold for the child, `timeout_s` for the
    whole job.
    """

    bytes: int = 16 << 30
    entries: int = 1_000_000
    depth: int = MAX_DEPTH
    header_bytes: int = 1 << 20
    xattr_bytes: int = 64 << 10
    ratio: int = 200
    ratio_free_bytes: int = 1 << 30
    memory_bytes: int = 1 << 30
    cpu_s: int = 900
    timeout_s: float = 1800.0
