"""From an image's configuration and files to a template."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tartarus.images.described import describe
from tartarus.images.oci import ImageConfig
from tartarus.images.stackview import StackView
from tartarus.images.systemlayer import system_entries
from tartarus.model.definition import Definition
from tartarus.model.errors import ImageRefused, InvalidRequest
from tartarus.model.template import Template


def made(root: Path, config: ImageConfig, **said: object) -> Template:
    with StackView([root]) as view:
        return describe("mine", config, view, Definition(**said))  # type: ignore[arg-type]


def program(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)


def test_the_definition_comes_before_the_image(tmp_path):
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/passwd").write_text("app:x:33:34::/srv/app:/bin/sh\n")
    config = ImageConfig(env={"A": "image", "B": "image", "PATH": "/x"}, workdir="/image", user="app")
    template = made(tmp_path, config)
    assert (template.env, template.workdir) == ({"PATH": "/x", "A": "image", "B": "image"}, "/image")
    assert (template.user.uid, template.user.gid, template.user.home) == (33, 34, "/srv/app")
    template = made(tmp_path, config, env={"B": "said"}, workdir="/said", user="7:8")
    assert (template.env["A"], template.env["B"], template.workdir) == ("image", "said", "/said")
    assert (template.user.uid, template.user.gid) == (7, 8)
    assert made(tmp_path, ImageConfig()).workdir == "/work"
    with pytest.raises(InvalidRequest, match="nobody-knows"):
        made(tmp_path, ImageConfig(user="nobody-knows"))


def test_the_interpreter_that_is_kept_warm(tmp_path):
    assert made(tmp_path, ImageConfig()).warm_up is None
    program(tmp_path / "usr/bin/node")
    program(tmp_path / "opt/bin/python3.9")
    (tmp_path / "usr/bin/python3").symlink_to("/opt/bin/python3.9")
    warm_up = made(tmp_path, ImageConfig()).warm_up
    assert warm_up is not None
    assert (warm_up.interpreter, warm_up.kind, warm_up.argv0) == ("/usr/bin/python3", "python", ("python3",))
    program(tmp_path / "usr/bin/python")  # another one
    (tmp_path / "usr/local/bin").mkdir(parents=True)
    warm_up = made(tmp_path, ImageConfig(), warmup_language="node", warmup_script="1").warm_up
    assert warm_up is not None
    assert (warm_up.interpreter, warm_up.kind, warm_up.script) == ("/usr/bin/node", "node", "1")
    with pytest.raises(ImageRefused, match="has no r"):
        made(tmp_path, ImageConfig(), warmup_language="r")


@pytest.mark.parametrize("place", ["proc", "dev", "sys", "etc", "opt", "tmp"])
def test_nothing_stands_where_the_sandboxs_own_files_go(tmp_path, place):
    (tmp_path / place).symlink_to("/usr")
    (tmp_path / "usr").mkdir()
    with StackView([tmp_path]) as view:
        entries = {entry.path: entry for entry in system_entries(Template(id="x", name="x"), view)}
    assert entries[f"/{place}"].kind == "dir"


def test_directories_keep_the_images_owner_and_mode(tmp_path):
    (tmp_path / "etc").mkdir(mode=0o750)
    (tmp_path / "srv").mkdir()
    os.chmod(tmp_path / "etc", 0o750)
    template = Template(id="x", name="x", workdir="/srv/deep/down")
    with StackView([tmp_path]) as view:
        entries = {entry.path: entry for entry in system_entries(template, view)}
    assert entries["/etc"].mode == 0o750
    assert {"/srv", "/srv/deep", "/srv/deep/down", "/root"} <= set(entries)


def test_a_working_directory_that_is_a_file(tmp_path):
    (tmp_path / "srv").write_text("")
    with StackView([tmp_path]) as view, pytest.raises(ImageRefused, match="/srv is no directory"):
        system_entries(Template(id="x", name="x", workdir="/srv"), view)


@pytest.mark.parametrize("workdir", ["work/x", "//work/x", "/../work//x/", "./work/x"])
def test_a_directory_that_is_written_oddly(tmp_path, workdir):
    template = made(tmp_path, ImageConfig(workdir=workdir))
    with StackView([tmp_path]) as view:
        paths = {entry.path for entry in system_entries(template, view)}
    assert {"/work", "/work/x"} <= paths
    assert all(path.startswith("/") and not path.startswith("//") for path in paths)


@pytest.mark.parametrize("place", ["/opt/tartarus/runner.py", "/etc/hosts/x", "/opt/tartarus/../tartarus/ca.crt"])
def test_a_directory_in_the_place_of_our_files(tmp_path, place):
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/passwd").write_text(f"app:x:33:34::{place}:/bin/sh\n")
    for config in (ImageConfig(workdir=place), ImageConfig(user="app")):
        template = made(tmp_path, config)
        with StackView([tmp_path]) as view, pytest.raises(ImageRefused, match="can't be a directory"):
            system_entries(template, view)


def test_more_places_for_programs_than_anybody_looks_into(tmp_path):
    program(tmp_path / "last/python3")
    many = ":".join(f"/{number}" for number in range(20_000))
    assert made(tmp_path, ImageConfig(env={"PATH": f"{many}:/last"})).warm_up is None
    assert made(tmp_path, ImageConfig(env={"PATH": "/first:/last"})).warm_up is not None
