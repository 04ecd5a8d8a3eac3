"""How a template's interpreter is parked in a guest."""

from __future__ import annotations

from tartarus.guest.parked import Parking
from tartarus.model.sandbox import Isolation
from tartarus.model.template import Template
from tartarus.runtimes.base import Places, command_environment


def parking_of(template: Template, places: Places, isolation: Isolation) -> Parking:
    """With the template's own environment and directory. Only for a warm-up whose interpreter is not cloned."""
    warm_up = template.warm_up
    assert warm_up is not None
    assert warm_up.kind != "python"
    return Parking(
        kind=warm_up.kind, command=warm_up.argv0[0], imports=warm_up.imports, script=warm_up.script,
        env=command_environment(template, places), cwd=places.workdir,
        # What any guest of the level can write: an image need not have a /tmp.
        scratch=f"{places.home}/tmp" if isolation is Isolation.PROCESS else "/dev/shm",  # noqa: S108 - the guest's
    )  # fmt: skip
