"""The WebSockets: run a command in a fresh sandbox, execute one more, or watch the main one."""

from __future__ import annotations

import contextlib
import signal
import time
from typing import TYPE_CHECKING

import msgspec
from litestar import websocket
from litestar.params import FromPath

from tartarus.control.api import ApiSocket
from tartarus.control.auditing import noted_socket
from tartarus.control.link import Link
from tartarus.control.mounting import with_links_followed
from tartarus.model.errors import GuestFailed, InvalidRequest, InvalidState, SandboxLost, TartarusError
from tartarus.model.sandbox import ExecSpec, ExitStatus, Reason, SandboxSpec
from tartarus.model.states import TERMINAL
from tartarus.store.audit.entries import digest_of

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from tartarus.control.ports import Process, Sandbox


class RunRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The opening message of a run. Without `keep`, the sandbox ends when the client goes away."""

    spec: SandboxSpec
    keep: bool = False


class AttachRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The opening message of an attachment: ``{}``."""


@websocket("/v1/run")
async def run(socket: ApiSocket) -> None:
    """Make a sandbox, carry its main command's streams, and report how both ended."""
    async with Link(socket) as link:
        request = await link.open(RunRequest)
        if request.spec.command is None and not request.spec.snapshot:  # a snapshot of memory has one of its own
            raise InvalidRequest("the spec has no command", fix="give one, or use POST /v1/sandboxes")
        spec = await with_links_followed(request.spec, socket.api.settings.state_dir)
        sandbox = await socket.api.node.create(socket.peer.tenant, spec)
        carried = False
        try:
            main = _main_of(sandbox)
            await link.event("created", sandbox=sandbox.record)
            await _tell_started(link, sandbox, main)
            carried = await _carried(link.carry(main), link)
            await _tell_end(link, sandbox, main)
        finally:
            if not carried:
                sandbox.detach()  # what is still to come is for the log
                if not request.keep:
                    await sandbox.kill(reason=Reason.USER_REQUEST)


@websocket("/v1/sandboxes/{sandbox_id:str}/exec")
async def execute(socket: ApiSocket, sandbox_id: FromPath[str]) -> None:
    """Run one more command in a live sandbox; it is killed when its client goes away."""
    async with Link(socket) as link:
        spec = await link.open(ExecSpec)
        sandbox = await noted_socket(socket, "sandbox.exec", sandbox_id, input_digest=digest_of(spec))
        process = await sandbox.exec(spec)
        status: ExitStatus | None = None
        try:
            pid, warm = await process.started()
            await link.event("started", pid=pid, warm=warm, start_ms=None)
            await link.carry(process)
            if not link.gone:
                status = await process.wait()
        except GuestFailed as error:
            record = await sandbox.wait()
            raise SandboxLost(
                f"the sandbox ended while the command ran: {record.state.value}", why=record.message
            ) from error
        finally:
            if status is None:
                socket.api.spawn(_abandon(process))
        await link.event("exit", exit=status)


@websocket("/v1/sandboxes/{sandbox_id:str}/attach")
async def attach(socket: ApiSocket, sandbox_id: FromPath[str]) -> None:
    """The main command's output from now on, then how it ended. Leaving changes nothing."""
    since_ns = time.time_ns()
    async with Link(socket) as link:
        await link.open(AttachRequest)
        sandbox = await noted_socket(socket, "sandbox.attach", sandbox_id)
        main = _main_of(sandbox)
        await _tell_started(link, sandbox, main)
        await link.show(sandbox.log, since_ns)
        await _tell_end(link, sandbox, main)


def _main_of(sandbox: Sandbox) -> Process:
    """The sandbox's main command. Raises InvalidState when it has none."""
    if sandbox.main is None:
        raise InvalidState(f"sandbox {sandbox.record.id} has no main command", fix="use exec to run one")
    return sandbox.main


async def _tell_started(link: Link, sandbox: Sandbox, main: Process) -> None:
    pid, warm = await main.started()
    await link.event("started", pid=pid, warm=warm, start_ms=sandbox.record.start_ms)


async def _carried(carrying: Awaitable[None], link: Link) -> bool:
    """Whether the output was carried to its end, which comes early when the whole sandbox is ended."""
    try:
        await carrying
    except GuestFailed:
        return True
    return not link.gone


async def _tell_end(link: Link, sandbox: Sandbox, main: Process) -> None:
    """`exit` is null when the command went down with its sandbox; the record says why."""
    if link.gone:
        return
    record = await sandbox.wait()
    status: ExitStatus | None = None
    if record.state in TERMINAL:  # of a sandbox that is quarantined the command is frozen, and ends who knows when
        with contextlib.suppress(TartarusError):
            status = await main.wait()
    await link.event("exit", exit=status, sandbox=record)


async def _abandon(process: Process) -> None:
    """Kill a process that nobody can reach any more, and read away what it wrote so that its end is seen."""
    try:
        process.signal(signal.SIGKILL, group=True)
        while await process.read() is not None:
            pass
    except TartarusError:
        return


ROUTES = [run, execute, attach]
