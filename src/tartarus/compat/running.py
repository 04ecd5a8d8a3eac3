"""Running through another engine, where somebody must stay on it for now: `tartarus legacy run`.

What runs there is held by that engine: its kernel is shared with the host as the engine shares it, and none of our
walls stand around it. The record says so.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from tartarus.compat import guardian
from tartarus.compat.engines import EngineFacts, LegacyRequest, LegacyRuntime, check_container
from tartarus.model.checks import check_env
from tartarus.model.ids import new_id

OnOutput = Callable[[int, bytes], object]


class LegacyRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What ran where. `isolation` is always ``engine``; `held_by` says whose it is."""

    engine: str
    container: str
    image: str
    command: tuple[str, ...]
    held_by: str
    isolation: str = "engine"
    exit_code: int | None = None


def request_for(image: str, argv: tuple[str, ...], **given: object) -> LegacyRequest:
    """A request with a name and a token of its own. Raises InvalidRequest."""
    token = new_id("legacy")
    known = {name: value for name, value in given.items() if value not in (None, "")}
    request = msgspec.convert({"name": token, "image": image, "argv": argv, "token": token, **known}, LegacyRequest)
    check_container(request.name)
    check_env(request.env)
    return request


def run(
    runtime: LegacyRuntime, request: LegacyRequest, on_output: OnOutput, *, timeout_s: float | None = None
) -> LegacyRecord:
    """Run a container to its end and remove it, even if we are killed.

    Raises TimeLimit after `timeout_s`; the container is gone then, too.
    """
    facts = runtime.facts()
    # Before it is made: its name is ours to choose, and the token keeps us from removing another's.
    with guardian.guarded(runtime, guardian.REMOVE, request.name, request.token):
        made = runtime.create(request)
        runtime.start(made)
        for number, piece in runtime.logs(made, follow=True, timeout_s=timeout_s):
            on_output(number, piece)
        status = runtime.wait(made, timeout_s=timeout_s)
    return _record(facts, request, status)


def start(runtime: LegacyRuntime, request: LegacyRequest) -> LegacyRecord:
    """Start a container and leave it running in its engine."""
    facts = runtime.facts()
    made = runtime.create(request)
    try:
        runtime.start(made)
    except BaseException:
        runtime.remove(made, request.token)
        raise
    return _record(facts, request, None)


def _record(facts: EngineFacts, request: LegacyRequest, status: int | None) -> LegacyRecord:
    return LegacyRecord(
        engine=facts.engine, container=request.name, image=request.image, command=request.argv,
        held_by=facts.isolation, exit_code=status,
    )  # fmt: skip
