"""The metrics of the user's roadmap that exist so far, under their names there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

if TYPE_CHECKING:
    from tartarus.model.sandbox import SandboxRecord

# The framework adds the character set to every text answer itself.
CONTENT_TYPE = CONTENT_TYPE_LATEST.removesuffix("; charset=utf-8")
# Seconds: warm starts take a few milliseconds, cold ones tens, a template's first one many seconds.
_LAUNCH_BUCKETS = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0)

_SLEEP_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.5, 5.0, 15.0, 60.0)
_FREEZE_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)
_GRACE_BUCKETS = (0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0, 3600.0)
_DNS_REFUSALS = frozenset({"dns_refused", "dns_private", "dns_rebinding", "dns_malformed", "dns_busy", "dns_full"})


def is_refusal(counter: str) -> bool:
    """Whether a counter of a network's is of what was refused."""
    return counter.startswith("refused_") or counter in _DNS_REFUSALS


class Metrics:
    """One node's metrics, in a registry of their own (so that two in one process don't mix)."""

    def __init__(self, node: str) -> None:
        self._node = node
        self.registry = CollectorRegistry()
        self._launch = Histogram(
            "tartarus_sandbox_launch_duration_seconds",
            "From the request for a sandbox to its command running",
            ("template", "node"),
            registry=self.registry,
            buckets=_LAUNCH_BUCKETS,
        )
        self._active = Gauge(
            "tartarus_sandbox_active_count",
            "Sandboxes that have started and not ended",
            ("template", "node"),
            registry=self.registry,
        )
        self._total = Counter(
            "tartarus_sandbox_total",
            "Sandboxes that ended, by the state they ended in",
            ("template", "status"),
            registry=self.registry,
        )
        self._hits = Counter(
            "tartarus_snapshot_cache_hits_total",
            "Launches cloned from a warm snapshot",
            ("template",),
            registry=self.registry,
        )
        self._misses = Counter(
            "tartarus_snapshot_cache_misses_total",
            "Launches that found no warm snapshot",
            ("template",),
            registry=self.registry,
        )
        # By level: a label for each snapshot, as the roadmap has it, would grow without end.
        self._restore = Histogram(
            "tartarus_snapshot_restore_duration_seconds",
            "From the request to go on from memory to the sandbox running",
            ("isolation", "node"),
            registry=self.registry,
            buckets=_SLEEP_BUCKETS,
        )

        self._asleep = Gauge(
            "tartarus_hypnos_hibernated_count", "Sandboxes that are hibernated", ("node",), registry=self.registry
        )
        self._slept = Histogram(
            "tartarus_hypnos_hibernate_duration_seconds",
            "From the wish to hibernate a sandbox to nothing of it left in memory",
            ("node",),
            registry=self.registry,
            buckets=_SLEEP_BUCKETS,
        )
        self._woke = Histogram(
            "tartarus_hypnos_wake_duration_seconds",
            "From the wish to wake a sandbox to its running",
            ("node",),
            registry=self.registry,
            buckets=_SLEEP_BUCKETS,
        )
        self._sleep_failures = Counter(
            "tartarus_hypnos_failures_total",
            "Hibernations and wakes that failed; the sandbox stayed as it was",
            ("node", "operation"),
            registry=self.registry,
        )
        self._terminations = Counter(
            "tartarus_thanatos_terminations_total",
            "Sandboxes that were asked to end, by reason and by whether they did in their grace",
            ("node", "reason", "outcome"),
            registry=self.registry,
        )
        self._grace = Histogram(
            "tartarus_thanatos_grace_duration_seconds",
            "From the signal to the last process' end, or to force",
            ("node",),
            registry=self.registry,
            buckets=_GRACE_BUCKETS,
        )
        self._contracts = Gauge(
            "tartarus_styx_contracts_active", "Sandboxes that have a network, each held to its contract", ("node",),
            registry=self.registry,
        )  # fmt: skip
        self._blocked = Counter(
            "tartarus_styx_packets_blocked_total", "Packets and questions of sandboxes that were refused, by reason",
            ("reason",), registry=self.registry,
        )  # fmt: skip
        self._carried = Counter(
            "tartarus_styx_bytes_transferred_total", "Bytes that sandboxes sent and received", ("direction",),
            registry=self.registry,
        )  # fmt: skip
        self._lamentations = Counter(
            "tartarus_cocytus_lamentations_total", "Runs that failed or never began", ("category",),
            registry=self.registry,
        )  # fmt: skip

        self._violations = Counter(
            "tartarus_erinyes_violations_total", "Limits broken, by who saw it and what was done",
            ("fury", "kind", "action"), registry=self.registry,
        )  # fmt: skip
        self._quarantined = Gauge(
            "tartarus_typhon_quarantined_count", "Sandboxes that are held in quarantine", ("node",),
            registry=self.registry,
        )  # fmt: skip
        self._quarantines = Counter(
            "tartarus_typhon_quarantines_total", "Sandboxes that were quarantined", ("reason",), registry=self.registry
        )
        self._freeze = Histogram(
            "tartarus_typhon_freeze_duration_seconds", "From the decision to nothing of the sandbox running", ("node",),
            registry=self.registry, buckets=_FREEZE_BUCKETS,
        )  # fmt: skip

    def violated(self, fury: str, kind: str, action: str, count: int) -> None:
        """A limit was broken, so many times."""
        self._violations.labels(fury, kind, action).inc(count)

    def quarantined(self, reason: str, freeze_s: float | None) -> None:
        """A sandbox was quarantined, and frozen in so many seconds; None when it could not be, and was ended."""
        self._quarantines.labels(reason).inc()
        if freeze_s is not None:
            self._freeze.labels(self._node).observe(freeze_s)

    def in_quarantine(self, count: int) -> None:
        """So many sandboxes are held."""
        self._quarantined.labels(self._node).set(count)

    def lamented(self, category: str) -> None:
        """A run failed, or never began."""
        self._lamentations.labels(category).inc()

    def contracts_active(self, count: int) -> None:
        """So many sandboxes have a network now."""
        self._contracts.labels(self._node).set(count)

    def network_used(self, counters: dict[str, int]) -> None:
        """What one sandbox's network did since this was told last, by its counters' names."""
        for name, value in counters.items():
            if is_refusal(name):
                self._blocked.labels(name.removeprefix("refused_")).inc(value)
            elif name in {"sent_bytes", "received_bytes"}:
                self._carried.labels(name.removesuffix("_bytes")).inc(value)

    def slept(self, seconds: float | None) -> None:
        """A sandbox was hibernated in so many seconds; None when that failed."""
        if seconds is None:
            self._sleep_failures.labels(self._node, "hibernate").inc()
        else:
            self._slept.labels(self._node).observe(seconds)

    def woke(self, seconds: float | None) -> None:
        """A sandbox was woken in so many seconds; None when that failed."""
        if seconds is None:
            self._sleep_failures.labels(self._node, "wake").inc()
        else:
            self._woke.labels(self._node).observe(seconds)

    def hibernated(self, change: int) -> None:
        """One sandbox more (1) or less (-1) sleeps."""
        self._asleep.labels(self._node).inc(change)

    def terminated(self, reason: str, seconds: float, *, forced: bool) -> None:
        """A sandbox that was asked to end has, so many seconds after its signal."""
        self._terminations.labels(self._node, reason, "forced" if forced else "graceful").inc()
        self._grace.labels(self._node).observe(seconds)

    def launched(self, template: str, seconds: float, *, warm: bool) -> None:
        """A sandbox of `template` began to run, `seconds` after it was asked for."""
        self._launch.labels(template, self._node).observe(seconds)
        self._active.labels(template, self._node).inc()
        (self._hits if warm else self._misses).labels(template).inc()

    def restored(self, template: str, isolation: str, seconds: float) -> None:
        """A sandbox of `template` went on from a snapshot of memory, or as a copy of another."""
        self._restore.labels(isolation, self._node).observe(seconds)
        self._active.labels(template, self._node).inc()

    def ended(self, record: SandboxRecord) -> None:
        """A sandbox reached the terminal state that `record` has."""
        if record.started_at is not None:
            self._active.labels(record.template, self._node).dec()
        self._total.labels(record.template, record.state.value).inc()

    def render(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)
