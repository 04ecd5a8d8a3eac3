"""A template's Python packages: installed once into a directory that is a virtual environment wherever it lies.

No step runs code of the packages on the host: wheels only, unpacked by the installer, compiled to bytecode
but never imported. The environment needs no activation and no fixed place: Python finds it by the
`pyvenv.cfg` above the `bin/python3` that was started.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import re
import shutil
import signal
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path

from tartarus.images.interpreter import Interpreter
from tartarus.images.paths import VENV
from tartarus.model.errors import NoSpace, TemplateFailed

Progress = Callable[[str], None]

_INSTALL_TIMEOUT_S = 1800
_TAIL_LINES = 12
# The installer dies with us (PR_SET_PDEATHSIG), also when we are killed between its start and this line.
_TIED_TO_PARENT = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)
if os.getppid() == int(sys.argv[1]):
    os.execvp(sys.argv[2], sys.argv[2:])
"""


class _InstallerFailed(Exception):
    """Its last lines of output."""


def environment_layout(tree: Path, interpreter: Interpreter) -> Path:
    """Write an empty virtual environment into `tree`; returns its site-packages directory."""
    (tree / "bin").mkdir()
    for name, target in (
        ("python3", interpreter.path),
        ("python", "python3"),
        (interpreter.lib_name, "python3"),
    ):
        (tree / "bin" / name).symlink_to(target)
    version = ".".join(map(str, interpreter.version))
    home = os.path.dirname(interpreter.path)
    (tree / "pyvenv.cfg").write_text(f"home = {home}\ninclude-system-site-packages = false\nversion = {version}\n")
    site = tree / "lib" / interpreter.lib_name / "site-packages"
    site.mkdir(parents=True)
    return site


def installers(interpreter: Interpreter, site: Path, packages: tuple[str, ...]) -> list[list[str]]:
    """The commands that can install `packages` into `site`, best first."""
    common = ["--python", interpreter.path]
    target = ["--target", str(site), "--only-binary=:all:", *packages]
    found = []
    # Copied, not linked: what is given to the sandbox's user must not be the installer's own cache.
    uv = ["pip", "install", *common, "--link-mode=copy", "--no-progress", "--no-config", *target]
    if importlib.util.find_spec("uv") is not None:
        found.append([sys.executable, "-I", "-m", "uv", *uv])
    elif shutil.which("uv"):
        found.append(["uv", *uv])
    if importlib.util.find_spec("pip") is not None:
        pip = ["--disable-pip-version-check", "--no-input", *common, "install", "--no-warn-script-location"]
        found.append([sys.executable, "-I", "-m", "pip", *pip, *target])
    return found


async def install(
    tree: Path, interpreter: Interpreter, packages: tuple[str, ...], lock: int, progress: Progress
) -> list[str]:
    """Fill the empty directory `tree` with an environment that has `packages`; returns ``name==version`` lines.

    `lock` is a file that the installer keeps open as long as it lives. Raises TemplateFailed with the end of
    the installer's output.
    """
    site = environment_layout(tree, interpreter)
    what = ", ".join(packages)
    commands = installers(interpreter, site, packages)
    if not commands:
        raise TemplateFailed(
            f"can't install {what}", why="neither uv nor pip is there", fix=f"run: {sys.executable} -m ensurepip"
        )
    said = ""
    for command in commands:
        progress(f"installing {what}")
        try:
            await _run(command, lock, progress)
            break
        except _InstallerFailed as error:
            said = said or str(error)
            shutil.rmtree(site)
            site.mkdir()
    else:
        raise TemplateFailed(
            f"can't install {what}", why=said, fix="check the network and the package index's settings"
        )
    progress("compiling to bytecode")
    await _compile(site, interpreter, lock)
    _settle_scripts(tree, site)
    return sorted(_installed(site))


def _refused(what: str, said: str) -> TemplateFailed | NoSpace:
    if "No space left" in said:
        return NoSpace(f"no space left to install {what}", why=said, fix="free some disk, or move TARTARUS_HOME")
    return TemplateFailed(f"can't install {what}", why=said, fix="check the network and the package index's settings")


async def _compile(site: Path, interpreter: Interpreter, lock: int) -> None:
    # Unchecked: the files never change, and a check would cost a stat for each import. Packages' own tests are
    # hardly ever imported and would be half of the work.
    options = ["-q", "--invalidation-mode", "unchecked-hash", "-x", "/tests?/"]
    try:
        await _run([interpreter.path, "-I", "-m", "compileall", *options, str(site)], lock, lambda _line: None)
    except _InstallerFailed:
        # A file for another Python version does not compile; it would not import either.
        return


def _settle_scripts(tree: Path, site: Path) -> None:
    """Move what --target put beside the packages to where an environment has it, and fix its first lines."""
    if (site / "share").is_dir():
        (site / "share").rename(tree / "share")
    if not (site / "bin").is_dir():
        return
    shutil.rmtree(site / "bin" / "__pycache__", ignore_errors=True)
    for script in (site / "bin").iterdir():
        content = script.read_bytes()
        fixed = re.sub(rb"\A#![^\n]*python[^\n]*", f"#!{VENV}/bin/python3".encode(), content)
        place = tree / "bin" / script.name
        if not place.is_symlink():
            place.write_bytes(fixed)
            place.chmod(0o755)
    shutil.rmtree(site / "bin")


def _installed(site: Path) -> list[str]:
    """``name==version`` of each distribution in `site`."""
    found = []
    for info in site.glob("*.dist-info"):
        name, _, version = info.name.removesuffix(".dist-info").partition("-")
        found.append(f"{name}=={version}")
    return found


def _environ() -> dict[str, str]:
    """The installer's environment: ours, with proxies and index settings, but nothing that steers Python."""
    steers = ("PYTHON", "VIRTUAL_ENV", "CONDA")
    ours = {name: value for name, value in os.environ.items() if not name.startswith(steers)}
    return ours | {"PIP_REQUIRE_VIRTUALENV": "0", "PIP_USER": "0", "NO_COLOR": "1"}


async def _run(command: list[str], lock: int, progress: Progress) -> None:
    """Run one installer to its end, passing on what it says. Raises _InstallerFailed with the last of it."""
    tied = [sys.executable, "-I", "-S", "-c", _TIED_TO_PARENT, str(os.getpid()), *command]
    process = await asyncio.create_subprocess_exec(
        *tied,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=_environ(),
        cwd="/",
        pass_fds=(lock,),
        start_new_session=True,
        umask=0o022,
    )
    tail: deque[str] = deque(maxlen=_TAIL_LINES)
    try:
        async with asyncio.timeout(_INSTALL_TIMEOUT_S):
            assert process.stdout is not None
            while line := await _line(process.stdout):
                tail.append(line)
                progress(line)
            status = await process.wait()
    except TimeoutError:
        tail.append(f"gave up after {_INSTALL_TIMEOUT_S} seconds")
        status = -1
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    if status != 0:
        raise _InstallerFailed("\n".join(tail) or f"{command[0]} ended with status {status}")


async def _line(stream: asyncio.StreamReader) -> str:
    """The next non-empty line; nothing at the end. Overlong ones, which no installer means to print, are skipped."""
    while True:
        try:
            raw = await stream.readline()
        except ValueError:
            continue
        text = raw.decode("utf-8", "replace").strip()
        if text or not raw:
            return text
