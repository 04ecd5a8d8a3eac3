"""Hostile layers, through the real unpacker: refused whole, with a reason, and nothing else happens."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.escape.images.archives import END, blob, file
from tests.escape.images.ground import Ground
from tests.escape.images.refused import refused

from tartarus.model.errors import ImageRefused

pytestmark = [pytest.mark.anyio, pytest.mark.needs("user-namespaces")]


@pytest.fixture
def ground(tmp_path: Path) -> Ground:
    return Ground(tmp_path)


@pytest.mark.parametrize("name", refused(b"/nowhere"))
async def test_it_is_refused(ground: Ground, name: str) -> None:
    attack, reason = refused(str(ground.bait).encode())[name]
    with pytest.raises(ImageRefused) as caught:
        await ground.unpack(attack)
    assert reason in str(caught.value)
    assert str(caught.value).isprintable()
    ground.check()
    assert list((ground.root / "store").iterdir()) == []


async def test_the_ground_itself_unpacks_what_is_honest(ground: Ground) -> None:
    tree = await ground.unpack(blob(file(b"a/b", b"x") + END))
    assert (tree / "a" / "b").read_text() == "x"
    ground.check()
