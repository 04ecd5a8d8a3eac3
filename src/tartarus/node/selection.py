"""Which isolation level a sandbox gets, and why: a pure decision, recorded with the sandbox."""

from __future__ import annotations

from collections.abc import Mapping

from tartarus.model.errors import IsolationUnavailable, Unsupported
from tartarus.model.sandbox import Isolation, SandboxSpec
from tartarus.node import selection_wasm

STRONGEST_FIRST = (Isolation.MICROVM, Isolation.GVISOR, Isolation.CONTAINER, Isolation.PROCESS)
AUTO_ORDER = (Isolation.CONTAINER, Isolation.GVISOR, Isolation.PROCESS)
"""What `auto` tries: gVisor takes some 200 ms to start where a container takes 5, so it is given when asked for,
when the floor demands it, or when there is no container level; never is a weaker level tried before a stronger one
that starts as fast. A microVM packs and boots a template for seconds to minutes before its first start, takes no
mounts, and may have to be emulated: it is given when asked for, or when the floor demands it, which takes nothing else.
"""


def choose(
    spec: SandboxSpec,
    unavailable: Mapping[Isolation, str],
    floor: Isolation = Isolation.AUTO,
    host_floor: Isolation = Isolation.AUTO,
) -> tuple[Isolation, str]:
    """The level and the reason. `unavailable` says why this host can't give a level.

    `floor` is the template's and `host_floor` the administrator's; the stricter of them holds.

    A level that was asked for is given or refused, never replaced. Raises IsolationUnavailable or Unsupported.
    """
    if selection_wasm.runs_module(spec):
        return selection_wasm.choose(spec, unavailable, {"host": host_floor, "template": floor})
    of_template, of_host = _at_least(floor), _at_least(host_floor)
    by_host = len(of_host) < len(of_template)
    accepted = of_host if by_host else of_template
    if spec.isolation is not Isolation.AUTO:
        if spec.isolation not in accepted:
            least = accepted[-1].value
            raise Unsupported(
                f"this {'host' if by_host else 'template'} takes the {least} level or a stronger one, "
                f"not {spec.isolation.value}",
                why="its administrator set that floor"
                if by_host
                else "it brings its own root file system, or its author set that floor",
                fix=f"leave --isolation out, or use --isolation {least}",
            )
        why = unavailable.get(spec.isolation)
        if why is not None:
            raise IsolationUnavailable(
                f"this host can't give isolation {spec.isolation.value!r}",
                why=why,
                fix="tartarus doctor shows how to get it",
            )
        return spec.isolation, "asked for"
    passed_over = []
    for level in [level for level in AUTO_ORDER if level in accepted] or accepted:
        why = unavailable.get(level)
        if why is not None:
            passed_over.append(f"{level.value} is not available: {why}")
            continue
        if level in (Isolation.PROCESS, Isolation.MICROVM) and spec.mounts:
            raise Unsupported(
                f"this request has mounts, and only the {level.value} level will do here",
                why="; ".join(passed_over),
                fix="copy files with tartarus cp, or make the container level available (tartarus doctor)",
            )
        what = "the strongest this host can give"
        if level is Isolation.CONTAINER and Isolation.GVISOR not in unavailable:
            what = "the strongest that starts at once; gvisor is given when asked for"
        return level, "; ".join([what, *passed_over])
    what = "this host can give no isolation"
    if len(accepted) < len(STRONGEST_FIRST):
        what += f" that is strong enough for {'its administrator' if by_host else 'this template'}"
    raise IsolationUnavailable(what, why="; ".join(passed_over), fix="run tartarus doctor")


def _at_least(floor: Isolation) -> tuple[Isolation, ...]:
    """That level and the stronger ones, the strongest first; all of them for `auto`."""
    return STRONGEST_FIRST[: STRONGEST_FIRST.index(floor) + 1] if floor in STRONGEST_FIRST else STRONGEST_FIRST


def stricter(one: Isolation, other: Isolation) -> Isolation:
    """The floor that leaves fewer levels."""
    return min(one, other, key=lambda floor: len(_at_least(floor)))
