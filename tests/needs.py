"""What tests may need of a machine, and how to find out: the only reasons for which a test is skipped.

`@pytest.mark.needs("docker", "root")` on a test, a class or a module (`pytestmark`). In CI a need that
scripts/setup-system.sh installs, or that root has by right, must be met: its absence is an error there.
"""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tartarus.runtimes.confine import landlock

if TYPE_CHECKING:
    from collections.abc import Callable


class Need(NamedTuple):
    """`missing` returns what is missing, or nothing; `in_ci`: CI has it, so a test may not be skipped there."""

    missing: Callable[[], str]
    in_ci: bool


def _program(name: str) -> Callable[[], str]:
    return lambda: "" if shutil.which(name) else f"{name} is not installed"


def _runs(argv: list[str]) -> str:
    if not shutil.which(argv[0]):
        return f"{argv[0]} is not installed"
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{argv[0]} does not work: {error}"
    return "" if done.returncode == 0 else f"{argv[0]} does not work: {(done.stderr or done.stdout).strip()[-200:]}"


def _wasi_libc() -> str:
    """What makes WebAssembly of C."""
    lacking = [name for name in ("clang", "wasm-ld") if not shutil.which(name)]
    if not Path("/usr/lib/wasm32-wasi/libc.a").exists():
        lacking.append("wasi-libc")
    return f"{', '.join(lacking)} not installed" if lacking else ""


def _docker_registry() -> str:
    """The registry, and what makes its users and its tokens."""
    lacking = [name for name in ("docker-registry", "htpasswd", "openssl") if not shutil.which(name)]
    return f"{', '.join(lacking)} not installed" if lacking else ""


def _root() -> str:
    return "" if os.geteuid() == 0 else "not root"


def _user_namespaces() -> str:
    if os.geteuid() != 0:
        return _runs(["unshare", "--user", "--map-root-user", "true"])
    probe = [
        "setpriv",
        "--reuid=65534",
        "--regid=65534",
        "--clear-groups",
        "unshare",
        "--user",
        "--map-root-user",
        "true",
    ]
    return _runs(probe)


def _cgroups() -> str:
    if os.geteuid() != 0:
        return "cgroups are root's to make"
    for place in ("/sys/fs/cgroup/cgroup.procs", "/sys/fs/cgroup/unified/cgroup.procs", "/sys/fs/cgroup/pids/tasks"):
        if os.access(place, os.W_OK):
            return ""
    return "no writable cgroup hierarchy"


def _landlock() -> str:
    return "" if landlock.abi() > 0 else "this kernel has no Landlock, or it is switched off"


def _torch_wheel() -> str:
    """PyTorch's CPU build is no ordinary index's: a wheel has to lie where pip's settings look for links."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-index", "--no-deps", "torch"]
    with tempfile.TemporaryDirectory() as place:
        return _runs([*pip, "--dest", place]) and "pip finds no wheel of PyTorch among its links"


def _docker_hub() -> str:
    try:
        urllib.request.urlopen("https://registry-1.docker.io/v2/", timeout=10)
    except urllib.error.HTTPError:
        return ""
    except OSError as error:
        return f"Docker Hub can't be reached: {error}"
    return ""


def _kvm() -> str:
    return "" if os.access("/dev/kvm", os.W_OK) else "no usable /dev/kvm"


KERNEL_PACKAGES = Path("/var/cache/tartarus-tests")
"""Where the package of a guest kernel lies, downloaded once from Debian's mirror."""


def kernel_package() -> Path | None:
    """Debian's package of a cloud kernel, fetched if need be; None where there is none to be had."""
    pattern = "linux-image-[0-9]*-cloud-*.deb"
    if not any(KERNEL_PACKAGES.glob(pattern)) and shutil.which("apt-get"):
        KERNEL_PACKAGES.mkdir(parents=True, exist_ok=True)
        _download(pattern)
    return next(iter(sorted(KERNEL_PACKAGES.glob(pattern))), None)


