"""The short way reads a command line as click does, or leaves it to click."""

from __future__ import annotations

import click
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tartarus.cli.app import app
from tartarus.cli.launching import execute, run
from tartarus.cli.options import EXEC, RUN
from tartarus.cli.quick import parse
from tartarus.model.sandbox import Isolation

WORDS = [
    *(flag for option in RUN for flag in option.flags), "--", "-", "", "true", "-it", "-itd", "-eA=1", "-e", "A=1",
    "--env=B", "--pids=5", "-5", "--pids", "5", "+5", "1_0", "--json=1", "--isolation=process", "process", "magic",
    "-x", "--unknown", "-h", "--help", "--name=", "-w/tmp", "-wi", "-iw", "é", "--no-json", "--mem", "none",
    "-qv", "-d-",
]  # fmt: skip


def by_click(command: click.Command, arguments: list[str]):
    # As under the group: click keeps the first help option that a command was asked for.
    context = command.make_context(command.name, list(arguments), **app.context_settings)
    values = dict(context.params)
    words = list(values.pop("words"))
    if "sandbox" in values:
        sandbox = values.pop("sandbox")
        words = [*([] if sandbox is None else [sandbox]), *words]
    return values, words


@pytest.mark.parametrize(("command", "options"), [(run, RUN), (execute, EXEC)])
@given(arguments=st.lists(st.sampled_from(WORDS), max_size=7))
@example(arguments=["-it", "--", "sh", "-c", "--", "x"])
@example(arguments=["--name", "--", "true"])
@example(arguments=["sbx-1", "--", "ls", "-l"])
def test_what_it_accepts_click_reads_the_same(command, options, arguments):
    parsed = parse(arguments, options)
    if parsed is not None:
        assert by_click(command, arguments) == parsed


@pytest.mark.parametrize(
    "line",
    [
        "-- true",
        "python3 -c print(1)",
        "--template python-ds --isolation=container --memory 512MiB --cpus 2 --timeout 30s -- python3 -",
        "-e A=1 --env B -w /work --mount /a:/b:ro --network none -it --name x --label k=v --pids 7 --disk 1GiB true",
        "-d --json -q true",
        "-itv sh",
    ],
)
def test_every_ordinary_line_takes_the_short_way(line):
    parsed = parse(line.split(), RUN)
    assert parsed is not None
    assert by_click(run, line.split()) == parsed


@pytest.mark.parametrize(
    "line", ["--help", "--bad true", "--isolation magic true", "--pids x true", "-e", "--tty=1 true"]
)
def test_the_unusual_is_left_to_click(line):
    assert parse(line.split(), RUN) is None


def test_choices_are_the_models():
    choices = {option.name: option.choices for option in RUN}
    assert set(choices["isolation"]) == {level.value for level in Isolation}
