"""What every handler is given: the node, the store, the caller, and the way from a name to a live sandbox."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import weakref
from collections.abc import Awaitable, Callable, Coroutine
from typing import TypeVar, cast

import anyio
from litestar import Request, WebSocket
from litestar.datastructures import State
from litestar.handlers import HTTPRouteHandler

from tartarus.control.auditing import Audit
from tartarus.control.decode import nearest
from tartarus.control.hangups import HangupWatcher
from tartarus.control.library_ports import Modules, Snapshots, Templates, Uploads
from tartarus.control.peers import Peer, peer_of
from tartarus.control.ports import Node, Sandbox
from tartarus.control.rule_ports import Policies
from tartarus.model.errors import InvalidRequest, InvalidState, SandboxNotFound, TartarusError
from tartarus.model.sandbox import SandboxRecord
from tartarus.model.settings import Settings
from tartarus.store import SandboxStore
from tartarus.telemetry.metrics import Metrics

T = TypeVar("T")
_PATH_PARAMETERS = frozenset(
    {
        "sandbox_id", "context_id", "template_id", "snapshot_id", "upload_id", "module_id", "policy_id", "sequence",
        "lamentation_id", "case_id", "profile_id",
    }
)  # fmt: skip


class ClientGone(TartarusError):
    """The client hung up before its answer was there; nobody reads this."""

    code = "client_gone"
    http_status = 499


class Api:
    """One daemon's services, for the handlers of one application."""

    def __init__(
        self,
        settings: Settings,
        store: SandboxStore,
        node: Node,
        metrics: Metrics,
        hangups: HangupWatcher,
        *,
        uploads: Uploads,
        modules: Modules,
        templates: Templates,
        snapshots: Snapshots,
        policies: Policies,
        audit: Audit,
        started_at: float,
        shut_down: Callable[[], None],
    ) -> None:
        self.settings = settings
        self.store = store
        self.node = node
        self.metrics = metrics
        self.hangups = hangups
        self.uploads = uploads
        self.modules = modules
        self.templates = templates
        self.snapshots = snapshots
        self.policies = policies
        self.audit = audit
        self.lamentations = node.furies.lamentations
        self.quarantine = node.furies.quarantine
        self.started_at = started_at
        self.shut_down = shut_down
        self._background: set[asyncio.Task[None]] = set()
        self._default_contexts: weakref.WeakKeyDictionary[Sandbox, asyncio.Task[str]] = weakref.WeakKeyDictionary()

    async def find(self, tenant: str, id_or_name: str) -> tuple[SandboxRecord, Sandbox | None]:
        """A record of the tenant's and its sandbox, None when it has ended. Raises SandboxNotFound or InvalidState."""
        record = await self.store.get(tenant, id_or_name)
        for _ in range(2):
            if record.ended_at is not None:
                return record, None
            with contextlib.suppress(SandboxNotFound):
                return record, self.node.live(tenant, record.id)
            # It ended between the two looks, or it has not started yet.
            record = await self.store.get(tenant, record.id)
        if record.ended_at is not None:
            return record, None
        raise InvalidState(f"sandbox {record.name or record.id} is {record.state.value}", fix="try again in a moment")

    async def find_live(self, tenant: str, id_or_name: str, *, wake: bool = True) -> Sandbox:
        """The tenant's live sandbox of that id, name or id prefix; with `wake`, a hibernated one is woken first.

        Raises SandboxNotFound, InvalidState, and what waking may raise.
        """
        record, sandbox = await self.find(tenant, id_or_name)
        if sandbox is None:
            raise InvalidState(
                f"sandbox {record.name or record.id} has ended ({record.state.value})",
                fix=f"see its output with: tartarus logs {record.name or record.id}",
            )
        sandbox.refuse_if_quarantined()
        if wake:
            await self.node.sleeper.wake(sandbox)
        return sandbox

    def spawn(self, work: Coroutine[None, None, None]) -> None:
        """Run something that outlives its request; it must not raise."""
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def default_context(self, sandbox: Sandbox) -> str:
        """The id of the code context that calls without one share; made on first use."""
        task = self._default_contexts.get(sandbox)
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            task = self._default_contexts[sandbox] = asyncio.create_task(sandbox.open_context())
        return await asyncio.shield(task)

    def forget_default_context(self, sandbox: Sandbox, context_id: str) -> None:
        """The context was closed: the next call without one gets a new one."""
        task = self._default_contexts.get(sandbox)
        if task is not None and task.done() and not task.cancelled() and not task.exception():
            if task.result() != context_id:
                return
            del self._default_contexts[sandbox]


class ApiRequest(Request[None, None, State]):
    """A request that knows its caller."""

    @property
    def api(self) -> Api:
        """The daemon's services."""
        return cast("Api", self.app.state["api"])

    @property
    def peer(self) -> Peer:
        """Who is calling, by the kernel's word."""
        return peer_of(self.scope["client"])

    async def live(self, id_or_name: str, *, wake: bool = True) -> Sandbox:
        """The caller's live sandbox of that id, name or id prefix, awake unless that is not wanted."""
        return await self.api.find_live(self.peer.tenant, id_or_name, wake=wake)

    async def unless_gone(self, work: Awaitable[T]) -> T:
        """Await `work`, but cancel it, and so this request, as soon as the client hangs up."""
        with anyio.CancelScope() as scope, self.api.hangups.watching(self.peer.fd, scope.cancel):
            return await work
        raise ClientGone("the client hung up")


class ApiSocket(WebSocket[None, None, State]):
    """A WebSocket that knows its caller."""

    @property
    def api(self) -> Api:
        """The daemon's services."""
        return cast("Api", self.app.state["api"])

    @property
    def peer(self) -> Peer:
        """Who is calling, by the kernel's word."""
        return peer_of(self.scope["client"])


async def refuse_unknown_parameters(request: Request[None, None, State]) -> None:
    """Refuse query parameters that the handler does not have: a misspelt filter must not list everything."""
    if not request.scope["query_string"] or request.route_handler.opt.get("is_forwarded"):
        return
    known = _query_names(request.route_handler)
    for key in request.query_params:
        if key not in known:
            raise InvalidRequest(f"unknown query parameter {key!r}", fix=nearest(key, known) if known else "remove it")


@functools.cache
def _query_names(handler: HTTPRouteHandler) -> frozenset[str]:
    parameters = handler.parsed_fn_signature.parameters
    names = {getattr(field.kwarg_definition, "name", None) or name for name, field in parameters.items()}
    return frozenset(names - {"request", "data", *_PATH_PARAMETERS})
