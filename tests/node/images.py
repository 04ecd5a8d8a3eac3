"""What microVMs need of a state directory and takes long to make, kept between test runs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from tests.needs import KERNEL_PACKAGES, kernel_package, missing

from tartarus.runtimes.microvm import kernel

_HOST_IMAGES = "host-*.erofs"


@contextlib.contextmanager
def guest_images(state_dir: Path) -> Iterator[None]:
    """Install a kernel, and lend the image of the host's /usr, which is named by what it holds, and take it back."""
    if os.geteuid() != 0 or missing("microvm"):
        yield
        return
    package = kernel_package()
    assert package is not None
    kernel.install(package, state_dir / "kernels")
    machines = state_dir / "machines"
    machines.mkdir(mode=0o700, exist_ok=True)
    for image in KERNEL_PACKAGES.glob(_HOST_IMAGES):
        _link(image, machines / image.name)
    yield
    for image in machines.glob(_HOST_IMAGES):
        if _link(image, KERNEL_PACKAGES / image.name):
            for old in KERNEL_PACKAGES.glob(image.name.rpartition("-")[0] + "-*"):
                if old.name != image.name:
                    old.unlink(missing_ok=True)


def _link(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except OSError:  # there already, taken away meanwhile, or on another file system
        return False
    return True
