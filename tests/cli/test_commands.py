"""The other commands, with the real daemon: what they print, their statuses, and what they refuse."""

from __future__ import annotations

import json
import os
import subprocess

import pytest
from tests.cli.kit import PATIENCE_S, OnTerminal, refused, start, tartarus, text

from tartarus import Sandbox, __version__
from tartarus.cli.app import COMMANDS
from tartarus.model.states import State
from tartarus.sdk.daemon import try_connect
from tartarus.sdk.places import Places

pytestmark = pytest.mark.usefixtures("clean")


def test_ps(sandbox):
    with Sandbox.create(name="labelled", labels={"a": "b"}, isolation="process"):
        head, first, second = text("ps").splitlines()
        assert head.split() == ["ID", "TEMPLATE", "STATUS", "STARTED", "DURATION"]
        assert second.split()[:3] == [sandbox.id, "host", "running"]
        assert first.startswith("sbx-")
        wide = text("ps", "--wide", "--label", "a=b").splitlines()
        assert wide[0].split()[-2:] == ["NAME", "ISOLATION"]
        assert wide[1].split()[-2:] == ["labelled", "process"]
        assert len(wide) == 2
        assert [record["name"] for record in json.loads(text("ps", "--json"))] == ["labelled", ""]
    assert "labelled" in text("ps", "--all", "--wide")
    assert text("ps", "-q", "--state", "paused") == ""
    assert "not a label" in refused("ps", "--label", "x")
    assert "see: tartarus ps --help" in refused("ps", "--state", "x")


def test_inspect(sandbox):
    (record,) = json.loads(text("inspect", sandbox.id))
    assert (record["id"], record["state"]) == (sandbox.id, "running")
    done = tartarus("inspect", "nobody", sandbox.id)
    assert done.returncode == 125
    assert b"error[sandbox_not_found]" in done.stderr
    assert len(json.loads(done.stdout)) == 1


def test_logs():
    name = text("run", "-d", "--", "sh", "-c", "printf 'a\\nb'; sleep 0.1; echo e >&2; sleep 0.1; echo c").strip()
    followed = tartarus("logs", "--follow", name)
    assert (followed.stdout, followed.stderr) == (b"a\nbc\n", b"e\n")
    again = tartarus("logs", "-t", name)
    stamped = again.stdout.decode().splitlines()
    assert [line.split("] ", 1)[1] for line in stamped] == ["a", "bc"]
    assert stamped[0].startswith("[20")
    assert stamped[0].split("]")[0].endswith("Z")
    lines = [json.loads(line) for line in text("logs", "--json", name).splitlines()]
    assert "".join(line["text"] for line in lines if line["stream"] == "stdout") == "a\nbc\n"
    assert "error[sandbox_not_found]" in refused("logs", "nobody")


def test_following_ends_with_an_interrupt():
    name = text("run", "-d", "--", "sh", "-c", "echo on; sleep 1000").strip()
    with start("logs", "-f", name) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"on\n"
        process.send_signal(2)
        assert process.wait(PATIENCE_S) == 130
        assert process.stderr.read() == b""
    text("kill", "-q", name)


def test_kill():
    names = [text("run", "-d", "--", "sleep", "1000").strip() for _ in range(2)]
    done = tartarus("kill", names[0], "nobody", names[1])
    assert done.stdout.decode().splitlines() == [f"Sandbox {name} terminated" for name in names]
    assert done.returncode == 125
    assert b"error[sandbox_not_found]" in done.stderr
    assert text("kill", names[0]) == f"Sandbox {names[0]} terminated\n"
    trapped = text("run", "-d", "--", "sh", "-c", "trap 'exit 6' USR1; while :; do sleep 0.05; done").strip()
    assert text("kill", "--signal", "USR1", trapped) == ""
    record = Sandbox.connect(trapped).wait(30)
    assert record.exit_code in {6, 138}  # 138 when the signal came before the trap
    assert "not a signal" in refused("kill", "-s", "NOPE", trapped)


def test_pause_and_resume(sandbox):
    text("pause", sandbox.id)
    assert sandbox.refresh().state is State.PAUSED
    assert "error[invalid_state]" in refused("exec", sandbox.id, "true")
    text("resume", sandbox.id)
    assert text("exec", sandbox.id, "echo", "on") == "on\n"


