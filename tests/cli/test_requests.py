"""What the options ask for: the JSON on the wire is a spec that the daemon takes."""

from __future__ import annotations

import os
import stat

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tartarus.cli import requests
from tartarus.cli.options import EXEC, RUN
from tartarus.cli.quick import parse
from tartarus.model.errors import InvalidRequest
from tartarus.model.sandbox import ExecSpec, SandboxSpec
from tartarus.sdk.shorthand import environment, labels


def spec_of(*arguments: str) -> SandboxSpec:
    parsed = parse(arguments, RUN)
    assert parsed is not None
    return msgspec.json.decode(requests.encode(requests.run_spec(*parsed)), type=SandboxSpec)


def test_everything_at_once(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINE", "m")
    spec = spec_of(
        "--template", "python-ds", "--isolation", "process", "--memory", "64MiB", "--cpus", "0.5", "--pids", "9",
        "--disk", "2MiB", "--timeout", "1.5s", "-e", "A=1=2", "-e", "MINE", "-e", "ABSENT", "-w", "/work",
        "--mount", "here:/there:ro", "--name", "n", "--label", "k=v=w", "-t", "--", "echo", "-n", "é",
    )  # fmt: skip
    assert spec.template == "python-ds"
    assert spec.isolation.value == "process"
    assert msgspec.structs.astuple(spec.resources) == (64 * 1024**2, 500, 9, 2 * 1024**2)
    assert spec.timeout_s == 1.5
    assert spec.env == {"A": "1=2", "MINE": "m"}
    assert spec.workdir == "/work"
    assert spec.mounts[0].source == str(tmp_path / "here")
    assert spec.mounts[0].read_only
    assert (spec.name, spec.labels) == ("n", {"k": "v=w"})
    assert spec.command is not None
    assert spec.command.argv == ("echo", "-n", "é")
    assert spec.command.tty


def test_a_snapshot_instead_of_a_template():
    assert spec_of("--snapshot", "before", "--", "true").snapshot == "before"


def test_nothing_given_is_all_defaults():
    assert spec_of("--", "true").resources == SandboxSpec().resources


def test_exec():
    parsed = parse(["-e", "A=1", "-w", "/x", "--timeout", "2m", "sbx", "ls", "-l"], EXEC)
    assert parsed is not None
    spec = msgspec.convert(requests.exec_spec(parsed[0], "sbx", parsed[1][1:]), ExecSpec)
    assert (spec.argv, spec.env, spec.workdir, spec.timeout_s) == (("ls", "-l"), {"A": "1"}, "/x", 120)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--memory", "lots", "true"], "'lots' is not a size (write it like 512MiB or 2GiB)"),
        (["--cpus", "x", "true"], "not a CPU count"),
        (["--timeout", "soon", "true"], "not a duration"),
        (["--label", "x", "true"], "not a label"),
        (["-e", "=x", "true"], "not a variable"),
        (["--mount", "/a", "true"], "not a mount"),
        (["--mount", "/a:/b:rx", "true"], "not a mount"),
        ([], "no command given"),
        ([""], "no command given"),
        (["echo", "\udcff"], "not UTF-8 text: it holds the byte 0xff"),
    ],
)
def test_bad_input(arguments, said):
    with pytest.raises(InvalidRequest) as caught:
        spec_of(*arguments)
    assert said in str(caught.value)


@given(st.dictionaries(st.text(min_size=1).filter(lambda name: "=" not in name), st.text()))
def test_pairs_survive(pairs):
    words = [f"{name}={value}" for name, value in pairs.items()]
    assert environment(words, {}) == pairs
    assert labels(words) == pairs


class TestStandardInput:
    """Forwarded from pipes and files; from a terminal only with -i; never from /dev/null."""

    @pytest.fixture(autouse=True)
    def own_stdin(self):
        saved = os.dup(0)
        yield
        os.dup2(saved, 0)
        os.close(saved)

    def put(self, fd: int) -> None:
        os.dup2(fd, 0)
        os.close(fd)

    def test_pipe(self):
        reader, writer = os.pipe()
        self.put(reader)
        assert requests.forwards_stdin(False)
        os.close(writer)

    def test_file(self, tmp_path):
        self.put(os.open(tmp_path / "x", os.O_CREAT | os.O_RDONLY))
        assert stat.S_ISREG(os.fstat(0).st_mode)
        assert requests.forwards_stdin(False)

    def test_null(self):
        self.put(os.open("/dev/null", os.O_RDONLY))
        assert not requests.forwards_stdin(False)
        assert not requests.forwards_stdin(True)

    def test_terminal(self):
        master, slave = os.openpty()
        self.put(slave)
        assert not requests.forwards_stdin(False)
        assert requests.forwards_stdin(True)
        os.close(master)

    def test_closed(self):
        os.close(0)
        assert not requests.forwards_stdin(True)
