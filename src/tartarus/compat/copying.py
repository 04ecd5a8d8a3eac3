"""A mounted directory as a tar that lies where it was mounted: `python -m tartarus.compat.copying SOURCE TARGET`.

A process of its own, since packing writes and an upload reads. Every name is opened below its directory's descriptor,
and no link is followed.
"""

from __future__ import annotations

import os
import sys

from tartarus.compat.snapshot import StandardOutput
from tartarus.images import rootfs
from tartarus.model.errors import TartarusError
from tartarus.model.sandbox import Mount


def archive_argv(mount: Mount) -> list[str]:
    """What runs this module for a mount."""
    return [sys.executable, "-P", "-m", "tartarus.compat.copying", mount.source, mount.target]


def opened(source: str) -> int:
    """A descriptor of a directory, by a path without any link: one that was put there meanwhile leads nowhere."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open("/", flags)
    for part in filter(None, source.split("/")):
        below = os.open(part, flags, dir_fd=fd)
        os.close(fd)
        fd = below
    return fd


def main() -> int:
    """Pack to standard output, and say on standard error what failed."""
    source, target = sys.argv[1:]
    try:
        rootfs.pack(opened(source), StandardOutput(), at=target.strip("/"))
    except (TartarusError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
