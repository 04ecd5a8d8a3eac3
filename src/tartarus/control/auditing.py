"""Every request that changes something, or hands out what is in a sandbox, is in the audit log: who, what, how it went.

A handler says what it does with ``audit="sandbox.kill"``; with ``audit_refused`` only what is refused is written here,
since the rest is where it is decided. A test makes sure that no handler that changes something says nothing.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any, Protocol, cast
from urllib.parse import parse_qs

from litestar.enums import ScopeType

from tartarus.control.peers import Peer, peer_of
from tartarus.model.audit import AuditEntry, AuditPage, AuditProof, AuditQuery, AuditVerification
from tartarus.model.errors import TartarusError

if TYPE_CHECKING:
    from litestar.types import ASGIApp, Message, Receive, Scope, Send

    from tartarus.control.api import ApiSocket
    from tartarus.control.ports import Sandbox

REFUSED = frozenset({401, 403, 404})
_SHOWN = ("path", "name")


class Audit(Protocol):
    """The audit log, as the API needs it."""

    def add(self, entry: AuditEntry) -> None:
        """Take an entry. Raises DaemonUnavailable: then what it is about must not be."""

    def note(self, entry: AuditEntry) -> None:
        """Take an entry about what has happened."""

    def find(self, query: AuditQuery) -> Awaitable[AuditPage]:
        """Entries, the newest first."""

    def verify(self) -> Awaitable[AuditVerification]:
        """Look at all of the log."""

    def prove(self, sequence: int) -> Awaitable[AuditProof]:
        """A proof of one entry."""


def entry_of(peer: Peer, action: str, target: str = "", **fields: Any) -> AuditEntry:
    """An entry about what a caller does."""
    return AuditEntry(
        actor=peer.tenant, tenant=peer.tenant, action=action, target=target,
        sandbox=target if target.startswith("sbx-") else "", **fields,
    )  # fmt: skip


async def noted_socket(socket: ApiSocket, action: str, sandbox_id: str, **fields: Any) -> Sandbox:
    """The caller's sandbox, once it is written down what they do with it, or that they may not."""
    peer = socket.peer
    try:
        sandbox = await socket.api.find_live(peer.tenant, sandbox_id)
    except TartarusError as error:
        decision = "deny" if error.http_status in REFUSED else "error"
        socket.api.audit.note(entry_of(peer, action, sandbox_id, decision=decision, reason=error.code))
        raise
    socket.api.audit.add(entry_of(peer, action, sandbox.record.id, decision="allow", **fields))
    return sandbox


def audited(app: ASGIApp) -> ASGIApp:
    """Middleware: writes down how each request went, as its handler says."""

    async def middleware(scope: Scope, receive: Receive, send: Send) -> None:
        route: Any = scope.get("route_handler")
        opt: dict[str, Any] = {} if route is None else route.opt
        action, refused_only = opt.get("audit", ""), False
        if not action:
            action, refused_only = opt.get("audit_refused", ""), True
        if scope["type"] != ScopeType.HTTP or not action:
            await app(scope, receive, send)
            return
        began = time.perf_counter()

        async def send_noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                _note(cast("dict[str, Any]", scope), action, message["status"], began, refused_only=refused_only)
            await send(message)

        await app(scope, receive, send_noting)

    return middleware


def _note(scope: dict[str, Any], action: str, status: int, began: float, *, refused_only: bool) -> None:
    if status < 400 and refused_only:
        return
    parameters = scope.get("path_params") or {}
    query = parse_qs(scope["query_string"].decode("latin-1"))
    shown = [f"{name}={query[name][0]}" for name in _SHOWN if name in query]
    if scope["route_handler"].opt.get("is_forwarded"):  # what it asks is the guest's business
        shown = [f"{scope['method']} port {parameters.get('port')}"]
    audit: Audit = scope["litestar_app"].state["api"].audit
    audit.note(
        entry_of(
            peer_of(scope["client"]), action, str(next(iter(parameters.values()), "")),
            decision="allow" if status < 400 else "deny" if status in REFUSED else "error",
            reason="" if status < 400 else f"HTTP {status}", summary=" ".join(shown),
            duration_us=int((time.perf_counter() - began) * 1e6),
        )
    )  # fmt: skip
