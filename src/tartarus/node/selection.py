"""Which isolation level a sandbox gets, and why: a pure decision, recorded with the sandbox."""

from __future__ import annotations

from collections.abc import Mapping

from tartarus.model.errors import IsolationUnavailable, Unsupported
from tartarus.model.sandbox import Isolation, SandboxSpec

STRONGEST_FIRST = (Isolation.CONTAINER, Isolation.PROCESS)


def choose(spec: SandboxSpec, unavailable: Mapping[Isolation, str]) -> tuple[Isolation, str]:
    """The level and the reason. `unavailable` says why this host can't give a level.

    A level that was asked for is given or refused, never replaced. Raises IsolationUnavailable or Unsupported.
    """
    if spec.isolation is not Isolation.AUTO:
        why = unavailable.get(spec.isolation)
        if why is not None:
            raise IsolationUnavailable(
                f"this host can't give isolation {spec.isolation.value!r}",
                why=why,
                fix="tartarus doctor shows how to get it",
            )
        return spec.isolation, "asked for"
    passed_over = []
    for level in STRONGEST_FIRST:
        why = unavailable.get(level)
        if why is not None:
            passed_over.append(f"{level.value} is not available: {why}")
            continue
        if level is Isolation.PROCESS and spec.mounts:
            raise Unsupported(
                "this request has mounts, and only the process level is available here",
                why="; ".join(passed_over),
                fix="copy files with tartarus cp, or make the container level available (tartarus doctor)",
            )
        return level, "; ".join(["the strongest this host can give", *passed_over])
    raise IsolationUnavailable("this host can give no isolation", why="; ".join(passed_over), fix="run tartarus doctor")
