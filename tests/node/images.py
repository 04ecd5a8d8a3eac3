"""What microVMs need of a state directory and takes long to make, kept between test runs."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.needs import KERNEL_PACKAGES, kernel_package, missing

from tartarus.runtimes.idmap import host_id_map
from tartarus.runtimes.microvm import images, kernel

_USR = Path("/usr")


@contextlib.contextmanager
def guest_images(state_dir: Path) -> Iterator[None]:
    """Install a kernel, and lend the image of the host's /usr."""
    if os.geteuid() != 0 or missing("microvm"):
        yield
        return
    package = kernel_package()
    assert package is not None
    kernel.install(package, state_dir / "kernels")
    machines = state_dir / "machines"
    machines.mkdir(mode=0o700, exist_ok=True)
    image = packed_usr()
    with contextlib.suppress(OSError):  # on another file system: then it is packed anew
        os.link(image, machines / image.name)
    yield


def packed_usr() -> Path:
    """The image of the host's /usr as it is now, packed if need be, by one test process for all."""
    KERNEL_PACKAGES.mkdir(parents=True, exist_ok=True)
    with (KERNEL_PACKAGES / ".packing").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        with tempfile.TemporaryDirectory(prefix="tartarus-packing-", dir="/var/tmp") as stage:
            # The daemon's own way there, without a daemon; in a thread, since who asks may be in a loop.
            binding = images.Packer(KERNEL_PACKAGES, Path(stage), host_id_map())._bind(_USR)
            with ThreadPoolExecutor(1) as thread:
                image, _ = thread.submit(asyncio.run, binding).result()
        try:
            return Path(os.readlink(f"/proc/self/fd/{image}"))
        finally:
            os.close(image)
