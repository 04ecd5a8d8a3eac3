"""Where things are, from the environment alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from tartarus.model.errors import InvalidRequest
from tartarus.model.settings import Settings

USER = "/home/u/.local/state/tartarus"
RUN = "run/tartarus.sock"
CASES = [
    ({}, 0, "/var/lib/tartarus", "/run/tartarus/tartarus.sock"),
    ({"XDG_STATE_HOME": "/x", "XDG_RUNTIME_DIR": "/y"}, 0, "/var/lib/tartarus", "/run/tartarus/tartarus.sock"),
    ({"TARTARUS_HOME": "/srv/t"}, 0, "/srv/t", f"/srv/t/{RUN}"),
    ({"TARTARUS_HOME": "/srv/t", "XDG_RUNTIME_DIR": "/y"}, 7, "/srv/t", f"/srv/t/{RUN}"),
    ({"HOME": "/home/u"}, 7, USER, f"{USER}/{RUN}"),
    ({"HOME": "/home/u", "XDG_RUNTIME_DIR": "/run/user/7"}, 7, USER, "/run/user/7/tartarus/tartarus.sock"),
    ({"HOME": "/home/u", "XDG_STATE_HOME": "/s"}, 7, "/s/tartarus", f"/s/tartarus/{RUN}"),
    ({"HOME": "/home/u", "XDG_STATE_HOME": "rel", "XDG_RUNTIME_DIR": "rel"}, 7, USER, f"{USER}/{RUN}"),
    ({"HOME": "/home/u", "TARTARUS_HOME": "", "XDG_STATE_HOME": ""}, 7, USER, f"{USER}/{RUN}"),
]


@pytest.mark.parametrize(("environ", "uid", "state_dir", "socket"), CASES)
def test_places(environ: dict[str, str], uid: int, state_dir: str, socket: str) -> None:
    settings = Settings.from_environment(environ, uid)
    assert (str(settings.state_dir), str(settings.socket)) == (state_dir, socket)
    for place in (settings.database, settings.lock_file, settings.pid_file, settings.log_file, settings.cache_dir):
        assert place.parent == settings.state_dir


def test_a_relative_home_is_made_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert Settings.from_environment({"TARTARUS_HOME": "t"}, 0).state_dir == tmp_path / "t"


def test_a_socket_path_that_no_socket_can_have_is_refused() -> None:
    assert Settings.at(Path("/s"), Path("/" + "a" * 106)).socket.name == "a" * 106
    with pytest.raises(InvalidRequest, match="108 bytes") as refused:
        Settings.at(Path("/s"), Path("/" + "a" * 107))
    assert "TARTARUS_HOME" in refused.value.fix
