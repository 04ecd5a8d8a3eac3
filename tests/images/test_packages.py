"""Templates with Python packages: installed once, without running anything of theirs on the host."""

from __future__ import annotations

import asyncio
import io
import os
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
from tests.images.conftest import MakeWheel, run_inside, small_template

from tartarus.images import PreparedTemplate, catalogue, packages, prepare
from tartarus.images.entries import text
from tartarus.images.interpreter import find_interpreter
from tartarus.images.skeleton import skeleton
from tartarus.model.errors import TemplateFailed
from tartarus.model.settings import Settings

pytestmark = pytest.mark.anyio


def environment_of(prepared: PreparedTemplate) -> Path:
    return prepared.layers[0] / "opt/tartarus/venv"


def output_of(python: Path, code: str) -> str:
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout


async def test_packages_are_importable_wherever_the_environment_lies(settings: Settings, make_wheel: MakeWheel) -> None:
    make_wheel("tinypkg")
    said: list[str] = []
    prepared = await prepare(small_template("tinypkg"), settings, None, said.append)
    python = environment_of(prepared) / "bin/python3"
    done = subprocess.run(
        [python, "-c", "import tinypkg; print(tinypkg.ANSWER)"], capture_output=True, text=True, check=True
    )
    assert done.stdout == "42\n"
    assert "installing tinypkg" in said
    assert "compiling to bytecode" in said


@pytest.mark.needs("bwrap")
async def test_inside_the_sandbox_the_scripts_work_too(settings: Settings, make_wheel: MakeWheel) -> None:
    make_wheel("tinypkg", body="import sys\ndef main():\n    print(sys.prefix)\n")
    prepared = await prepare(small_template("tinypkg"), settings, None, lambda _line: None)
    done = run_inside(prepared, "/opt/tartarus/venv/bin/tinypkg-tool")
    assert (done.stdout, done.stderr) == ("/opt/tartarus/venv\n", "")


async def test_bytecode_is_compiled_ahead_and_never_checked(settings: Settings, make_wheel: MakeWheel) -> None:
    make_wheel("tinypkg")
    prepared = await prepare(small_template("tinypkg"), settings, None, lambda _line: None)
    (compiled,) = environment_of(prepared).rglob("tinypkg.*.pyc")
    flags = int.from_bytes(compiled.read_bytes()[4:8], "little")
    assert flags == 0b01, "hash-based, unchecked (PEP 552)"


async def test_nothing_of_the_hosts_packages_is_visible(settings: Settings, make_wheel: MakeWheel) -> None:
    make_wheel("tinypkg")
    prepared = await prepare(small_template("tinypkg"), settings, None, lambda _line: None)
    python = environment_of(prepared) / "bin/python3"
    assert "dist-packages" not in output_of(python, "import sys; print(sys.path)")


