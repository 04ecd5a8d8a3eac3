"""Dockerfiles that attack the host, the tenant's own templates, or the policy."""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path

import pytest

from tartarus.model.errors import BuildFailed, TemplateNotFound
from tartarus.model.library import CreateTemplate, DockerfileSource, ScanRequest, TemplateBase
from tartarus.node.service import Node

from .conftest import TENANT
from .making import SHELL, Maker, chunks, context

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


def left(node: Node, state_dir: Path) -> list[str]:
    """What of a build lies or runs on the host, but for layers that are whole."""
    cache = state_dir / "cache"
    assert node._levels.hierarchy is not None
    groups = [name for name in node._levels.hierarchy.existing() if not name.startswith("nursery-host-")]
    found = [*cache.glob("tenants/*/layers/.*"), *cache.glob("contexts/*"), *cache.glob("uploads/*")]
    return sorted([*groups, *map(str, found)])


def files() -> list[str]:
    """What this process has open, but for the store, which opens more as it needs them."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/self/fd/{name}"))
    return sorted(name for name in found if "state.db" not in name and not name.startswith("/proc/"))


@pytest.mark.parametrize("after_s", [0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.8, 1.0])
async def test_a_build_that_is_cancelled_at_any_moment(maker: Maker, node: Node, state_dir: Path, after_s: float):
    before, opened = left(node, state_dir), files()
    upload = await node.library.uploads.put(TENANT, chunks(context(file=b"x")))
    text = f"{SHELL}RUN echo {after_s} >/srv/a; sleep 0.2\nCOPY file /srv/b\nRUN sleep 0.2\nWORKDIR /srv/c\n"
    request = CreateTemplate(name="mine", source=DockerfileSource(dockerfile=text, context=upload.id, no_cache=True))

    async def follow() -> None:
        async for _ in node.library.templates.create(TENANT, request):
            pass

    work = asyncio.create_task(follow())
    await asyncio.sleep(after_s)
    work.cancel()
    await asyncio.gather(work, return_exceptions=True)
    for name in await maker.names():
        await node.library.templates.remove(TENANT, name)
    await node._pool.sweep()
    for id_ in list(node.library.uploads._stored):
        await node.library.uploads.remove(TENANT, id_)
    async with asyncio.timeout(10):
        # A thread that collects what nobody needs ends by itself, and has directories open until then.
        while left(node, state_dir) != before or files() != opened:
            await asyncio.sleep(0.05)
