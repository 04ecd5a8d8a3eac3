"""A short soak of every level that starts in a moment. Longer ones are run by hand (soak.py)."""

from __future__ import annotations

import sys

import pytest

from .soak import soaking

pytestmark = [pytest.mark.needs("root", "cgroups", "landlock"), pytest.mark.timeout(280)]


@pytest.mark.parametrize(
    "levels",
    [
        pytest.param(("container", "process"), id="host-kernel"),
        pytest.param(("gvisor",), id="gvisor", marks=pytest.mark.needs("runsc")),
    ],
)
def test_nothing_is_lost_stuck_or_left(levels: tuple[str, ...]) -> None:
    with soaking(7, levels, lambda line: sys.stdout.write(f"{line}\n")) as soak:
        soak.run(8.0)
        assert soak.done.total() > 20