def test_cp(sandbox, tmp_path):
    (tmp_path / "file").write_bytes(os.urandom(300_000))
    text("cp", str(tmp_path / "file"), f"{sandbox.id}:/work/")
    text("cp", f"{sandbox.id}:/work/file", str(tmp_path / "back"))
    assert (tmp_path / "back").read_bytes() == (tmp_path / "file").read_bytes()
    assert text("cp", "-", f"{sandbox.id}:work/piped", input=b"through a pipe") == ""
    assert text("cp", f"{sandbox.id}:/work/piped", "-") == "through a pipe"
    (tmp_path / "tree/sub").mkdir(parents=True)
    (tmp_path / "tree/sub/x").write_text("deep")
    text("cp", str(tmp_path / "tree"), f"{sandbox.id}:/work")
    text("cp", f"{sandbox.id}:/work/tree", str(tmp_path / "out"))
    assert (tmp_path / "out/sub/x").read_text() == "deep"
    sandbox.run(["ln", "-s", "/etc/passwd", "/work/tree/evil"])
    skipped = tartarus("cp", f"{sandbox.id}:/work/tree", str(tmp_path / "out2"))
    assert skipped.stderr == b"tartarus: skipped /work/tree/evil: a symbolic link that leads elsewhere\n"
    assert "No such file" in refused("cp", f"{sandbox.id}:/nope", str(tmp_path))
    assert "No such file" in refused("cp", str(tmp_path / "nope"), f"{sandbox.id}:/")
    assert "one side must be in a sandbox" in refused("cp", "a", "b")
    assert "one side must be in a sandbox" in refused("cp", "a:/x", "b:/x")
    assert "error[sandbox_not_found]" in refused("cp", str(tmp_path / "file"), "nobody:/x")


def test_top(sandbox):
    head, row = text("top", "--once").splitlines()
    assert head.split()[:4] == ["ID", "TEMPLATE", "STATUS", "CPU"]
    assert row.startswith(sandbox.id)
    (sample,) = json.loads(text("top", "--json"))
    assert sample["stats"]["memory_bytes"] > 0
    terminal = OnTerminal(["top", "--interval", "0.1"], rows=10, cols=200)
    for _ in range(3):
        terminal.expect(sandbox.id.encode())
    terminal.type(b"\x03")
    assert terminal.wait() == 0
    assert b"\x1b[?1049l" in terminal.close()


def test_templates():
    assert text("template", "list").splitlines()[0].split()[0] == "TEMPLATE"
    assert {"host", "python-ds"} <= {item["id"] for item in json.loads(text("template", "list", "--json"))}


def test_up_down_and_version(home: Places):
    first = json.loads(text("up", "--json"))
    assert first["socket"] == home.socket
    assert json.loads(text("version", "--json")) == {"client": __version__, "daemon": __version__}
    assert text("up").startswith(f"Daemon {__version__} running for ")
    assert text("down") == "Daemon stopped\n"
    assert text("down") == "The daemon is not running\n"
    assert try_connect(home) is None
    assert text("version") == f"tartarus {__version__}\ndaemon not running\n"
    assert text("--version") == f"tartarus {__version__}\n"
    assert text("up").startswith(f"Daemon {__version__} started ")
    assert json.loads(text("up", "--json"))["pid"] != first["pid"]


def test_down_under_a_running_command():
    with start("run", "--", "sh", "-c", "echo ready; sleep 1000") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"ready\n"
        assert text("down") == "Daemon stopped\n"
        assert process.wait(PATIENCE_S) == 125
        assert process.stderr.read().startswith(b"tartarus: error[sandbox_lost]: ")


def test_doctor(levels):
    done = tartarus("doctor")
    assert done.stderr == b""
    assert done.returncode == (0 if levels else 1)
    for level in levels:
        assert f"ok    level {level}" in done.stdout.decode()
    found = json.loads(tartarus("doctor", "--json").stdout)
    assert found["healthy"] == bool(levels)
    assert {check["name"] for check in found["checks"]} >= {"kernel", "seccomp", "Landlock", "cgroups"}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell):
    assert "_TARTARUS_COMPLETE" in text("completion", shell)


def test_completion(sandbox):
    def complete(line: str) -> list[str]:
        words = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - (not line.endswith(" ")))}
        done = tartarus(env={**os.environ, "_TARTARUS_COMPLETE": "bash_complete", **words})
        return [item.partition(",")[2] for item in done.stdout.decode().splitlines()]

    assert "run" in complete("tartarus r")
    assert "--template" in complete("tartarus run --te")
    assert complete("tartarus run --template py") == ["python-ds"]
    assert complete("tartarus kill sbx") == [sandbox.id]
    assert complete("tartarus exec sbx") == [sandbox.id]


@pytest.mark.parametrize("command", list(COMMANDS))
def test_every_command_explains_itself(command):
    shown = text(command, "--help")
    assert shown.startswith(f"Usage: tartarus {command}")


def test_help():
    shown = text("--help")
    for command, (_, line) in COMMANDS.items():
        assert f"{command} " in shown
        assert line in shown
    assert "Usage: tartarus" in tartarus().stdout.decode()


def test_output_to_nobody():
    for command in (["ps"], ["--help"], ["template", "list"]):
        with start(*command, stdin=subprocess.DEVNULL) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.close()
            assert process.wait(PATIENCE_S) in {0, 141}
            assert process.stderr.read() == b""
