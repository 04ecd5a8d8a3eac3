"""A few violations of each kind, against a count of somebody else's. A thousand of each are run by hand (violations.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tartarus.node.enforcement import erinyes

from .violations import SCRIPTS, outcomes

pytestmark = pytest.mark.needs("root", "cgroups", "nft", "ip", "system-python")


def test_none_is_missed_and_none_is_invented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o711)
    monkeypatch.setattr(erinyes, "LOOK_EVERY_S", 0.1)
    found = outcomes(tmp_path, 30)
    assert [one.script for one in found] == list(SCRIPTS)
    assert [str(one) for one in found if (one.missed, one.invented, one.happened) != (0, 0, 30)] == []
