"""Admission: each limit at its edge, every ruling heard, and a broken judge's rejection."""

from __future__ import annotations

import msgspec
import pytest

from tartarus.model.sandbox import Isolation, Resources, SandboxRecord, SandboxSpec
from tartarus.policy.documents import Limits
from tartarus.policy.judges import Admission, Classification, Court, Judge, Ruling, Usage, Verdict, court

ASKED = Resources(memory_bytes=2**30, cpu_milli=2000, pids=100, disk_bytes=2**30)
REQUEST = Admission(
    tenant="acme", caller="ada", roles=("dev",), spec=SandboxSpec(timeout_s=60.0), template="t", resources=ASKED,
    isolation=Isolation.CONTAINER, usage=Usage(), limits=Limits(),
)  # fmt: skip


def judged(limits: Limits, **changes: object) -> tuple[Verdict, str, str]:
    request = msgspec.structs.replace(REQUEST, limits=limits, **changes)
    verdict, rulings = court().pre_admit(request)
    said = [ruling for ruling in rulings if ruling.verdict is not Verdict.ACCEPT]
    return verdict, "; ".join(one.reason for one in said), "; ".join(one.accepted for one in said)


def test_no_policy_limits_nothing() -> None:
    assert judged(Limits()) == (Verdict.ACCEPT, "", "")


@pytest.mark.parametrize(
    ("name", "enough", "too_little", "says"),
    [
        ("memory_bytes", 2**30, 2**30 - 2**20, "memory of one sandbox: 1024 MiB"),
        ("cpu_milli", 2000, 1999, "CPU of one sandbox: 2 CPUs"),
        ("disk_bytes", 2**30, 2**29, "disk of one sandbox"),
        ("pids", 100, 99, "processes of one sandbox: 100"),
        ("duration_s", 60.0, 59.0, "time limit of one sandbox: 60 s"),
        ("instances", 4, 3, "sandboxes of template t: 4"),
        ("tenant_instances", 8, 7, "sandboxes at once: 8"),
        ("tenant_cpu_milli", 5000, 4999, "CPU in all: 5 CPUs"),
        ("tenant_memory_bytes", 2**31, 2**31 - 1, "memory in all: 2048 MiB"),
        ("launches_per_minute", 11, 10, "launches in a minute: 11"),
    ],
)
def test_each_limit_at_its_edge(name: str, enough: float, too_little: float, says: str) -> None:
    usage = Usage(sandboxes=7, of_template=3, cpu_milli=3000, memory_bytes=2**30, launches_last_minute=10)
    assert judged(msgspec.convert({name: enough}, Limits), usage=usage)[0] is Verdict.ACCEPT
    verdict, reason, accepted = judged(msgspec.convert({name: too_little}, Limits), usage=usage)
    assert verdict is Verdict.REJECT
    assert says in reason
    assert accepted.startswith("at most ")


def test_a_sandbox_without_a_time_limit_is_more_than_any() -> None:
    verdict, reason, _ = judged(Limits(duration_s=60.0), spec=SandboxSpec())
    assert (verdict, reason) == (Verdict.REJECT, "time limit of one sandbox: none")


def test_security() -> None:
    assert judged(Limits(callers=("bob", "dev")))[0] is Verdict.ACCEPT
    assert judged(Limits(callers=("bob",)))[1:] == ("ada may not use template t", "callers: bob")
    assert judged(Limits(callers=()))[0] is Verdict.REJECT
    assert judged(Limits(floor=Isolation.CONTAINER))[0] is Verdict.ACCEPT
    assert judged(Limits(floor=Isolation.GVISOR))[1:] == ("isolation container is too weak", "gvisor or stronger")


def test_every_judge_is_heard() -> None:
    _, rulings = court().pre_admit(
        msgspec.structs.replace(REQUEST, limits=Limits(pids=1, callers=(), documents=("p", "q")))
    )
    assert [ruling.verdict for ruling in rulings] == [Verdict.REJECT, Verdict.REJECT, Verdict.ACCEPT]
    assert rulings[2].tags == {"tartarus.io/policies": "p,q"}


class Broken:
    name = "broken"

    def pre_admit(self, request: Admission) -> Ruling:
        raise ZeroDivisionError(request.tenant)

    def post_hoc(self, record: SandboxRecord) -> Classification | None:
        raise ZeroDivisionError(record.id)


class Nonsense(Broken):
    def pre_admit(self, request: Admission) -> Ruling:  # noqa: ARG002
        return None  # type: ignore[return-value]


@pytest.mark.parametrize("judge", [Broken(), Nonsense()])
def test_a_broken_judge_rejects_and_says_that_it_broke(judge: Judge) -> None:
    verdict, (ruling,) = Court([judge]).pre_admit(REQUEST)
    assert verdict is Verdict.REJECT
    assert ruling.reason.startswith("the judge broke: ")


class Stern:
    name = "stern"

    def pre_admit(self, request: Admission) -> Ruling:
        return Ruling(Verdict.QUARANTINE, self.name, f"{request.caller} is watched", tags={"watched": "yes"})

    def post_hoc(self, record: SandboxRecord) -> Classification | None:
        return Classification("odd", "it was odd", quarantine=True) if record.name == "odd" else None


def test_plugins_are_judges_like_others(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import EntryPoint

    from tartarus.policy import judges

    assert not court().has_plugins
    asked = []

    def points(group: str) -> list[EntryPoint]:
        asked.append(group)
        return [EntryPoint("stern", f"{__name__}:Stern", group)]

    monkeypatch.setattr(judges, "entry_points", points)
    monkeypatch.setattr(EntryPoint, "load", lambda _: Stern)
    made = court()
    assert (asked, made.has_plugins) == (["tartarus.judges"], True)
    verdict, rulings = made.pre_admit(REQUEST)
    assert (verdict, rulings[-1].tags) == (Verdict.QUARANTINE, {"watched": "yes"})
    # A rejection is stronger, and a plugin can't take it back.
    assert made.pre_admit(msgspec.structs.replace(REQUEST, limits=Limits(pids=1)))[0] is Verdict.REJECT
