"""Admission: before a sandbox is made, the judges hear what is asked, by the policies in force and what there is.

Counting is done here, at the moment of the decision, so that two requests at once can't both take the last place.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from typing import NoReturn

import msgspec
import structlog

from tartarus.model.errors import RequestRejected
from tartarus.model.sandbox import Isolation, Resources, SandboxRecord, SandboxSpec
from tartarus.policy.documents import Limits, PolicyDocument, limits_of
from tartarus.policy.judges import Admission as Asked
from tartarus.policy.judges import Court, Ruling, Usage, Verdict

_log = structlog.get_logger("tartarus.node.admission")
_MINUTE_S = 60.0
_MOST_CACHED = 4096


class Place:
    """What an admitted sandbox takes of its tenant's share, until it is given back.

    `asked` and `verdict`: what was judged, and how; for the record.
    """

    def __init__(self, books: _Books, asked: Asked, verdict: Verdict, rulings: tuple[Ruling, ...]) -> None:
        self.asked = asked
        self.verdict = verdict
        self.rulings = rulings
        self._books = books
        self._held = False
        self.take()

    @property
    def quarantine(self) -> tuple[str, ...]:
        """Why the sandbox is to be watched as a suspect, from the judges that said so."""
        return tuple(ruling.reason for ruling in self.rulings if ruling.verdict is Verdict.QUARANTINE)

    @property
    def tags(self) -> dict[str, str]:
        """What the judges put on the record."""
        return {name: value for ruling in self.rulings for name, value in ruling.tags.items()}

    def take(self) -> None:
        """Count it; safe to repeat."""
        if not self._held:
            self._held = True
            self._books.take(self.asked.template, self.asked.resources)

    def give_back(self) -> None:
        """The sandbox is gone, or was never made; safe to repeat."""
        if self._held:
            self._held = False
            self._books.give_back(self.asked.template, self.asked.resources)


class _Books:
    """What one tenant has."""

    def __init__(self) -> None:
        self.sandboxes = self.cpu_milli = self.memory_bytes = 0
        self.of_template: dict[str, int] = defaultdict(int)
        self.launches: deque[float] = deque()

    def take(self, template: str, resources: Resources) -> None:
        self.sandboxes += 1
        self.cpu_milli += resources.cpu_milli
        self.memory_bytes += resources.memory_bytes
        self.of_template[template] += 1
        self.launches.append(time.monotonic())

    def give_back(self, template: str, resources: Resources) -> None:
        self.sandboxes -= 1
        self.cpu_milli -= resources.cpu_milli
        self.memory_bytes -= resources.memory_bytes
        self.of_template[template] -= 1
        if not self.of_template[template]:
            del self.of_template[template]

    def usage(self, template: str) -> Usage:
        since = time.monotonic() - _MINUTE_S
        while self.launches and self.launches[0] < since:
            self.launches.popleft()
        return Usage(self.sandboxes, self.of_template.get(template, 0), self.cpu_milli, self.memory_bytes,
                     len(self.launches))  # fmt: skip


class Admission:
    """Judges requests. `replace` puts other policies in force, all at once.

    `rejected` hears what was refused, to whom and why.
    `exempt`: the node's own name, under which it tries what it can do; no policy is for that.
    """

    def __init__(
        self, court: Court, *, exempt: str = "",
        rejected: Callable[[str, Asked, tuple[Ruling, ...]], None] = lambda *_: None,
    ) -> None:  # fmt: skip
        self._court = court
        self._exempt = exempt
        self._rejected = rejected
        self._documents: tuple[PolicyDocument, ...] = ()
        self._limits: dict[tuple[str, str], Limits] = {}
        self._books: dict[str, _Books] = defaultdict(_Books)

    def replace(self, documents: Iterable[PolicyDocument]) -> None:
        """From the next request on; what runs goes on as it was admitted."""
        self._documents = tuple(documents)
        self._limits.clear()

    def limits(self, tenant: str, template: str) -> Limits:
        """What the policies in force say of a tenant's sandboxes of a template."""
        key = (tenant, template)
        found = self._limits.get(key)
        if found is None:
            if len(self._limits) >= _MOST_CACHED:
                self._limits.clear()
            documents = () if tenant == self._exempt else self._documents
            found = self._limits[key] = limits_of(documents, tenant, template)
        return found

    def with_defaults(self, tenant: str, template: str, spec: SandboxSpec) -> SandboxSpec:
        """The request with what the policies give where it asks for nothing."""
        default_s = self.limits(tenant, template).default_timeout_s
        return (
            spec
            if spec.timeout_s is not None or default_s is None
            else msgspec.structs.replace(spec, timeout_s=default_s)
        )

    def admit(
        self, tenant: str, spec: SandboxSpec, template: str, resources: Resources, isolation: Isolation, *,
        caller: str = "", roles: tuple[str, ...] = (), action: str = "sandbox.create",
    ) -> Place:  # fmt: skip
        """Hear the judges. Raises RequestRejected with every reason, and what would be accepted."""
        asked = self._asked(tenant, spec, template, resources, isolation, caller=caller, roles=roles)
        if tenant == self._exempt:
            return Place(self._books[tenant], asked, Verdict.ACCEPT, ())
        verdict, rulings = self._court.pre_admit(asked)
        if verdict is Verdict.REJECT:
            self._refuse(action, asked, tuple(ruling for ruling in rulings if ruling.verdict is Verdict.REJECT))
        return Place(self._books[tenant], asked, verdict, rulings)

    def admit_contract(self, place: Place, spec: SandboxSpec) -> None:
        """Hear the judges about another contract of a sandbox that lives. Raises RequestRejected.

        One that they would quarantine a new sandbox for is refused as well.
        """
        asked = msgspec.structs.replace(
            place.asked, spec=spec, limits=self.limits(place.asked.tenant, place.asked.template)
        )
        if against := self._court.pre_swear(asked):
            self._refuse("network.swear", asked, against)

    def _refuse(self, action: str, asked: Asked, against: tuple[Ruling, ...]) -> NoReturn:
        reasons = [ruling.reason for ruling in against]
        _log.info("rejected", action=action, tenant=asked.tenant, template=asked.template, reasons=reasons)
        self._rejected(action, asked, against)
        accepted = "; ".join(ruling.accepted for ruling in against if ruling.accepted)
        raise RequestRejected(
            "the request was rejected", why="; ".join(f"{ruling.judge}: {ruling.reason}" for ruling in against),
            fix=accepted and f"accepted would be: {accepted}",
        )  # fmt: skip

    def known(self, record: SandboxRecord) -> Place:
        """The place of a sandbox that an earlier daemon admitted: it counts, and is not judged again."""
        resources = record.spec.resources.over(Resources())
        asked = self._asked(record.tenant, record.spec, record.template, resources, record.isolation)
        return Place(self._books[record.tenant], asked, Verdict.ACCEPT, ())

    def admit_again(self, place: Place) -> Place:
        """Judge, by what is in force now, a sandbox that is to begin again; its own place is not in its way.

        Raises RequestRejected; it keeps the place that it had then.
        """
        asked = place.asked
        place.give_back()
        try:
            return self.admit(
                asked.tenant, asked.spec, asked.template, asked.resources, asked.isolation,
                caller=asked.caller, roles=asked.roles, action="sandbox.wake",
            )  # fmt: skip
        except RequestRejected:
            place.take()
            raise

    def _asked(
        self, tenant: str, spec: SandboxSpec, template: str, resources: Resources, isolation: Isolation, *,
        caller: str = "", roles: tuple[str, ...] = (),
    ) -> Asked:  # fmt: skip
        return Asked(
            tenant=tenant, caller=caller or tenant, roles=roles, spec=spec, template=template, resources=resources,
            isolation=isolation, usage=self._books[tenant].usage(template), limits=self.limits(tenant, template),
        )  # fmt: skip
