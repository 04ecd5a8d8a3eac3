"""Leaving an engine: from a container to a template, a request, and a proof. `tartarus migrate` calls it.

Nothing in the engine is changed. A template is made by the daemon whole or not at all, and until all of the container
is there nothing of ours exists.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator
from typing import NamedTuple

import msgspec

from tartarus.compat import children, copying, guardian, request_file
from tartarus.compat.engines import EXPORT_S, ContainerState, LegacyRuntime, shown
from tartarus.compat.plan import MigrationPlan, Wishes, make_plan
from tartarus.compat.proving import Proof, check_provable, prove
from tartarus.compat.transfer import Export
from tartarus.compat.wire import STALL_S, EngineRefused
from tartarus.model.errors import InvalidRequest, MigrationRefused, TemplateBlocked
from tartarus.model.library import TemplateInfo, TemplateStatus, UploadSource
from tartarus.model.sandbox import Mount
from tartarus.sdk.client import Client
from tartarus.sdk.library_calls import OnProgress
from tartarus.sdk.plans import Plan, default_name
from tartarus.sdk.templates import Template


class Migration(msgspec.Struct, frozen=True, kw_only=True):
    """What was made: `request_path` is where the request was saved; `proof` is None when none was wanted."""

    plan: MigrationPlan
    template: TemplateInfo
    request_path: str
    proof: Proof | None = None


class Orders(NamedTuple):
    """How to migrate. `prove`: a command instead of the one that is chosen; `pause`: freeze it for its export."""

    request_path: str
    replace: bool = False
    pause: bool = False
    proves: bool = True
    prove: tuple[str, ...] = ()
    prove_timeout_s: float = 60.0


def plan_migration(runtime: LegacyRuntime, container: str, wishes: Wishes) -> tuple[ContainerState, MigrationPlan]:
    """Look at a container and decide; nothing is made."""
    if not wishes.name:
        wishes = msgspec.structs.replace(wishes, name=default_name(container))
    if not wishes.name:
        raise InvalidRequest("the template has no name", fix="give one, with --name")
    state = runtime.export_state(container)
    return state, make_plan(state, wishes, engine_socket=runtime.words()[1])


def migrate(
    runtime: LegacyRuntime,
    state: ContainerState,
    plan: MigrationPlan,
    orders: Orders,
    *,
    on_progress: OnProgress | None = None,
    on_made: Callable[[TemplateInfo], None] = lambda _: None,
    client: Client | None = None,
) -> Migration:
    """Carry a plan out.

    Raises MigrationRefused for what it refuses or finds in its way, EngineFailed, and what `Template.make` raises;
    nothing is left behind then.
    """
    client = client or Client()
    if plan.refused:
        first = plan.refused[0]
        raise MigrationRefused(
            f"container {plan.container} holds what no sandbox is given",
            why="; ".join(f"{finding.what}: {finding.detail}" for finding in plan.refused[:5]) or first.detail,
            fix="to go on without these, add --drop-refused",
        )
    request_file.check_free(orders.request_path, replace=orders.replace)
    if orders.proves:
        check_provable(state, orders.prove)
    info = _template(runtime, state, plan, orders, on_progress, client)
    request_file.write(plan.request, orders.request_path)
    if info.status is TemplateStatus.BLOCKED:
        raise TemplateBlocked(
            f"template {info.name!r} was made, but can't be used", why=info.message,
            fix=f"see: tartarus template scan {info.name}",
        )  # fmt: skip
    on_made(info)
    proof = None
    if orders.proves:
        proof = prove(runtime, state, plan, orders.prove, timeout_s=orders.prove_timeout_s, client=client)
    return Migration(plan=plan, template=info, request_path=orders.request_path, proof=proof)


def _template(
    runtime: LegacyRuntime, state: ContainerState, plan: MigrationPlan, orders: Orders,
    on_progress: OnProgress | None, client: Client,
) -> TemplateInfo:  # fmt: skip
    # One that is frozen already was frozen by somebody else, who thaws it.
    pauses = orders.pause and state.status == "running"
    export = Export(_archives(runtime, state.id, plan.copies, pauses=pauses), shown(state.engine, 40))
    made = Plan(plan.definition.id, plan.definition, UploadSource(""), export, replace=orders.replace)
    try:
        return Template.make(made, on_progress=on_progress, client=client).info
    finally:
        export.close()


@contextlib.contextmanager
def _archives(
    runtime: LegacyRuntime, container: str, copies: tuple[Mount, ...], *, pauses: bool
) -> Iterator[Iterator[Iterator[bytes]]]:
    with contextlib.ExitStack() as stack:
        if pauses:
            guard = stack.enter_context(guardian.guarded(runtime, guardian.UNPAUSE, container))
            try:
                runtime.pause(container)
            except EngineRefused:
                guard.cancel()  # somebody else has frozen it meanwhile, and is to thaw it
                raise
        yield stack.enter_context(contextlib.closing(_each(runtime, container, copies)))


def _each(runtime: LegacyRuntime, container: str, copies: tuple[Mount, ...]) -> Generator[Iterator[bytes], None, None]:
    """The container's own files, then what is mounted over them."""
    with runtime.export_files(container) as pieces:
        yield pieces
    for mount in copies:
        argv = copying.archive_argv(mount)
        with children.streamed(argv, f"copying {mount.source}", timeout_s=EXPORT_S, stall_s=STALL_S) as pieces:
            yield pieces
