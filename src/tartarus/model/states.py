"""A sandbox's states and the one table of moves between them."""

from __future__ import annotations

from enum import Enum

from tartarus.model.errors import InvalidState


class State(str, Enum):
    """Where a sandbox is in its life."""

    PENDING = "pending"
    SCHEDULED = "scheduled"
    STARTING = "starting"
    RUNNING = "running"
    PAUSED = "paused"
    HIBERNATED = "hibernated"
    STOPPING = "stopping"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    KILLED = "killed"
    TIMED_OUT = "timed_out"
    QUARANTINED = "quarantined"
    LOST = "lost"


TERMINAL = frozenset({State.SUCCEEDED, State.FAILED, State.KILLED, State.TIMED_OUT, State.LOST})
ALIVE = frozenset(State) - TERMINAL
_ENDS = frozenset({State.SUCCEEDED, State.FAILED, State.KILLED, State.TIMED_OUT})
_EMERGENCY = frozenset({State.QUARANTINED, State.LOST})

TRANSITIONS: dict[State, frozenset[State]] = {
    State.PENDING: frozenset({State.SCHEDULED, State.FAILED, State.KILLED}) | _EMERGENCY,
    State.SCHEDULED: frozenset({State.STARTING, State.FAILED, State.KILLED}) | _EMERGENCY,
    State.STARTING: frozenset({State.RUNNING, State.HIBERNATED, State.STOPPING, State.FAILED, State.KILLED})
    | _EMERGENCY,
    State.RUNNING: frozenset({State.PAUSED, State.HIBERNATED, State.STOPPING}) | _EMERGENCY,
    State.PAUSED: frozenset({State.RUNNING, State.HIBERNATED, State.STOPPING}) | _EMERGENCY,
    State.HIBERNATED: frozenset({State.STARTING, State.STOPPING}) | _EMERGENCY,
    State.STOPPING: _ENDS | _EMERGENCY,
    State.QUARANTINED: frozenset({State.STOPPING, State.PAUSED, State.LOST}),
    **{end: frozenset() for end in TERMINAL},
}


def check_transition(current: State, target: State) -> None:
    """Raise InvalidState, naming both states, unless the table has this move."""
    if target not in TRANSITIONS[current]:
        raise InvalidState(f"a sandbox that is {current.value} can't become {target.value}")
