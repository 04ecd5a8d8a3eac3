"""A real program, from a real toolchain, by way of the daemon: command line and SDK."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.sdk.service import home, levels

from tartarus.model.errors import FileFailed, ModuleRefused
from tartarus.sdk import AsyncSandbox, Sandbox
from tartarus.sdk.places import Places

__all__ = ["home", "levels"]

pytestmark = [pytest.mark.needs("root", "wasi-libc")]
PRINTED = b"2 an arg /work\nsum 42\npasswd: No such file or directory\nentries 3\n"
PATIENCE_S = 120


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("wasm") / "program.wasm"
    argv = ["clang", "--target=wasm32-wasi", "--sysroot=/usr", "-O1", "-Wall", "-Werror"]
    source = Path(__file__).with_name("program.c")
    subprocess.run([*argv, "-o", str(made), str(source)], check=True, timeout=PATIENCE_S)
    return made


def tartarus(*arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "tartarus.cli.main", *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, timeout=PATIENCE_S, check=False)


def test_the_command_line_runs_a_file_that_is_named_wasm(home: Places, program: Path, monkeypatch) -> None:
    monkeypatch.chdir(program.parent)
    for name in ("program.wasm", "./program.wasm", str(program)):
        done = tartarus("run", name, "an arg", stdin=b"40\n2\n")
        assert (done.stdout, done.stderr, done.returncode) == (PRINTED, b"said\n", 5)


def test_detached_it_is_listed_and_its_log_is_kept(home: Places, program: Path) -> None:
    made = tartarus("run", "-d", "--name", "wasm-job", str(program), "an arg")
    assert made.returncode == 0, made.stderr
    record = Sandbox.connect(made.stdout.decode().strip()).wait()
    assert (record.isolation.value, record.exit_code) == ("wasm", 5)
    assert tartarus("logs", "wasm-job").stdout == PRINTED.replace(b"sum 42", b"sum 0")


def test_fuel_is_an_option(home: Places, program: Path) -> None:
    done = tartarus("run", "--fuel", "10", str(program))
    assert done.returncode == 134
    assert b"all fuel consumed" in done.stderr


def test_what_is_no_module_is_refused_before_a_sandbox_is_made(home: Places, tmp_path: Path) -> None:
    (tmp_path / "bad.wasm").write_bytes(b"not this")
    done = tartarus("run", str(tmp_path / "bad.wasm"))
    assert done.returncode == 125
    assert b"module_refused" in done.stderr


def test_the_sdk_takes_a_path_or_bytes(home: Places, program: Path) -> None:
    for module in (str(program), program, program.read_bytes()):
        with Sandbox.create(module=module, timeout_s=60) as sandbox:
            done = sandbox.run(["prog", "an arg"], input=b"40\n2\n")
            assert (done.stdout.encode(), done.exit_code) == (PRINTED, 5)
            assert sandbox.files.read("/work/out.txt") == b"written by C\n"
    with pytest.raises(FileFailed):
        Sandbox.create(module=program.parent / "missing")
    with pytest.raises(ModuleRefused):
        Sandbox.create(module=b"\0asm\1\0\0\0junk")


@pytest.mark.anyio
async def test_so_does_the_async_sdk(home: Places, program: Path) -> None:
    async with AsyncSandbox.create(module=program, fuel=10**9, timeout_s=60) as sandbox:
        done = await sandbox.run(["prog", "an arg"], input=b"40\n2\n")
        assert (done.stdout.encode(), done.exit_code) == (PRINTED, 5)


def test_nothing_of_the_host_s_environment_is_handed_on(home: Places, program: Path) -> None:
    os.environ["HOME_OF_SECRETS"] = "x"
    with Sandbox.create(module=program, timeout_s=60, env={"HOME": "/tmp"}) as sandbox:
        assert sandbox.run(["prog"]).stdout.startswith("1  /tmp\n")
    del os.environ["HOME_OF_SECRETS"]
