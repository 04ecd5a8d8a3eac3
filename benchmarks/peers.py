"""The other ways to run a command in isolation that are installed here, each as a command line."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import tarfile
from io import BytesIO
from pathlib import Path

BUSYBOX = "/bin/busybox"


def bubblewrap(argv: list[str]) -> list[str] | None:
    """Bwrap with every namespace, /usr read-only."""
    if not shutil.which("bwrap"):
        return None
    base = [
        "bwrap",
        "--unshare-all",
        "--ro-bind",
        "/usr",
        "/usr",
        "--proc",
        "/proc",
        "--dev",
        "/dev",
        "--tmpfs",
        "/tmp",
    ]
    for name in ("bin", "lib", "lib64", "sbin"):
        base += ["--symlink", f"usr/{name}", f"/{name}"]
    return [*base, "--die-with-parent", "--", *argv]


def bundle(directory: Path, runtime: str, argv: list[str]) -> Path | None:
    """An OCI bundle with busybox as its root file system, for runc and runsc."""
    if not shutil.which(runtime) or not Path(BUSYBOX).exists():
        return None
    root = directory / "rootfs"
    for name in ("bin", "proc", "dev", "sys", "tmp", "etc"):
        (root / name).mkdir(parents=True, exist_ok=True)
    shutil.copy(BUSYBOX, root / "bin/busybox")
    for applet in ("true", "sh", "echo"):
        link = root / "bin" / applet
        if not link.exists():
            link.symlink_to("busybox")
    subprocess.run([runtime, "spec"], cwd=directory, check=True, capture_output=True)
    config = json.loads((directory / "config.json").read_text())
    config["process"]["args"] = argv
    config["process"]["terminal"] = False
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@functools.cache
def docker_image() -> bool:
    """Whether a Docker engine answers; makes the image `tartarus-bench` from busybox when it does."""
    if not shutil.which("docker"):
        return False
    if (
        subprocess.run(["docker", "info"], capture_output=True, check=False).returncode != 0
        or not Path(BUSYBOX).exists()
    ):
        return False
    buffer = BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.add(BUSYBOX, "bin/busybox")
        for applet in ("true", "sh", "cat", "dd", "sleep"):
            link = tarfile.TarInfo(f"bin/{applet}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(link)
    done = subprocess.run(
        ["docker", "import", "-", "tartarus-bench"], input=buffer.getvalue(), capture_output=True, check=False
    )
    return done.returncode == 0


def absent() -> list[str]:
    """Peers that can't be measured on this machine."""
    found = {"bubblewrap": shutil.which("bwrap"), "runc": shutil.which("runc"), "gVisor": shutil.which("runsc")}
    missing = [name for name, path in found.items() if path is None]
    return missing if docker_image() else [*missing, "docker"]
