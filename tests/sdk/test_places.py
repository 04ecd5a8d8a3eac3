"""The client looks for the daemon exactly where the daemon's own settings put it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tartarus.model.errors import InvalidRequest
from tartarus.model.settings import Settings
from tartarus.sdk.places import Places

# pathlib keeps exactly two leading slashes apart from one; Linux does not, and nobody writes them.
paths = (
    st.lists(st.sampled_from(["a", "..", ".", "", "é", "ho me", "x" * 30]), max_size=5)
    .map("/".join)
    .flatmap(lambda rest: st.sampled_from(["", "/"]).map(lambda root: root + rest.lstrip("/")))
)
environments = st.fixed_dictionaries(
    {}, optional={"TARTARUS_HOME": paths, "XDG_STATE_HOME": paths, "XDG_RUNTIME_DIR": paths, "HOME": paths}
)


def outcome(make: Callable[[], object]) -> object:
    try:
        return make()
    except InvalidRequest as error:
        return str(error)


@given(environments, st.sampled_from([0, 1000]))
def test_both_rules_agree(environ, uid):
    def settings():
        found = Settings.from_environment(environ, uid)
        return str(found.state_dir), str(found.socket)

    assert outcome(lambda: tuple(Places.from_environment(environ, uid))) == outcome(settings)


def test_home_of_a_user(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    environ = {"TARTARUS_HOME": "~/t"}
    assert Places.from_environment(environ, 1000).state_dir == "/home/ada/t"
    assert Settings.from_environment(environ, 1000).state_dir == Path("/home/ada/t")


def test_a_socket_path_that_the_kernel_would_refuse(tmp_path):
    with pytest.raises(InvalidRequest, match="at most 107"):
        Places.at(os.path.join(tmp_path, "x" * 120))
