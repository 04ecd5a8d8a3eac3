"""What people see: tables as in the roadmap, times, one-line errors, stamped logs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tartarus.cli.copying import place
from tartarus.cli.logs import Stamped, json_line, utc
from tartarus.cli.output import error_line, one_line
from tartarus.cli.show import ago, duration, table
from tartarus.model.errors import InvalidRequest, TemplateNotFound
from tartarus.model.signals import signal_number
from tartarus.sdk import LogEntry


def test_the_table_of_the_roadmap():
    head = ["ID", "TEMPLATE", "STATUS", "STARTED", "DURATION"]
    rows = [
        ["sbx-abc123", "python-ds", "running", ago(133), duration(133)],
        ["sbx-def456", "x", "paused", "a\nb", "\x1b[2J"],
    ]
    assert table(head, rows).splitlines() == [
        "ID           TEMPLATE    STATUS    STARTED         DURATION",
        "sbx-abc123   python-ds   running   2 minutes ago   2m13s",
        "sbx-def456   x           paused    a b             \\x1b[2J",
    ]


@pytest.mark.parametrize(
    ("seconds", "long_ago", "length"),
    [
        (-1, "0 seconds ago", "0.0s"), (0.3, "0 seconds ago", "0.3s"), (1, "1 second ago", "1.0s"),
        (42, "42 seconds ago", "42s"), (302, "5 minutes ago", "5m02s"), (3600, "1 hour ago", "1h00m"),
        (90000, "1 day ago", "1d01h"),
    ],
)  # fmt: skip
def test_times(seconds, long_ago, length):
    assert ago(seconds) == long_ago
    assert duration(seconds) == length


@given(st.text())
def test_one_line_is_one_printable_line(text):
    assert one_line(text).isprintable()


def test_errors_say_code_what_why_and_what_to_do():
    error = TemplateNotFound("no template 'x'", why="it was never made", fix="see: tartarus template list")
    assert error_line(error) == (
        "tartarus: error[template_not_found]: no template 'x': it was never made (see: tartarus template list)"
    )


@given(st.lists(st.binary(max_size=30), max_size=8))
def test_stamps_begin_lines_and_change_nothing_else(chunks):
    stamped = Stamped()
    shown = b"".join(stamped.stamp(1, LogEntry(1736937000 * 10**9, "stdout", chunk)) for chunk in chunks)
    whole = b"".join(chunks)
    expected = [b"[2025-01-15T10:30:00Z] " + line for line in whole.split(b"\n")]
    if not whole or whole.endswith(b"\n"):
        expected[-1] = b""
    assert shown == b"\n".join(expected)


def test_log_lines_as_json():
    assert utc(0) == "1970-01-01T00:00:00Z"
    assert json_line(LogEntry(0, "stderr", b"\xff")).endswith(b'"stream":"stderr","base64":"/w=="}\n')
    assert b'"text":"hi"' in json_line(LogEntry(0, "stdout", b"hi"))


@pytest.mark.parametrize(("text", "number"), [("9", 9), ("TERM", 15), ("sigterm", 15), ("SIGUSR1", 10)])
def test_signals(text, number):
    assert signal_number(text) == number


@pytest.mark.parametrize("text", ["", "0", "99", "NOPE", "SIG", "-9", "_SETMASK", "BLOCK"])
def test_not_signals(text):
    with pytest.raises(InvalidRequest):
        signal_number(text)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("sbx-1:/a", ("sbx-1", "/a")), ("name:a/b", ("name", "/a/b")), ("n:", ("n", "/")), ("./a:b", None),
        ("/a:b", None), ("a/b:c", None), ("plain", None), ("-", None),
    ],
)  # fmt: skip
def test_copy_places(text, found):
    assert place(text) == found
