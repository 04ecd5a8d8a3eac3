"""A Debian made from packages, a registry that asks who is there, and the command line, all real."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.images.registries import PASSWORD, USER, Running, docker_registry, htpasswd_auth

PACKAGES = "python3,python3-pip,python3-venv,ca-certificates"


@pytest.fixture(scope="session")
def place() -> Iterator[Path]:
    """A directory that other users may pass through."""
    path = Path(tempfile.mkdtemp(prefix="tt-shipped-", dir="/var/tmp"))
    path.chmod(0o711)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def debian(place: Path) -> Path:
    """A root file system of Debian packages, as a tar; TARTARUS_TEST_DEBIAN names one that was made before."""
    if ready := os.environ.get("TARTARUS_TEST_DEBIAN"):
        return Path(ready)
    made = place / "debian.tar"
    options = ['--aptopt=APT::Install-Recommends "false"', "--dpkgopt=path-exclude=/usr/share/doc/*",
               "--dpkgopt=path-exclude=/usr/share/locale/*", "--dpkgopt=path-exclude=/usr/share/man/*"]  # fmt: skip
    subprocess.run(
        ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={PACKAGES}", *options, "bookworm", made], check=True
    )
    return made


class CommandLine:
    """`tartarus` with a home, and a Docker configuration, of its own."""

    def __init__(self, place: Path, registry: Running) -> None:
        self.environ = {
            **os.environ, "TARTARUS_HOME": str(place / "home"), "DOCKER_CONFIG": str(place / "docker"), "HOME": str(place),
        }  # fmt: skip
        self.registry = registry

    def __call__(self, *words: str, status: int = 0, timeout_s: float = 280) -> str:
        """Its standard output and error; it must end with `status`."""
        done = subprocess.run(
            [sys.executable, "-m", "tartarus.cli.main", *words],
            env=self.environ, capture_output=True, text=True, timeout=timeout_s, check=False,
        )  # fmt: skip
        said = done.stdout + done.stderr
        assert done.returncode == status, said[-8000:]
        return said


@pytest.fixture(scope="session")
def tartarus(place: Path) -> Iterator[CommandLine]:
    """The command line, beside a registry that wants a name and a password, which `docker login` has written down."""
    (place / "home").mkdir(mode=0o711)
    (place / "docker").mkdir()
    with docker_registry(place / "registry", htpasswd_auth(place)) as registry:
        login = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        config = {"auths": {registry.host: {"auth": login}}}
        (place / "docker" / "config.json").write_text(json.dumps(config))
        run = CommandLine(place, registry)
        yield run
        run("down")


@pytest.fixture(scope="session")
def base(tartarus: CommandLine, debian: Path) -> str:
    """The reference of an image in the registry: imported from the tar, pushed from there."""
    tartarus("template", "import", str(debian), "--name", "debian")
    reference = tartarus.registry.reference("debian/base:1")
    tartarus("template", "push", "debian", reference)
    return reference
