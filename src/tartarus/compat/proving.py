"""The proof of a migration: the same command in the container and in a sandbox, side by side."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator
from enum import Enum
from typing import NamedTuple, cast

import msgspec

from tartarus.compat.engines import CommandOutcome, ContainerState, LegacyRuntime, collect, shown
from tartarus.compat.plan import MigrationPlan
from tartarus.model.errors import CommandNotFound, InvalidRequest, NotExecutable, TartarusError, TimeLimit
from tartarus.model.sandbox import Mount, SandboxSpec
from tartarus.sdk.client import Client
from tartarus.sdk.results import CommandTimedOut
from tartarus.sdk.sandbox import Sandbox

MAX_OUTPUT = 4 * 1024**2
# Who it runs as, where, and on what: what a template could have got wrong. It reads two small files.
CHECK = ("/bin/sh", "-c", "id -u; id -g; pwd; cat /etc/os-release /etc/passwd 2>/dev/null; true")
_CLEANUP_S = 60.0


class Verdict(str, Enum):
    """`same`: exit status and output are equal. `unproven`: there was nothing to compare with.

    `failed`: no sandbox could be made at that level, or the container's side could not be had.
    """

    SAME = "same"
    DIFFERS = "differs"
    UNPROVEN = "unproven"
    FAILED = "failed"


class Proof(msgspec.Struct, frozen=True, kw_only=True):
    """What was compared, and what came of it. `isolation` is the sandbox's level, `differences` are for people."""

    verdict: Verdict
    command: tuple[str, ...] = ()
    isolation: str = ""
    exit_code: int | None = None
    output_bytes: int = 0
    differences: tuple[str, ...] = ()
    why: str = ""


class _Reference(NamedTuple):
    argv: tuple[str, ...]
    outcome: CommandOutcome
    tty: bool = False


def prove(
    runtime: LegacyRuntime, state: ContainerState, plan: MigrationPlan, command: tuple[str, ...], *,
    timeout_s: float, client: Client,
) -> Proof:  # fmt: skip
    """Run the same in both. `command`: if empty, the container's own if it has ended, else a harmless check.

    Nothing that the sandbox does stays: its mounts are read-only here.
    """
    try:
        found = _reference(runtime, state, command, timeout_s)
    except TartarusError as error:
        return Proof(verdict=Verdict.FAILED, command=command, why=shown(f"the container: {error}", 600))
    if isinstance(found, str):
        return Proof(verdict=Verdict.UNPROVEN, why=found)
    spec = plan.request
    mounts = [msgspec.structs.replace(mount, read_only=True) for mount in spec.mounts]
    try:
        made = _sandbox(spec, mounts, timeout_s, client)
    except TartarusError as error:
        why = shown(str(error), 600)
        return Proof(verdict=Verdict.FAILED, command=found.argv, isolation=spec.isolation.value, why=why)
    with made as sandbox:
        isolation = sandbox.info.isolation.value
        try:
            outcome = _run(sandbox, found, timeout_s)
        except (CommandNotFound, NotExecutable) as error:
            return _differs(found, isolation, str(error))
        except (CommandTimedOut, TimeLimit):
            return _differs(found, isolation, f"in the sandbox it did not end within {timeout_s:g} s")
    differences = tuple(_differences(found.outcome, outcome))
    return Proof(
        verdict=Verdict.DIFFERS if differences else Verdict.SAME, command=found.argv, isolation=isolation,
        exit_code=outcome.exit_code, output_bytes=len(outcome.stdout) + len(outcome.stderr), differences=differences,
        why=_hint(plan) if differences else "",
    )  # fmt: skip


def check_provable(state: ContainerState, command: tuple[str, ...]) -> None:
    """Refuse, before anything is made, a command that the container can't be asked to run."""
    if command and state.status != "running" and not (state.ended and command == state.argv):
        raise InvalidRequest(
            f"{shown(command[0])} can't be compared", why=f"the container is {shown(state.status, 40)}, not running",
            fix="start it first, or leave --prove out: then its own command is compared, if it has ended",
        )  # fmt: skip


