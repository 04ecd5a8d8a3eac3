"""Copying out of a sandbox whose guest lies: nothing lands outside the target, nothing is written through a link."""

from __future__ import annotations

import contextlib
import os

import pytest

from tartarus.model.errors import FileFailed
from tartarus.model.sandbox import FileInfo
from tartarus.sdk.copying import ELSEWHERE, Observer, copy_out


class Seen(Observer):
    """Remembers what was left out."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.reasons: list[str] = []

    def skipped(self, path: str, why: str) -> None:
        self.paths.append(path)
        self.reasons.append(why)


class LyingFiles:
    """The files of a guest that answers what the test says; a real guest can't be made to lie so."""

    def __init__(self, listings: dict[str, list[FileInfo]]) -> None:
        self._listings = listings

    def stat(self, path: str) -> FileInfo:
        return entry(path, "dir")

    def list(self, path: str) -> list[FileInfo]:
        return self._listings.get(path, [])

    @contextlib.contextmanager
    def open(self, path: str):  # noqa: ARG002 - whatever is asked for
        yield iter([b"planted"])


def entry(path: str, kind: str, link: str = "", mode: int = 0o644) -> FileInfo:
    return FileInfo(path, kind, 7, mode, 0, 0, 0.0, link)


def everything_below(top) -> set[str]:
    return {os.path.relpath(os.path.join(directory, name), top) for directory, names, leaves in os.walk(top)
            for name in names + leaves}  # fmt: skip


def fetch(tmp_path, listings) -> list[str]:
    seen = Seen()
    (tmp_path / "out").mkdir(exist_ok=True)
    copy_out(LyingFiles(listings), "/d", str(tmp_path / "out"), seen)  # type: ignore[arg-type]
    return seen.reasons


@pytest.mark.parametrize("name", ["/d/..", "/d/.", "/d/", ""])
def test_names_that_climb_are_refused(tmp_path, name):
    with pytest.raises(FileFailed, match="no usable name"):
        fetch(tmp_path, {"/d": [entry(name, "dir")]})
    assert everything_below(tmp_path) <= {"out", "out/d"}


def test_only_the_last_part_of_a_name_counts(tmp_path):
    fetch(tmp_path, {"/d": [entry("/d/../../../evil", "file")]})
    assert everything_below(tmp_path) == {"out", "out/d", "out/d/evil"}


def test_nothing_is_written_through_a_link_that_came_first(tmp_path):
    (tmp_path / "victim").mkdir()
    listings = {
        "/d": [entry("/d/x", "symlink", "../../victim"), entry("/d/x", "dir"), entry("/d/y", "symlink", "x")],
        "/d/x": [entry("/d/x/f", "file")],
    }
    skipped = fetch(tmp_path, listings)
    assert os.listdir(tmp_path / "victim") == []
    assert (tmp_path / "out/d/x/f").read_bytes() == b"planted"
    assert os.readlink(tmp_path / "out/d/y") == "x"
    assert skipped == [ELSEWHERE]


def test_nothing_is_written_through_a_link_of_an_earlier_copy(tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "out/d").mkdir(parents=True)
    os.symlink(tmp_path / "victim", tmp_path / "out/d/f")
    fetch(tmp_path, {"/d": [entry("/d/f", "file")]})
    assert (tmp_path / "victim").read_text() == "precious"
    assert (tmp_path / "out/d/f").read_bytes() == b"planted"
    os.symlink(tmp_path, tmp_path / "out/d/sub")
    with pytest.raises(FileFailed, match="in the way"):
        fetch(tmp_path, {"/d": [entry("/d/sub", "dir")], "/d/sub": [entry("/d/sub/f", "file")]})
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize("target", ["/etc/passwd", "../../x", "a/../../../x", "link/../../x", "", ".././../.."])
def test_links_that_lead_elsewhere_are_left_out(tmp_path, target):
    skipped = fetch(tmp_path, {"/d": [entry("/d/bad", "symlink", target), entry("/d/good", "symlink", "sub/../f")]})
    assert skipped
    assert not (tmp_path / "out/d/bad").is_symlink()


def test_modes_lose_what_gives_power(tmp_path):
    fetch(tmp_path, {"/d": [entry("/d/s", "file", mode=0o6755), entry("/d/n", "char")]})
    assert os.stat(tmp_path / "out/d/s").st_mode & 0o7777 == 0o755
    assert not (tmp_path / "out/d/n").exists()