async def test_a_source_distribution_is_refused_and_not_run(settings: Settings, index: Path, tmp_path: Path) -> None:
    trap = tmp_path / "it-ran"
    setup = (
        f"open({str(trap)!r}, 'w').close()\nfrom setuptools import setup\nsetup(name='evil', version='1.0')\n".encode()
    )
    with tarfile.open(index / "evil-1.0.tar.gz", "w:gz") as archive:
        for name, content in (("evil-1.0/setup.py", setup), ("evil-1.0/PKG-INFO", b"Name: evil\nVersion: 1.0\n")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    with pytest.raises(TemplateFailed):
        await prepare(small_template("evil"), settings, None, lambda _line: None)
    assert not trap.exists()


async def test_a_path_file_in_a_package_is_not_run_on_the_host(
    settings: Settings, make_wheel: MakeWheel, tmp_path: Path
) -> None:
    trap = tmp_path / "it-ran"
    wheel = make_wheel("tinypkg")
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("evil.pth", f"import os; open({str(trap)!r}, 'w').close()\n")
    await prepare(small_template("tinypkg"), settings, None, lambda _line: None)
    assert not trap.exists()


async def test_a_missing_package_says_what_the_installer_said(settings: Settings, index: Path) -> None:
    with pytest.raises(TemplateFailed) as caught:
        await prepare(small_template("no-such-package"), settings, None, lambda _line: None)
    assert "no-such-package" in caught.value.what
    assert "no-such-package" in caught.value.why
    assert caught.value.fix
    templates = settings.cache_dir / "templates"
    assert list(templates.iterdir()) == []


async def test_the_host_changing_does_not_install_again(
    settings: Settings, make_wheel: MakeWheel, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_wheel("tinypkg")
    first = await prepare(small_template("tinypkg"), settings, None, lambda _line: None)
    entries, binds = skeleton(find_interpreter())
    monkeypatch.setattr("tartarus.images.preparing.skeleton", lambda _i: ([*entries, text("/etc/new", "x")], binds))
    said: list[str] = []
    second = await prepare(small_template("tinypkg"), settings, None, said.append)
    assert second.digest != first.digest
    assert said == ["making the root file system of small"]
    module = f"lib/{find_interpreter().lib_name}/site-packages/tinypkg.py"
    assert (environment_of(second) / module).samefile(environment_of(first) / module)


@pytest.mark.needs("root")
async def test_the_files_are_the_sandbox_users(settings: Settings, make_wheel: MakeWheel) -> None:
    make_wheel("tinypkg")
    prepared = await prepare(small_template("tinypkg"), settings, 100000, lambda _line: None)
    environment = environment_of(prepared)
    assert {path.lstat().st_uid for path in [environment, *environment.rglob("*")]} == {100000}


async def test_without_uv_pip_does_it(
    settings: Settings, make_wheel: MakeWheel, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_wheel("tinypkg")
    interpreter = find_interpreter()
    site = Path("/nowhere")
    by_pip = [command for command in packages.installers(interpreter, site, ()) if command[3] == "pip"]
    assert len(by_pip) == 1
    every = packages.installers

    monkeypatch.setattr(packages, "installers", lambda *given: [c for c in every(*given) if c[3] == "pip"])
    prepared = await prepare(small_template("tinypkg"), settings, None, lambda _line: None)
    python = environment_of(prepared) / "bin/python3"
    assert output_of(python, "import tinypkg") == ""
    assert (environment_of(prepared) / "bin/tinypkg-tool").is_file()


async def test_without_any_installer_the_error_says_how_to_get_one(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "installers", lambda *_given: [])
    with pytest.raises(TemplateFailed) as caught:
        await prepare(small_template("tinypkg"), settings, None, lambda _line: None)
    assert "ensurepip" in caught.value.fix


INSTALLING = """
import asyncio, os
from tartarus.images import packages
print(os.getpid(), flush=True)
asyncio.run(packages._run(["sh", "-c", "echo $$; sleep 1000"], 0, lambda line: print(line, flush=True)))
"""


def test_the_installer_dies_with_the_daemon() -> None:
    daemon = subprocess.Popen([sys.executable, "-c", INSTALLING], stdout=subprocess.PIPE, text=True)
    assert daemon.stdout is not None
    daemon.stdout.readline()
    installer = int(daemon.stdout.readline())
    daemon.kill()
    daemon.wait()
    daemon.stdout.close()
    # Ends when the installer does; the suite's own time limit bounds it.
    while _runs(installer):
        time.sleep(0.01)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


async def test_a_cancelled_install_ends_its_installer(tmp_path: Path) -> None:
    started = asyncio.Event()
    pids: list[int] = []

    def note(line: str) -> None:
        pids.append(int(line))
        started.set()

    lock = os.open(tmp_path / "lock", os.O_CREAT | os.O_RDWR)
    task = asyncio.create_task(packages._run(["sh", "-c", "echo $$; sleep 1000"], lock, note))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    os.close(lock)
    assert not _runs(pids[0])


class TestPythonDs:
    """The catalogue's data science template, from the package index."""

    @pytest.mark.needs("bwrap")
    def test_its_modules_compute(self, python_ds: PreparedTemplate) -> None:
        code = "import pandas, scipy.stats, sys; print(int(pandas.Series(range(10)).sum()), sys.executable)"
        done = run_inside(python_ds, "python3", "-c", code)
        assert (done.stdout, done.stderr) == ("45 /opt/tartarus/venv/bin/python3\n", "")

    @pytest.mark.needs("bwrap")
    def test_figures_can_be_drawn_without_a_display(self, python_ds: PreparedTemplate) -> None:
        code = "import matplotlib.pyplot as p; p.plot([1, 2]); p.savefig('/tmp/a.png'); print(p.get_backend())"
        done = run_inside(python_ds, "python3", "-c", code)
        assert done.stdout.strip().lower() == "agg"

    def test_what_is_imported_ahead_is_what_is_installed(self, python_ds: PreparedTemplate) -> None:
        warm_up = catalogue()["python-ds"].warm_up
        assert warm_up is not None
        assert tuple(name.partition(".")[0] for name in warm_up.imports) == catalogue()["python-ds"].python_packages
        assert os.path.lexists(python_ds.layers[0] / warm_up.interpreter.lstrip("/"))
