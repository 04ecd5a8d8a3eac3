"""Bad input is refused before the daemon hears of it, with what is wrong and how to write it."""

from __future__ import annotations

import pytest

from tartarus.model.errors import InvalidRequest
from tartarus.model.sandbox import Isolation, Mount
from tartarus.sdk.specs import exec_spec, parse_mount, sandbox_spec


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"memory": "lots"}, "'lots' is not a size"),
        ({"memory": "1KiB"}, "below 8MiB"),
        ({"cpus": "0"}, "out of range"),
        ({"timeout_s": "never"}, "not a duration"),
        ({"isolation": "magic"}, "use one of: auto, process, container"),
        ({"network": "all"}, "use none, open, or a Contract"),
        ({"mounts": ["/a"]}, "not a mount"),
        ({"mounts": ["/a:/proc/x"]}, "would hide /proc"),
        ({"name": "a b"}, "not a valid name"),
        ({"command": "echo hello"}, "is one string"),
        ({"command": []}, "no command"),
        ({"env": {"A=B": "c"}}, "not a variable name"),
        ({"env": {"A": "\0"}}, "NUL"),
        ({"workdir": "relative"}, "not absolute"),
    ],
)
def test_refusals(arguments, said):
    with pytest.raises(InvalidRequest) as caught:
        sandbox_spec(**arguments)
    assert said in str(caught.value)


def test_friendly_forms(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spec = sandbox_spec(memory="64MiB", cpus="250m", timeout_s="2m", isolation="process", mounts=["x:/work/x:ro"])
    assert spec.resources.memory_bytes == 64 * 1024**2
    assert spec.resources.cpu_milli == 250
    assert spec.resources.disk_bytes is None
    assert spec.timeout_s == 120
    assert spec.isolation is Isolation.PROCESS
    assert spec.mounts == (Mount(str(tmp_path / "x"), "/work/x", read_only=True),)
    assert parse_mount("/a:/b") == Mount("/a", "/b")
    assert exec_spec(["true"], timeout_s="500ms").timeout_s == 0.5
