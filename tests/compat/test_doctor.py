"""What `doctor` says of engines: those that answer, and those that do not, in their usual places."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from tests.compat.engine import Engine

from tartarus.compat import checks, opening
from tartarus.compat.checks import engine_checks


def places(monkeypatch: pytest.MonkeyPatch, *found: tuple[str, str]) -> None:
    monkeypatch.setattr(checks, "found", lambda: list(found))


@pytest.mark.needs("root", "dockerd", "busybox", "cgroups")
def test_an_engine_that_answers(docker: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    places(monkeypatch, ("docker", docker.socket))
    (check,) = engine_checks()
    assert check.ok is True
    assert "(runc)" in check.detail
    assert "tartarus migrate docker" in check.detail


def test_an_engine_that_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "d.sock")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    places(monkeypatch, ("docker", path))
    (check,) = engine_checks()
    assert check.ok is None  # no level needs it
    assert path in check.detail


def test_a_host_without_engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "_usual", lambda kind, environment: str(tmp_path / kind))
    assert opening.found() == []
