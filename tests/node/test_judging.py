"""Judges of runs that have ended, written by others: what hangs in one holds up neither the node nor its end."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from tartarus.model.audit import AuditQuery
from tartarus.model.sandbox import Isolation, SandboxRecord, SandboxSpec
from tartarus.model.settings import Settings
from tartarus.model.states import State
from tartarus.node import judging
from tartarus.node.auditing import Auditor
from tartarus.policy.judges import Classification, Court, Ruling, Verdict

pytestmark = pytest.mark.anyio


class Hanging:
    """Hangs over the runs whose sandbox is called so."""

    name = "hanging"

    def __init__(self) -> None:
        self.over = threading.Event()

    def pre_admit(self, request: object) -> Ruling:  # noqa: ARG002
        return Ruling(Verdict.ACCEPT, self.name)

    def post_hoc(self, record: SandboxRecord) -> Classification | None:
        if record.name == "hang":
            self.over.wait()
        return Classification("seen", record.name)


def ended(name: str) -> SandboxRecord:
    return SandboxRecord(
        id=f"sbx-{name}", tenant="acme", name=name, template="host", isolation=Isolation.CONTAINER,
        isolation_reason="", state=State.SUCCEEDED, spec=SandboxSpec(), created_at=1.0,
    )  # fmt: skip


async def test_a_judge_that_hangs_takes_nothing_but_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "_CLOSE_S", 0.0)
    audit, judge = Auditor(Settings.at(tmp_path)), Hanging()
    await audit.open()
    try:
        afterwards = judging.Afterwards(Court([judge]), audit)
        for _ in range(judging._AT_ONCE - 1):
            afterwards.ended(ended("hang"))
        afterwards.ended(ended("quiet"))
        while not (await audit.find(AuditQuery(action="sandbox.classify"))).entries:
            await asyncio.sleep(0.01)
        for _ in range(100):
            afterwards.ended(ended("hang"))
        # The node's own threads are all there, and what hangs has no more than its places.
        assert await asyncio.gather(*(asyncio.to_thread(int, 1) for _ in range(100))) == [1] * 100
        assert sum(thread.name == "judges" for thread in threading.enumerate()) <= judging._AT_ONCE
        assert all(thread.daemon for thread in threading.enumerate() if thread.name == "judges")
        await afterwards.close()
    finally:
        for task in list(afterwards._tasks):
            task.cancel()
        judge.over.set()
        await audit.close()
