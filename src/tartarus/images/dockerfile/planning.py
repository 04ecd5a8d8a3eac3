"""Which stages of a Dockerfile a build needs, and what each of them is based on. Nothing is done yet."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from tartarus.images.dockerfile.instructions import Copy, Dockerfile, Stage
from tartarus.images.dockerfile.variables import Scope, check_build_args, platform_arguments
from tartarus.images.dockerfile.words import Budget, printable
from tartarus.images.oci import Platform
from tartarus.model.errors import InvalidRequest

SCRATCH = "scratch"


class StagePlan(msgspec.Struct, frozen=True):
    """A stage that is built. `base` is another stage's index, or a reference, or empty for an empty image.

    `origins`: for each `COPY --from` of it as written, the stage's index or the image's reference.
    """

    stage: Stage
    base: int | str
    origins: Mapping[str, int | str]


class Plan(msgspec.Struct, frozen=True):
    """The stages to build, in order; the last one is the result. `global_args`: for ARGs without a value."""

    stages: tuple[StagePlan, ...]
    global_args: Mapping[str, str]
    steps: int


def make_plan(
    dockerfile: Dockerfile, target: str, build_args: Mapping[str, str], platform: Platform, budget: Budget
) -> Plan:
    """Decide what to build. Raises InvalidRequest: an unknown target, stage, argument, or a foreign platform."""
    try:
        return _make_plan(dockerfile, target, build_args, platform, budget)
    except InvalidRequest as error:
        raise printable(error) from error


def _make_plan(
    dockerfile: Dockerfile, target: str, build_args: Mapping[str, str], platform: Platform, budget: Budget
) -> Plan:
    check_build_args(dockerfile, build_args)
    automatic = platform_arguments(platform, target)
    scope = Scope(build_args, {}, budget, dockerfile.escape)
    scope.args.update(automatic)
    for arg in dockerfile.arguments:
        scope.declare(arg)
    last = _find_target(dockerfile, target)
    plans: dict[int, StagePlan] = {}
    wanted = [last]
    while wanted:
        index = wanted.pop()
        if index in plans:
            continue
        plan = _plan_stage(dockerfile, dockerfile.stages[index], scope, platform)
        plans[index] = plan
        wanted += [found for found in (plan.base, *plan.origins.values()) if isinstance(found, int)]
    stages = tuple(plans[index] for index in sorted(plans))
    return Plan(stages, dict(scope.args), sum(1 + len(each.stage.steps) for each in stages))


def _find_target(dockerfile: Dockerfile, target: str) -> int:
    if not target:
        return len(dockerfile.stages) - 1
    found = _find_stage(dockerfile.stages, target)
    if found is None:
        names = ", ".join(stage.name for stage in dockerfile.stages)
        raise InvalidRequest(f"there is no stage {target[:100]!r}", why=f"the stages are: {names}")
    return found


def _find_stage(stages: tuple[Stage, ...], name: str) -> int | None:
    for stage in stages:
        if stage.start.name == name.lower():
            return stage.index
    if name.isascii() and name.isdecimal() and len(name) < 6 and int(name) < len(stages):
        return int(name)
    return None


def _plan_stage(dockerfile: Dockerfile, stage: Stage, scope: Scope, platform: Platform) -> StagePlan:
    start = stage.start
    try:
        reference = scope.expand(start.base)
        _check_platform(scope.expand(start.platform), platform)
    except InvalidRequest as error:
        raise InvalidRequest(f"line {start.line}: FROM: {error.what}", why=error.why, fix=error.fix) from error
    if not reference or reference != reference.strip():
        raise InvalidRequest(
            f"line {start.line}: FROM: {start.base[:100]!r} is nothing once its variables are put in",
            fix="give the ARG a default value, or a build argument",
        )
    base: int | str = "" if reference == SCRATCH else reference
    for earlier in dockerfile.stages[: stage.index]:
        if earlier.start.name and earlier.start.name == reference.lower():
            base = earlier.index
    origins = {
        step.origin: _origin(dockerfile, stage, step) for step in stage.steps if isinstance(step, Copy) and step.origin
    }
    return StagePlan(stage, base, origins)


def _origin(dockerfile: Dockerfile, stage: Stage, step: Copy) -> int | str:
    found = _find_stage(dockerfile.stages, step.origin)
    if found is None:
        if step.origin.isdecimal():
            raise InvalidRequest(f"line {step.line}: there is no stage {step.origin[:20]}", why="they count from 0")
        return step.origin
    if found >= stage.index:
        raise InvalidRequest(
            f"line {step.line}: COPY --from={step.origin}: that stage is not finished there",
            why="only stages above can be copied from",
        )
    return found


def _check_platform(wanted: str, platform: Platform) -> None:
    if not wanted:
        return
    parts = wanted.lower().split("/")
    fits = parts[0] == platform.os and parts[1:2] in ([], [platform.architecture]) and len(parts) <= 3
    if not fits or (len(parts) == 3 and platform.variant and parts[2] != platform.variant):
        raise InvalidRequest(
            f"--platform={wanted[:60]} is not this host's",
            why=f"steps run here, on {platform.os}/{platform.architecture}",
            fix="leave it out",
        )
