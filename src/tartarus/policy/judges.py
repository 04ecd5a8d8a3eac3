"""Admission (the Judges): quota, security, compliance, and whatever plugins add; each before a sandbox is made.

Minos keeps the quotas, Rhadamanthus the security, Aeacus the record. A judge that breaks rejects, and says that it
broke.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import Enum
from importlib.metadata import entry_points
from typing import Protocol

import msgspec
import structlog

from tartarus.model.sandbox import Isolation, Resources, SandboxRecord, SandboxSpec
from tartarus.policy.contracts import refusals
from tartarus.policy.documents import Limits
from tartarus.policy.hardening import shortfalls

_log = structlog.get_logger("tartarus.policy")
ENTRY_POINTS = "tartarus.judges"
"""The group of entry points whose classes are judges, made without arguments."""


class Verdict(str, Enum):
    """What a judge says. Strength grows downwards."""

    ACCEPT = "accept"
    QUARANTINE = "quarantine"
    REJECT = "reject"


_STRENGTH = {Verdict.ACCEPT: 0, Verdict.QUARANTINE: 1, Verdict.REJECT: 2}


class Usage(msgspec.Struct, frozen=True):
    """What a tenant has at this moment; `of_template` are its live sandboxes of the template that is asked for."""

    sandboxes: int = 0
    of_template: int = 0
    cpu_milli: int = 0
    memory_bytes: int = 0
    launches_last_minute: int = 0


class Admission(msgspec.Struct, frozen=True):
    """A request that is judged: with the limits it would get, the level it would have, and what its tenant has."""

    tenant: str
    caller: str
    roles: tuple[str, ...]
    spec: SandboxSpec
    template: str
    resources: Resources
    isolation: Isolation
    usage: Usage
    limits: Limits


class Ruling(msgspec.Struct, frozen=True):
    """One judge's word. `reason` says what, `accepted` what would be accepted; `tags` go on the record."""

    verdict: Verdict
    judge: str
    reason: str = ""
    accepted: str = ""
    tags: dict[str, str] = {}


class Classification(msgspec.Struct, frozen=True):
    """What a judge thinks of a run that has ended."""

    category: str
    reason: str = ""
    quarantine: bool = False


class Judge(Protocol):
    """One judge; plugins are the same."""

    name: str

    def pre_admit(self, request: Admission) -> Ruling:
        """Judge a request. Anything raised is a rejection."""
        ...

    def post_hoc(self, record: SandboxRecord) -> Classification | None:
        """Judge a run that has ended; nothing where there is nothing to say."""
        ...


class Minos:
    """The quota keeper: what one sandbox may ask for, and what a tenant may have at once."""

    name = "minos"

    def pre_admit(self, request: Admission) -> Ruling:
        """Reject what is more than the policy allows, naming the limit."""
        for what, value, most, unit in self._figures(request):
            if most is not None and value > most:
                accepted = f"at most {_amount(most, unit)}"
                return Ruling(Verdict.REJECT, self.name, f"{what}: {_amount(value, unit)}", accepted)
        return Ruling(Verdict.ACCEPT, self.name)

    def _figures(self, request: Admission) -> Iterable[tuple[str, float, float | None, str]]:
        asked, limits, usage = request.resources, request.limits, request.usage
        yield "memory of one sandbox", asked.memory_bytes, limits.memory_bytes, "MiB"
        yield "CPU of one sandbox", asked.cpu_milli, limits.cpu_milli, "CPUs"
        yield "disk of one sandbox", asked.disk_bytes, limits.disk_bytes, "MiB"
        yield "processes of one sandbox", asked.pids, limits.pids, ""
        if limits.duration_s is not None:
            lasts = request.spec.timeout_s
            yield "time limit of one sandbox", float("inf") if lasts is None else lasts, limits.duration_s, "s"
        yield f"sandboxes of template {request.template}", usage.of_template + 1, limits.instances, ""
        yield "sandboxes at once", usage.sandboxes + 1, limits.tenant_instances, ""
        yield "CPU in all", usage.cpu_milli + asked.cpu_milli, limits.tenant_cpu_milli, "CPUs"
        yield "memory in all", usage.memory_bytes + asked.memory_bytes, limits.tenant_memory_bytes, "MiB"
        yield "launches in a minute", usage.launches_last_minute + 1, limits.launches_per_minute, ""

    def post_hoc(self, record: SandboxRecord) -> Classification | None:  # noqa: ARG002
        """Nothing."""
        return None


