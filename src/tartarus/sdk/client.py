"""The daemon as a whole: what it offers, and its end. `Sandbox` uses one for its calls."""

from __future__ import annotations

import os

from tartarus.model.library import SnapshotInfo, TemplateInfo
from tartarus.model.lifecycle import CheckpointRequest, DrainReport, DrainRequest
from tartarus.sdk import calls, library_calls
from tartarus.sdk.places import Places
from tartarus.sdk.results import LevelReport, Version
from tartarus.sdk.specs import duration_or_none
from tartarus.sdk.transport import Transport


class Client:
    """The way to one daemon.

    `home`: its directory, as in TARTARUS_HOME (the default comes from the environment); `start`: start the
    daemon when it is not running; `any_version`: don't insist on a daemon of this client's version.
    """

    def __init__(self, home: str | None = None, *, start: bool = True, any_version: bool = False) -> None:
        places = Places.at(home) if home is not None else Places.from_environment(os.environ, os.geteuid())
        self.transport = Transport(places, start=start, any_version=any_version)

    @property
    def places(self) -> Places:
        """Where the daemon keeps its state and listens."""
        return self.transport.places

    def version(self) -> Version:
        """The daemon's version, process id and start."""
        return self.transport.call(calls.version())

    def templates(self) -> list[TemplateInfo]:
        """The templates that sandboxes can be made from."""
        return self.transport.call(library_calls.templates())

    def levels(self) -> list[LevelReport]:
        """What this host can give: each isolation level is tried with a small guest."""
        return self.transport.call(calls.levels())

    def drain(
        self,
        *,
        signal: int | str = "",
        grace: float | str | None = None,
        hibernate: bool = False,
        checkpoint: bool = False,
    ) -> DrainReport:
        """Take no new sandboxes, and end every one gracefully; returns with how each ended, and what is left.

        `signal` and `grace` as in `Sandbox.stop`; without them, each sandbox's own count. With `hibernate`, what can be
        is put to sleep instead; with `checkpoint`, each is kept first.
        """
        request = DrainRequest(
            str(signal), duration_or_none(grace), CheckpointRequest() if checkpoint else None, hibernate
        )
        return self.transport.call(calls.drain(request))

    def checkpoints(self) -> list[SnapshotInfo]:
        """Your checkpoints, newest first."""
        return self.transport.call(calls.checkpoints())

    def draining(self) -> DrainReport:
        """Whether the daemon takes no new sandboxes, and which it has."""
        return self.transport.call(calls.draining())

    def undo_drain(self) -> None:
        """Let the daemon take new sandboxes again."""
        self.transport.call(calls.undo_drain())

    def shutdown(self) -> None:
        """Stop the daemon; its sandboxes end gracefully. Returns once it has agreed, not once it is gone."""
        self.transport.call(calls.shutdown())
