"""What is packed of the host: what everybody may read, when it changed, and only where there is room."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from tartarus.model.errors import NoSpace
from tartarus.runtimes.microvm import images


def test_a_stamp_changes_with_what_lies_there(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/tool").write_bytes(b"x" * 5000)
    (tmp_path / "link").symlink_to("bin/tool")
    first = images.survey(tmp_path)
    assert first == images.survey(tmp_path)
    assert (first.unreadable, first.size_bytes) == ((), 8192)
    (tmp_path / "bin/tool").write_bytes(b"y" * 5000)
    os.utime(tmp_path / "bin/tool", ns=(1, 1))
    assert images.survey(tmp_path).stamp != first.stamp


def test_what_only_its_owner_may_read_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "private").mkdir(mode=0o700)
    (tmp_path / "private/key").write_text("secret")
    (tmp_path / "helper").touch()
    (tmp_path / "helper").chmod(0o4750)
    assert set(images.survey(tmp_path).unreadable) == {"private", "helper"}


def test_it_is_refused_where_there_is_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = SimpleNamespace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(NoSpace, match="no room"):
        images._require_room(tmp_path, 1000, Path("/usr"))
    images._require_room(tmp_path, 500, Path("/usr"))
