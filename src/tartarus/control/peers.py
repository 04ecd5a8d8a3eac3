"""The listening socket: the kernel says who is on the other end (SO_PEERCRED), and strangers are turned away.

A connection's identity is the peer's at connect(2); no byte that it sends can change it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import struct
from pathlib import Path
from typing import Any

import msgspec

from tartarus.control.problems import refusal_response
from tartarus.model.errors import DaemonUnavailable, PermissionRefused

BACKLOG = 1024
SEND_BUFFER_BYTES = 1024 * 1024
_UCRED = struct.Struct("iII")


class Peer(msgspec.Struct, frozen=True):
    """Who is calling: process, user and group at the moment they connected; `fd` is our end of the connection."""

    pid: int
    uid: int
    fd: int

    @property
    def tenant(self) -> str:
        """Whose sandboxes this caller sees."""
        return f"uid-{self.uid}"


class PeerSocket(socket.socket):
    """An accepted connection whose "address" is its peer's credentials: (``pid:uid``, our file descriptor)."""

    peer: Peer

    def getpeername(self) -> tuple[str, int]:
        """The address that ends in an ASGI scope's ``client``; `peer_of` reads it back."""
        return (f"{self.peer.pid}:{self.peer.uid}", self.peer.fd)


def peer_of(client: tuple[str, int] | None) -> Peer:
    """The peer behind an ASGI scope's ``client``."""
    if client is None:
        raise PermissionRefused("the caller is unknown", why="the connection is already closed")
    pid, uid = client[0].split(":")
    return Peer(pid=int(pid), uid=int(uid), fd=client[1])


class PeerListener(socket.socket):
    """Accepts the allowed users' connections only; the others get a 403 and the door."""

    allowed: frozenset[int]

    def accept(self) -> tuple[PeerSocket, Any]:
        """Like socket.accept; raises ConnectionAbortedError for a refused peer, which asyncio's server ignores."""
        connection, _ = super().accept()
        pid, uid, _gid = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        if uid not in self.allowed:
            _log_refusal(uid, pid)
            with connection, contextlib.suppress(OSError):
                # Not to be kept waiting while it is told no: what its socket buffer does not take is dropped.
                connection.setblocking(False)
                connection.send(refusal_response(_refusal(uid, self.allowed)))
            raise ConnectionAbortedError(f"uid {uid} may not connect")
        with contextlib.suppress(OSError):
            # As much as the host allows: fewer, larger writes per stream.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        accepted = PeerSocket(fileno=connection.detach())
        accepted.peer = Peer(pid=pid, uid=uid, fd=accepted.fileno())
        return accepted, accepted.getpeername()


def listen(path: Path, allowed: frozenset[int]) -> PeerListener:
    """Bind and listen at `path`, for its owner only, replacing what a dead daemon left there.

    The caller holds the instance lock, so nobody else listens at this path. Raises DaemonUnavailable.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.exists() and not stat.S_ISSOCK(path.stat().st_mode):
            raise DaemonUnavailable(f"{path} is in the way", why="it is not a socket", fix="move it away")
        path.unlink(missing_ok=True)
        listener = PeerListener(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.allowed = allowed
        # umask is the whole process's, but nothing else runs yet; chmod afterwards would leave a gap.
        previous = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(previous)
        listener.setblocking(False)
        listener.listen(BACKLOG)
    except OSError as error:
        raise DaemonUnavailable(f"can't listen at {path}", why=error.strerror or str(error)) from error
    return listener


def _log_refusal(uid: int, pid: int) -> None:
    import structlog  # late: this module is up before the slow imports

    structlog.get_logger("tartarus.control").warning("peer_refused", uid=uid, pid=pid)


def _refusal(uid: int, allowed: frozenset[int]) -> PermissionRefused:
    owners = " or ".join(f"uid {owner}" for owner in sorted(allowed, reverse=True))
    return PermissionRefused(
        f"uid {uid} may not use this daemon",
        why=f"it serves {owners}",
        fix="run your own: tartarus up",
    )
