"""Real builds: of small wheels made here, and once per session of python-ds."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tartarus.images import PreparedTemplate, catalogue, prepare
from tartarus.model.settings import Settings
from tartarus.model.template import Template

MakeWheel = Callable[..., Path]


def _record(name: str, content: bytes) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    return f"{name},sha256={digest},{len(content)}"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of distributions that is the only index the installers know."""
    folder = tmp_path / "index"
    folder.mkdir()
    for tool in ("UV", "PIP"):
        monkeypatch.setenv(f"{tool}_FIND_LINKS", str(folder))
        monkeypatch.setenv(f"{tool}_NO_INDEX", "1")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return folder


@pytest.fixture
def make_wheel(index: Path) -> MakeWheel:
    """Puts a pure Python wheel with one module and one console script into the index."""

    def make(name: str, version: str = "1.0", body: str = "ANSWER = 42\n") -> Path:
        info = f"{name}-{version}.dist-info"
        files = {
            f"{name}.py": body.encode(),
            f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode(),
            f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            f"{info}/entry_points.txt": f"[console_scripts]\n{name}-tool = {name}:main\n".encode(),
        }
        record = [_record(path, content) for path, content in files.items()]
        path = index / f"{name}-{version}-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for place, content in files.items():
                archive.writestr(place, content)
            archive.writestr(f"{info}/RECORD", "\n".join([*record, f"{info}/RECORD,,"]) + "\n")
        return path

    return make


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings.at(tmp_path / "home")


@pytest.fixture(scope="session")
def session_settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return Settings.at(tmp_path_factory.mktemp("templates"))


@pytest.fixture(scope="session")
def host(session_settings: Settings) -> PreparedTemplate:
    """The prepared template `host`."""
    return asyncio.run(prepare(catalogue()["host"], session_settings, None, lambda _line: None))


@pytest.fixture(scope="session")
def python_ds(session_settings: Settings) -> PreparedTemplate:
    """The prepared template `python-ds`."""
    return asyncio.run(prepare(catalogue()["python-ds"], session_settings, None, lambda _line: None))


def run_inside(prepared: PreparedTemplate, *argv: str) -> subprocess.CompletedProcess[str]:
    """Run a command under a prepared root with bubblewrap: the root file system by itself, without our runtimes."""
    binds = [word for source, target in prepared.binds for word in ("--ro-bind", source, target)]
    env = {"HOME": "/root", "LANG": "C.UTF-8"} | prepared.template.env
    sets = [word for name, value in env.items() for word in ("--setenv", name, value)]
    command = [
        "bwrap", "--unshare-all", "--clearenv", *sets, "--ro-bind", str(prepared.layers[0]), "/", *binds,
        "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp", "--tmpfs", "/work", "--chdir", "/work", *argv,
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def small_template(*packages: str) -> Template:
    """A template with these packages and nothing else."""
    return Template(id="small", name="Small", python_packages=packages)
