"""The node's pure decisions: which level, and what an end means."""

from __future__ import annotations

import pytest

from tartarus.model.errors import IsolationUnavailable, Unsupported
from tartarus.model.sandbox import ExitStatus, Isolation, Mount, Reason, SandboxSpec
from tartarus.model.states import State
from tartarus.node.selection import choose
from tartarus.node.termination import outcome


def test_auto_takes_the_strongest() -> None:
    missing = {Isolation.GVISOR: "no runsc"}
    assert choose(SandboxSpec(), missing) == (Isolation.CONTAINER, "the strongest this host can give")


def test_auto_prefers_a_quick_start_and_says_so() -> None:
    level, why = choose(SandboxSpec(), {})
    assert level is Isolation.CONTAINER
    assert "gvisor is given when asked for" in why


def test_the_stricter_floor_holds_and_is_named() -> None:
    for template, host in ((Isolation.GVISOR, Isolation.PROCESS), (Isolation.PROCESS, Isolation.GVISOR)):
        assert choose(SandboxSpec(), {}, template, host)[0] is Isolation.GVISOR
    with pytest.raises(Unsupported, match="this host takes the container level or a stronger one, not process"):
        choose(SandboxSpec(isolation=Isolation.PROCESS), {}, host_floor=Isolation.CONTAINER)
    with pytest.raises(IsolationUnavailable, match="strong enough for its administrator"):
        choose(SandboxSpec(), {Isolation.GVISOR: "no runsc"}, host_floor=Isolation.GVISOR)


def test_a_floor_of_gvisor_gives_gvisor_or_nothing() -> None:
    assert choose(SandboxSpec(), {}, Isolation.GVISOR)[0] is Isolation.GVISOR
    with pytest.raises(IsolationUnavailable, match="strong enough"):
        choose(SandboxSpec(), {Isolation.GVISOR: "no runsc"}, Isolation.GVISOR)
    with pytest.raises(Unsupported):
        choose(SandboxSpec(isolation=Isolation.CONTAINER), {}, Isolation.GVISOR)


def test_auto_says_what_it_passed_over() -> None:
    level, why = choose(SandboxSpec(), {Isolation.CONTAINER: "no user namespaces", Isolation.GVISOR: "no runsc"})
    assert level is Isolation.PROCESS
    assert "no user namespaces" in why


def test_what_was_asked_for_is_never_replaced() -> None:
    with pytest.raises(IsolationUnavailable, match="no user namespaces"):
        choose(SandboxSpec(isolation=Isolation.CONTAINER), {Isolation.CONTAINER: "no user namespaces"})


def test_auto_does_not_fall_to_a_level_that_lacks_what_is_needed() -> None:
    with pytest.raises(Unsupported, match="mounts"):
        choose(SandboxSpec(mounts=(Mount("/a", "/b"),)), {Isolation.CONTAINER: "none", Isolation.GVISOR: "none"})


@pytest.mark.parametrize(
    ("ending", "status", "oom_kills", "state", "reason"),
    [
        (Reason.COMPLETED, ExitStatus(0), 0, State.SUCCEEDED, Reason.COMPLETED),
        (Reason.COMPLETED, ExitStatus(3), 0, State.FAILED, Reason.COMPLETED),
        (Reason.COMPLETED, ExitStatus(0, 9), 1, State.FAILED, Reason.RESOURCE_LIMIT),
        (Reason.COMPLETED, ExitStatus(0, 9), 0, State.FAILED, Reason.COMPLETED),
        (Reason.TIMEOUT, None, 0, State.TIMED_OUT, Reason.TIMEOUT),
        (Reason.USER_REQUEST, None, 0, State.KILLED, Reason.USER_REQUEST),
        (Reason.NODE_DRAIN, None, 0, State.KILLED, Reason.NODE_DRAIN),
        (None, None, 0, State.LOST, Reason.LOST),
        (None, None, 1, State.FAILED, Reason.RESOURCE_LIMIT),
        (Reason.TIMEOUT, None, 1, State.TIMED_OUT, Reason.TIMEOUT),
        (Reason.COMPLETED, ExitStatus(1), 1, State.FAILED, Reason.COMPLETED),
    ],
)
def test_outcome(
    ending: Reason | None, status: ExitStatus | None, oom_kills: int, state: State, reason: Reason
) -> None:
    found, changes = outcome(ending, status, oom_kills)
    assert (found, changes["reason"]) == (state, reason)


@pytest.mark.parametrize(
    ("status", "oom_kills", "reason"),
    [
        (ExitStatus(1), 1, Reason.RESOURCE_LIMIT),
        (ExitStatus(1), 0, Reason.COMPLETED),
        (ExitStatus(0), 1, Reason.COMPLETED),
    ],
)
def test_outcome_where_kills_have_no_name(status: ExitStatus, oom_kills: int, reason: Reason) -> None:
    """Of a program whose process on the host was killed, gVisor's kernel says only that it failed."""
    assert outcome(Reason.COMPLETED, status, oom_kills, kills_unnamed=True)[1]["reason"] is reason
