"""Dockerfiles that attack the host, the tenant's own templates, or the policy."""

from __future__ import annotations

from pathlib import Path

import pytest

from tartarus.model.errors import BuildFailed, TemplateNotFound
from tartarus.model.library import ScanRequest, TemplateBase
from tartarus.node.service import Node

from .conftest import TENANT
from .making import Maker

pytestmark = [pytest.mark.anyio, pytest.mark.needs("root", "busybox", "cgroups")]


async def test_a_failure_takes_no_template_of_its_name(maker: Maker):
    mine = await maker.make("made-failed", TemplateBase("host"))
    with pytest.raises(BuildFailed) as failed:
        await maker.build("made", "RUN exit 3\n")
    assert failed.value.fix == ""
    assert any("of your own" in step.text for step in maker.steps)
    assert (await maker.node.library.templates.get(TENANT, "made-failed")).id == mine.id


async def test_the_next_failure_ends_what_the_last_one_left(maker: Maker, node: Node):
    for number in range(2):
        with pytest.raises(BuildFailed):
            await maker.build("made", f"RUN echo {number} >/srv/number\nRUN exit 3\n")
        assert await maker.out("made-failed", "cat", "/srv/number") == f"{number}\n"
    assert len([key for key in node._pool._entries if key[1] == "made-failed"]) == 1
    await node._pool.sweep()
    assert node._levels.hierarchy is not None
    assert len([name for name in node._levels.hierarchy.existing() if name.startswith("nursery-made-failed-")]) == 1


async def test_a_failure_is_no_way_round_the_policy(maker: Maker, state_dir: Path):
    policy = state_dir / "scan-policy.json"
    policy.write_text('{"require_complete": true}')
    try:
        with pytest.raises(BuildFailed):
            await maker.build("made", "RUN exit 3\n")
        with pytest.raises(TemplateNotFound):
            await maker.out("made-failed", "true")
    finally:
        policy.unlink()


async def test_what_is_blocked_can_be_looked_into(maker: Maker, state_dir: Path):
    policy = state_dir / "scan-policy.json"
    policy.write_text('{"require_complete": true}')
    try:
        info = await maker.build("made")
    finally:
        policy.unlink()
    assert info.status.value == "blocked"
    (state_dir / "osv").mkdir(exist_ok=True)
    try:
        found = await maker.node.library.templates.scan(TENANT, "made", ScanRequest())
    finally:
        (state_dir / "osv").rmdir()
    assert found["template"] == "made"
    assert await maker.node.library.templates.sbom(TENANT, "made")
