"""The part of a `Sandbox` that has stateful code contexts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from tartarus.guest.command_lines import CONTEXT
from tartarus.guest.contexts import CodeContext, ContextProcess
from tartarus.guest.parked import HandedOver, Parked, park
from tartarus.model.errors import ContextNotFound, GuestFailed
from tartarus.model.ids import new_id
from tartarus.model.sandbox import ExecSpec, SandboxRecord
from tartarus.model.states import State
from tartarus.node.parking import parking_of

if TYPE_CHECKING:
    from tartarus.guest.channel import GuestChannel, GuestExec, GuestProcess
    from tartarus.model.template import Template
    from tartarus.runtimes.base import Places


class Contexts:
    """Each is an interpreter of its own."""

    record: SandboxRecord
    template: Template
    channel: GuestChannel
    _places: Places
    _parked: Parked | None
    _contexts: dict[str, CodeContext]

    async def open_context(self) -> str:
        """Start a stateful code context and return its id."""
        self._require(State.RUNNING, "open a code context in")
        request = self._guest_exec(ExecSpec(argv=(CONTEXT,), stdin=True), once=False)
        context_id = new_id("ctx")
        warm_up = self.template.warm_up
        process: ContextProcess
        if warm_up is None or warm_up.is_cloned:
            process = self.channel.exec(request)
        else:
            process = await self._cells_of_parked(request)
        self._contexts[context_id] = CodeContext(
            process, interrupted_by_host=warm_up is not None and warm_up.kind == "r"
        )
        return context_id

    async def _cells_of_parked(self, request: GuestExec) -> HandedOver:
        """A context in the interpreter that is parked here, or in one that is parked for it now."""
        taken = None if self._parked is None else self._parked.offer(request, _no_cold_cells)
        if taken is None:
            parking = parking_of(self.template, self._places, self.record.isolation)
            parking = msgspec.structs.replace(parking, env=request.env, cwd=request.cwd, cells=True)
            taken = (await park(self.channel, parking)).offer(request, _no_cold_cells)
        if taken is None:
            raise GuestFailed("the interpreter ended before its first cell")
        return taken

    def context(self, context_id: str) -> CodeContext:
        """A context that `open_context` made."""
        found = self._contexts.get(context_id)
        if found is None:
            raise ContextNotFound(f"this sandbox has no code context {context_id!r}")
        return found

    async def close_context(self, context_id: str) -> None:
        """End a context and forget its variables."""
        context = self.context(context_id)
        del self._contexts[context_id]
        await context.close()

    if TYPE_CHECKING:

        def _guest_exec(self, spec: ExecSpec, *, once: bool) -> GuestExec:
            """What the guest is told to run."""

        def _require(self, state: State, doing: str) -> None:
            """Raise InvalidState unless it is in that state."""


def _no_cold_cells() -> GuestProcess:
    raise GuestFailed("the interpreter took no cells", fix="open another context")
