"""What callers ask of a sandbox's or a node's end, and what they are told of it."""

from __future__ import annotations

import msgspec

from tartarus.model.checks import check_stop, check_time_limit
from tartarus.model.ids import check_snapshot_name
from tartarus.model.library import SnapshotInfo
from tartarus.model.sandbox import Reason, SandboxRecord
from tartarus.model.states import State


class CheckpointRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A checkpoint of a sandbox, to start it anew from there; its name is one of its tenant's snapshots'."""

    name: str = ""

    def __post_init__(self) -> None:
        if self.name:
            check_snapshot_name(self.name)


class StopRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How to end a sandbox gracefully; what is left out is the sandbox's own.

    `signal`: a name or number; `grace_s`: seconds until what still runs is killed, 0 for at once. `checkpoint`: keep
    its memory as it is before the signal, or, at levels where that can't be saved, its files as they are at the end.
    """

    signal: str = ""
    grace_s: float | None = None
    checkpoint: CheckpointRequest | None = None

    def __post_init__(self) -> None:
        check_stop(self.signal, self.grace_s)


class Stopped(msgspec.Struct, frozen=True):
    """A sandbox after its graceful end."""

    sandbox: SandboxRecord
    checkpoint: SnapshotInfo | None = None


class DrainRequest(StopRequest, frozen=True, forbid_unknown_fields=True):
    """How to end every sandbox of a node, each as a StopRequest says.

    `hibernate`: put to sleep instead what can be. A checkpoint is then each sandbox's own, without a name.
    """

    hibernate: bool = False


class HibernateRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """When to hibernate a sandbox: at once, or in `after_s` seconds, whatever it does then."""

    after_s: float | None = None

    def __post_init__(self) -> None:
        check_time_limit(self.after_s)


class Drained(msgspec.Struct, frozen=True):
    """One sandbox of a node that was drained: how it ended, or that it has not."""

    id: str
    name: str
    state: State
    reason: Reason | None
    message: str = ""
    checkpoint: str = ""


class DrainReport(msgspec.Struct, frozen=True):
    """Whether the node takes no new sandboxes, what a drain ended, and the ids of sandboxes that run or sleep still."""

    draining: bool
    ended: tuple[Drained, ...] = ()
    left: tuple[str, ...] = ()
    asleep: tuple[str, ...] = ()