def _reference(
    runtime: LegacyRuntime, state: ContainerState, command: tuple[str, ...], timeout_s: float
) -> _Reference | str:
    """What the container did or does; or why there is nothing to go by."""
    own = state.ended and (not command or command == state.argv)
    if own and state.keeps_logs:
        assert state.exit_code is not None
        # One that ran several times has the logs of all of them.
        written = collect(_beginning(runtime.logs(state.id, since=state.started_at)), MAX_OUTPUT)
        return _Reference(state.argv, CommandOutcome(state.exit_code, *written), state.tty)
    if own:
        return "the container's command ended, and its output was not kept"
    if state.status != "running":
        return f"the container is {shown(state.status, 40)}: start it, and give a command with --prove"
    argv = command or CHECK
    outcome = runtime.execute(state.id, argv, timeout_s=timeout_s, most_bytes=MAX_OUTPUT)
    if not command and outcome.exit_code in {126, 127}:
        return "the container has no shell to check with: give a command with --prove"
    return _Reference(argv, outcome)


def _beginning(output: Iterator[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
    """As much of a log as can matter: what is more than both streams' share shows that there was more."""
    left = 2 * MAX_OUTPUT
    with contextlib.closing(cast("Generator[tuple[int, bytes], None, None]", output)):
        for number, piece in output:
            yield number, piece
            left -= len(piece)
            if left < 0:
                return


def _sandbox(spec: SandboxSpec, mounts: list[Mount], timeout_s: float, client: Client) -> Sandbox:
    resources = spec.resources
    return Sandbox.create(
        spec.template, isolation=spec.isolation.value, memory=resources.memory_bytes,
        cpus=None if resources.cpu_milli is None else resources.cpu_milli / 1000, pids=resources.pids,
        disk=resources.disk_bytes, env=spec.env, mounts=mounts, network=spec.network.value,
        # Should we be killed, it ends by itself.
        timeout_s=timeout_s + _CLEANUP_S, labels={"tartarus.proof": "1"}, client=client,
    )  # fmt: skip


def _run(sandbox: Sandbox, found: _Reference, timeout_s: float) -> CommandOutcome:
    with sandbox.start(found.argv, tty=found.tty, timeout_s=timeout_s, max_output_bytes=MAX_OUTPUT) as process:
        result = process.wait()
    return CommandOutcome(result.exit_code, result.stdout_bytes, result.stderr_bytes, result.truncated)


def _differs(found: _Reference, isolation: str, why: str) -> Proof:
    return Proof(verdict=Verdict.DIFFERS, command=found.argv, isolation=isolation, differences=(shown(why, 400),))


def _hint(plan: MigrationPlan) -> str:
    if plan.secrets and not plan.request.env and not set(plan.secrets) & set(plan.definition.env):
        return "secrets were left out (see --secrets)"
    return ""


def _differences(wanted: CommandOutcome, got: CommandOutcome) -> list[str]:
    found = []
    if wanted.exit_code != got.exit_code:
        found.append(f"exit status {wanted.exit_code} in the container, {got.exit_code} in the sandbox")
    streams = (("output", wanted.stdout, got.stdout), ("error output", wanted.stderr, got.stderr))
    for what, left, right in streams:
        if left != right:
            found.append(_first_difference(what, left, right))
    if wanted.truncated or got.truncated:
        found.append(f"one of them wrote more than {MAX_OUTPUT} bytes: the rest was not compared")
    return found


def _first_difference(what: str, left: bytes, right: bytes) -> str:
    lines = zip([*left.splitlines(), b""], [*right.splitlines(), b""], strict=False)
    number, (one, other) = next(
        ((number, pair) for number, pair in enumerate(lines, 1) if pair[0] != pair[1]), (0, (left[-40:], right[-40:]))
    )
    texts = [shown(text[:400].decode("utf-8", "replace"), 80) for text in (one, other)]
    return f"{what}, line {number}: {texts[0]!r} in the container, {texts[1]!r} in the sandbox"