def _download(pattern: str) -> None:
    with (KERNEL_PACKAGES / ".downloading").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        if any(KERNEL_PACKAGES.glob(pattern)):  # another test process has done it meanwhile
            return
        shown = subprocess.run(
            ["apt-cache", "depends", "linux-image-cloud-amd64"], capture_output=True, text=True, check=False
        ).stdout
        names = [word for word in shown.split() if word.startswith("linux-image-") and word[12:13].isdigit()]
        if names:
            subprocess.run(
                ["apt-get", "download", names[0]], cwd=KERNEL_PACKAGES, capture_output=True, timeout=120, check=False
            )


def _microvm() -> str:
    lacking = [name for name in ("qemu-system-x86_64", "mkfs.erofs", "mkfs.ext4", "dpkg-deb") if not shutil.which(name)]
    if lacking:
        return f"{', '.join(lacking)} not installed"
    return "" if kernel_package() else "no package of a guest kernel"


def _sanitizers() -> str:
    program = "int main(void) { return 0; }"
    argv = ["cc", "-fsanitize=address,undefined", "-x", "c", "-", "-o", os.devnull]
    if not shutil.which("cc"):
        return "cc is not installed"
    done = subprocess.run(argv, input=program, capture_output=True, text=True, timeout=60, check=False)
    return "" if done.returncode == 0 else "cc has no sanitizers"


def _other_python() -> str:
    found = [path for path in ("/usr/bin/python3", "/usr/local/bin/python3") if Path(path).exists()]
    return "" if found else f"only {sys.executable}"


NEEDS: dict[str, Need] = {
    "root": Need(_root, in_ci=True),
    "not-root": Need(lambda: "" if os.geteuid() != 0 else "running as root", in_ci=False),
    "cc": Need(_program("cc"), in_ci=True),
    "make": Need(_program("make"), in_ci=True),
    "sanitizers": Need(_sanitizers, in_ci=True),
    "bwrap": Need(lambda: _runs(["bwrap", "--ro-bind", "/", "/", "true"]), in_ci=True),
    "runc": Need(lambda: _runs(["runc", "--version"]), in_ci=True),
    "busybox": Need(_program("busybox"), in_ci=True),
    "newuidmap": Need(_program("newuidmap"), in_ci=True),
    "ps": Need(_program("ps"), in_ci=True),
    "git": Need(_program("git"), in_ci=True),
    "ip": Need(_program("ip"), in_ci=True),
    "nft": Need(_program("nft"), in_ci=True),
    "openssl": Need(_program("openssl"), in_ci=True),
    "perl": Need(_program("perl"), in_ci=True),
    "node": Need(_program("node"), in_ci=True),
    "r": Need(_program("Rscript"), in_ci=True),
    "system-python": Need(_other_python, in_ci=True),
    "microvm": Need(_microvm, in_ci=True),
    "docker-registry": Need(_docker_registry, in_ci=True),
    "torch-wheel": Need(_torch_wheel, in_ci=False),
    "docker-hub": Need(_docker_hub, in_ci=False),
    "mmdebstrap": Need(_program("mmdebstrap"), in_ci=True),
    "skopeo": Need(_program("skopeo"), in_ci=True),
    "cgroups": Need(_cgroups, in_ci=True),
    # The kernel's or the container engine's to give: CI takes what its machine has.
    "user-namespaces": Need(_user_namespaces, in_ci=False),
    "landlock": Need(_landlock, in_ci=False),
    "rpm": Need(_program("rpm"), in_ci=True),
    "java": Need(_program("java"), in_ci=False),
    "docker": Need(lambda: _runs(["docker", "version"]), in_ci=False),
    "dockerd": Need(_program("dockerd"), in_ci=True),
    "podman": Need(_program("podman"), in_ci=True),
    "containerd": Need(_program("containerd"), in_ci=True),
    "wasi-libc": Need(_wasi_libc, in_ci=True),
    "runsc": Need(lambda: _runs(["runsc", "--version"]), in_ci=True),
    "kvm": Need(_kvm, in_ci=False),
}


@functools.cache
def missing(need: str) -> str:
    """What `need` lacks on this machine, or nothing. Found out once per run."""
    return NEEDS[need].missing()
