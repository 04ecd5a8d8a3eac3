"""What the documentation tells people to type works as it says, with a daemon of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.project.test_project import ROOT

TARTARUS = str(Path(sys.executable).with_name("tartarus"))


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    """A state directory with a short path, for the socket; its daemon is stopped at the end."""
    with tempfile.TemporaryDirectory(prefix="tartarus-docs-") as place:
        Path(place).chmod(0o711)
        yield Path(place)
        subprocess.run([TARTARUS, "down"], env=environ(Path(place)), capture_output=True, timeout=60, check=False)


def environ(home: Path) -> dict[str, str]:
    path = f"{Path(TARTARUS).parent}:{os.environ['PATH']}"
    return {**os.environ, "TARTARUS_HOME": str(home), "PATH": path}


def blocks(page: str, language: str) -> list[str]:
    # A block inside a list is indented with it.
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    return ["".join(line.removeprefix(indent) for line in body.splitlines(keepends=True)) for indent, body in found]


@pytest.mark.parametrize("page", ["README.md", "docs/quick-start.md"])
def test_python_examples_run(home: Path, page: str) -> None:
    (program,) = blocks(page, "python")
    done = subprocess.run(
        [sys.executable, "-c", program], env=environ(home), capture_output=True, text=True, timeout=240, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def shell_lines() -> Iterator[tuple[str, str]]:
    """(command, output that is shown) of every example with an output."""
    for page in ("README.md", "docs/quick-start.md"):
        for block in blocks(page, "console"):
            lines = block.splitlines()
            for number, line in enumerate(lines):
                shown = lines[number + 1 : number + 2]
                if line.startswith("$ ") and "tartarus run" in line and shown and not shown[0].startswith("$ "):
                    yield line.removeprefix("$ "), shown[0]


@pytest.mark.parametrize(("command", "output"), list(shell_lines()))
def test_commands_print_what_is_shown(home: Path, command: str, output: str) -> None:
    done = subprocess.run(
        ["bash", "-c", command], env=environ(home), capture_output=True, text=True, timeout=240, check=False
    )
    assert done.stdout.strip() == output


def test_a_service_is_started_used_and_ended_as_shown(home: Path) -> None:
    (block,) = [block for block in blocks("docs/quick-start.md", "console") if "--name web" in block]
    commands = [line.removeprefix("$ ") for line in block.splitlines()]
    # The page's reader has notes and ends `--follow` with Ctrl-C; and types more slowly than a server starts.
    script = "\n".join(
        f"for try in $(seq 100); do {line} && break; sleep 0.1; done"
        if " exec " in line
        else line.replace("--follow ", "")
        for line in commands
    )
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "notes.txt").write_text("remember")
        done = subprocess.run(
            ["bash", "-e", "-c", script],
            cwd=folder,
            env=environ(home),
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert "200" in done.stdout.splitlines()
    assert "running" in done.stdout


def test_hello_shows_cold_and_warm(home: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "examples/hello.py"],
        env=environ(home),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "\nHello from Tartarus\n" in done.stdout
    assert done.stdout.count("Reykjavik") == 2
    assert done.stdout.count("  isolation ") == 3
    assert "(warm" in done.stdout.splitlines()[-3]
