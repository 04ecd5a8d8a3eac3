"""The repository itself: nothing of one machine in it, the public names as promised, the build as described."""

from __future__ import annotations

import ast
import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.needs("git")
def test_nothing_of_one_machine_is_committed() -> None:
    checks = load("scripts/check_project.py")
    found = []
    for path in checks.committed():
        try:
            found += checks.findings_in(str(path.relative_to(ROOT)), path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            continue
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "cd /work/main && make",
        "python = /root/.pyenv/bin/python",
        "--index-url https://" + "pypi" + ".org/simple",
        "wget http://" + "deb." + "debian.org/x",
        "# TO" + "DO: later",
        "raise NotImplemented" + "Error",
    ],
)
def test_the_check_finds_what_it_is_for(line: str) -> None:
    assert len(list(load("scripts/check_project.py").findings_in("a.py", line))) == 1


@pytest.mark.parametrize("line", ["workdir: str = '/work'", "HOME=/root", "/home/user is the sandbox's", "/root/.."])
def test_the_check_knows_the_sandboxes_own_places(line: str) -> None:
    assert list(load("scripts/check_project.py").findings_in("a.py", line)) == []


def test_the_package_exports_what_the_readme_shows() -> None:
    import tartarus

    assert sorted(tartarus.__all__) == ["AsyncSandbox", "Sandbox", "TartarusError", "__version__"]
    for name in tartarus.__all__:
        assert getattr(tartarus, name) is not None
    assert (Path(tartarus.__file__).parent / "py.typed").is_file()


def test_the_sdk_has_every_name_twice() -> None:
    from tartarus import AsyncSandbox, Sandbox

    def public(cls: type) -> set[str]:
        return {name for name in vars(cls) if not name.startswith("_")}

    assert public(Sandbox) == public(AsyncSandbox)


def test_importing_the_package_starts_nothing() -> None:
    program = "import sys, tartarus; print(*sorted(m for m in sys.modules if m.startswith('tartarus')))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["tartarus"]


def test_every_lint_exclusion_has_its_reason() -> None:
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    start = lines.index("ignore = [")
    end = lines.index("]", start)
    without = [line for line in lines[start + 1 : end] if "#" not in line]
    assert without == []


def test_dependencies_have_no_needless_upper_bounds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    # uvicorn: our WebSocket protocol extends one of its internal classes.
    bounded = [name for name in project["dependencies"] if "<" in name or "==" in name]
    assert [name for name in bounded if not name.startswith("uvicorn")] == []


def imported(folder: Path) -> set[str]:
    """The third-party packages that the sources in a folder import."""
    found = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names = [node.module]
            found |= {name.partition(".")[0] for name in names}
    return found - set(sys.stdlib_module_names) - {"tartarus", "tests", "benchmarks"}


def test_what_is_imported_is_declared_and_what_is_declared_is_used() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[<>=\[]", name)[0].replace("-", "_") for name in project["dependencies"]}
    modules = {"dnspython": "dns", "packageurl_python": "packageurl", "pyyaml": "yaml"}
    declared = {modules.get(name, name) for name in declared}
    # boto3 brings it, and only its classes of errors are named.
    optional = {re.split(r"[<>=\[]", name)[0] for name in project["optional-dependencies"]["aws"]} | {"botocore"}
    # A part of the server that it picks up by itself.
    assert imported(ROOT / "src") == declared - {"httptools"} | optional
    extras = {re.split(r"[<>=\[]", name)[0] for name in project["optional-dependencies"]["dev"]}
    # atheris fuzzes by hand only; hypothesis tries the same in every run.
    extras = {{"cyclonedx-python-lib": "cyclonedx"}.get(name, name) for name in extras}
    assert imported(ROOT / "tests") - {"atheris"} <= declared | extras | optional


@pytest.mark.needs("cc")
def test_the_wheel_has_the_agent_and_fits_any_c_library(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert "py3-none-manylinux2014_" in wheel.name
    assert "musllinux_1_1_" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        agent = archive.getinfo("tartarus/guest/bin/tartarus-guest")
        assert archive.read(agent)[:4] == b"\x7fELF"
        assert agent.external_attr >> 16 & 0o111, "executable"
        assert "tartarus/guest/runner.py" in archive.namelist()
        assert not [name for name in archive.namelist() if name.endswith((".o", "_test"))]


@pytest.mark.needs("cc")
def test_the_agent_is_static(tmp_path: Path) -> None:
    built = load("scripts/build_agent.py").build(tmp_path / "bin" / "agent", strict=True)
    header = built.read_bytes()
    assert header[:4] == b"\x7fELF"
    assert b"/lib64/ld-linux" not in header
    assert b"/lib/ld-musl" not in header
    assert built.stat().st_mode & 0o111


@pytest.mark.needs("cc")
def test_make_is_not_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builder = load("scripts/build_agent.py")
    monkeypatch.setattr(
        builder.shutil, "which", lambda name, found=shutil.which: None if name == "make" else found(name)
    )
    built = builder.build(tmp_path / "agent", strict=True)
    assert subprocess.run([built], capture_output=True, text=True, check=False).stderr.startswith("usage: ")


def test_without_a_compiler_the_build_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builder = load("scripts/build_agent.py")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(builder, "zig_compiler", lambda: None)
    with pytest.raises(SystemExit, match="pip install ziglang"):
        builder.build(tmp_path / "agent")
    assert list(tmp_path.iterdir()) == []


def test_the_example_data_is_what_its_script_makes() -> None:
    script = ROOT / "examples/data/make_daylight.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    assert done.stdout == (ROOT / "examples/data/daylight.csv").read_text()