class Rhadamanthus:
    """The arbiter of security: who may use a template, how strongly it is held, and what it may reach."""

    name = "rhadamanthus"
    _ORDER = (Isolation.AUTO, Isolation.PROCESS, Isolation.CONTAINER, Isolation.GVISOR, Isolation.MICROVM)

    def pre_admit(self, request: Admission) -> Ruling:
        """Reject what the policy does not let this caller have."""
        limits = request.limits
        if limits.callers is not None and not {request.caller, *request.roles} & set(limits.callers):
            return Ruling(Verdict.REJECT, self.name, f"{request.caller} may not use template {request.template}",
                          f"callers: {', '.join(limits.callers) or 'nobody'}")  # fmt: skip
        if limits.secrets is not None and (hidden := {use.ref for use in request.spec.secrets} - {*limits.secrets}):
            return Ruling(Verdict.REJECT, self.name, f"the policy does not allow secrets: {', '.join(sorted(hidden))}",
                          f"secrets: {', '.join(limits.secrets) or 'none'}")  # fmt: skip
        if self._weaker(request.isolation, limits.floor):
            return Ruling(Verdict.REJECT, self.name, f"isolation {request.isolation.value} is too weak",
                          f"{limits.floor.value} or stronger")  # fmt: skip
        short = list(shortfalls(request.spec.security, request.isolation, limits.security))
        if short:
            return Ruling(Verdict.REJECT, self.name, "security: " + ", ".join(what for what, _ in short),
                          ", ".join(accepted for _, accepted in short))  # fmt: skip
        return network_ruling(request) or Ruling(Verdict.ACCEPT, self.name)

    def _weaker(self, isolation: Isolation, floor: Isolation) -> bool:
        if floor is Isolation.AUTO:
            return False
        return isolation not in self._ORDER or self._ORDER.index(isolation) < self._ORDER.index(floor)

    def post_hoc(self, record: SandboxRecord) -> Classification | None:  # noqa: ARG002
        """Nothing."""
        return None


def network_ruling(request: Admission) -> Ruling | None:
    """Rhadamanthus' word about a network that the policy does not let this tenant have."""
    against = list(refusals(request.spec, request.limits.network))
    if not against:
        return None
    return Ruling(Verdict.REJECT, Rhadamanthus.name, "network: " + ", ".join(what for what, _ in against),
                  ", ".join(accepted for _, accepted in against))  # fmt: skip


class Aeacus:
    """The keeper of the record: which policies a sandbox was judged by."""

    name = "aeacus"

    def pre_admit(self, request: Admission) -> Ruling:
        """Accept, and tag."""
        tags = {"tartarus.io/policies": ",".join(request.limits.documents)} if request.limits.documents else {}
        return Ruling(Verdict.ACCEPT, self.name, tags=tags)

    def post_hoc(self, record: SandboxRecord) -> Classification | None:  # noqa: ARG002
        """Nothing."""
        return None


_OURS = (Minos, Rhadamanthus, Aeacus)


class Court:
    """All judges, in order. Each is heard, so that a refusal says all that is wrong."""

    def __init__(self, judges: Sequence[Judge]) -> None:
        self._judges = tuple(judges)

    @property
    def has_plugins(self) -> bool:
        """Whether there are judges that others wrote."""
        return any(type(judge) not in _OURS for judge in self._judges)

    def pre_admit(self, request: Admission) -> tuple[Verdict, tuple[Ruling, ...]]:
        """The strictest verdict, and every ruling."""
        rulings = tuple(self._heard(judge, request) for judge in self._judges)
        verdict = max((ruling.verdict for ruling in rulings), key=_STRENGTH.__getitem__, default=Verdict.ACCEPT)
        return verdict, rulings

    def pre_swear(self, request: Admission) -> tuple[Ruling, ...]:
        """What speaks against a contract for a sandbox that lives: what it may reach, and whatever plugins say.

        Quotas do not: it takes nothing that it has not.
        """
        against = network_ruling(request)
        rulings = [self._heard(judge, request) for judge in self._judges if type(judge) not in _OURS]
        return tuple(one for one in (against, *rulings) if one is not None and one.verdict is not Verdict.ACCEPT)

    def post_hoc(self, record: SandboxRecord) -> tuple[Classification, ...]:
        """What the judges think of a run that has ended; one that breaks is left out, and logged."""
        found = []
        for judge in self._judges:
            try:
                said = judge.post_hoc(record)
            except Exception:  # noqa: BLE001 - a plugin's fault is no one else's
                _log.exception("judge_broke", judge=judge.name, sandbox=record.id)
                continue
            if said is not None:
                found.append(said)
        return tuple(found)

    def _heard(self, judge: Judge, request: Admission) -> Ruling:
        try:
            ruling: object = judge.pre_admit(request)
        except Exception as error:  # noqa: BLE001 - whatever it is, the request is not let through
            _log.exception("judge_broke", judge=judge.name)
            return Ruling(Verdict.REJECT, judge.name, f"the judge broke: {type(error).__name__}: {error}")
        if not isinstance(ruling, Ruling):
            return Ruling(Verdict.REJECT, judge.name, f"the judge broke: it said {type(ruling).__name__}")
        return ruling


def court() -> Court:
    """The three judges and those that installed packages add. A plugin that can't be loaded stops the daemon."""
    plugins = [entry.load()() for entry in sorted(entry_points(group=ENTRY_POINTS), key=lambda entry: entry.name)]
    return Court([Minos(), Rhadamanthus(), Aeacus(), *plugins])


def _amount(value: float, unit: str) -> str:
    if value == float("inf"):
        return "none"
    scaled = value / 2**20 if unit == "MiB" else value / 1000 if unit == "CPUs" else value
    return f"{scaled:g} {unit}".strip()
