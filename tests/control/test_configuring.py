"""The configuration file: in force as a whole, or refused with its line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from tests.project.test_project import ROOT

from tartarus.control.configuring import read_configuration
from tartarus.model.configuration import KEYS, Configuration, configured, in_force
from tartarus.model.errors import InvalidRequest
from tartarus.model.sandbox import Isolation
from tartarus.model.settings import Settings

SETTINGS = Settings.at(Path("/s"))


def test_what_is_said_holds_and_the_rest_stays() -> None:
    text = "node_name: n1\nended_kept: 2h\nupload: 1GiB\nlog: {size: 1MiB}\nisolation:\n  floor: gvisor\n"
    found = configured(SETTINGS, text)
    assert (found.node_name, found.ended_kept_s, found.upload_bytes) == ("n1", 7200.0, 2**30)
    assert (found.log_bytes, found.log_files, found.isolation_floor) == (2**20, 3, Isolation.GVISOR)
    assert found.stop_grace_s == SETTINGS.stop_grace_s
    assert configured(SETTINGS, " \n") == SETTINGS
    assert configured(SETTINGS, "node_name: local") == SETTINGS


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("nod_name: x", "line 1: unknown key 'nod_name' (did you mean 'node_name'?)"),
        ("isolation:\n  flor: gvisor", "line 2: unknown key 'flor' in isolation (did you mean 'floor'?)"),
        ("isolation:\n  floor: gviser", "line 2: isolation.floor: 'gviser' is none of the values (did you mean 'gvisor'?)"),
        ("upload: much", "line 1: upload: 'much' is not a size"),
        ("ended_kept: 3 weeks", "line 1: ended_kept: '3 weeks' is not a duration"),
        ("log: {files: 0}", "line 1: log.files: 0 is out of range"),
        ("node_name: ' '", "line 1: node_name: it is empty"),
        ("log: 3", "line 1"),
        ("- a", "has no keys"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused_with_its_line(text: str, says: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        configured(SETTINGS, text, "c.yaml")
    assert says in str(caught.value)
    assert str(caught.value).startswith("c.yaml")


def test_the_keys_are_those_of_the_file_and_of_the_page() -> None:
    def paths(kind: type[msgspec.Struct], before: str = "") -> list[str]:
        found = []
        for field in msgspec.structs.fields(kind):
            nested = isinstance(field.type, type) and issubclass(field.type, msgspec.Struct)
            found += paths(field.type, f"{before}{field.name}.") if nested else [before + field.name]
        return found

    page = (ROOT / "docs" / "configuration.md").read_text()
    assert sorted(KEYS) == sorted(paths(Configuration))
    assert [path for path in KEYS if f"`{path}`" not in page] == []
    assert in_force(SETTINGS)["upload"] == "16GiB"


def test_where_it_lies(tmp_path: Path) -> None:
    def place(environ: dict[str, str], uid: int) -> str:
        return str(Settings.from_environment(environ, uid).config_file)

    assert place({}, 0) == "/etc/tartarus/config.yaml"
    assert place({"TARTARUS_HOME": "/t"}, 0) == "/t/config.yaml"
    assert place({"HOME": "/home/u"}, 7) == "/home/u/.config/tartarus/config.yaml"
    assert place({"HOME": "/home/u", "XDG_CONFIG_HOME": "/c"}, 7) == "/c/tartarus/config.yaml"
    settings = Settings.at(tmp_path)
    assert read_configuration(settings) == settings


def test_a_file_that_others_can_write_is_not_used(tmp_path: Path) -> None:
    settings = Settings.at(tmp_path)
    file = tmp_path / "config.yaml"
    file.write_text("node_name: n1")
    assert read_configuration(settings) == msgspec.structs.replace(settings, node_name="n1")
    for mode in (0o666, 0o660):
        file.chmod(mode)
        with pytest.raises(InvalidRequest, match="others than root"):
            read_configuration(settings)
    file.unlink()
    os.mkfifo(file, 0o600)
    with pytest.raises(InvalidRequest):
        read_configuration(settings)


def test_a_daemon_with_a_wrong_file_says_so_and_does_not_start(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("node_name: n1\nfoo: 1\n")
    done = subprocess.run(
        [sys.executable, "-m", "tartarus.control.daemon", "--state-dir", str(tmp_path)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 125
    assert "config.yaml, line 2: unknown key 'foo'" in done.stderr
