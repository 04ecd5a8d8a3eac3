"""Where the daemon of this user listens: the rule of `model.settings`, as plain strings.

`Settings` itself brings msgspec and pathlib, 20 ms that `tartarus run` need not spend;
a property test holds both to the same answer.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

from tartarus.model.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Mapping

_SOCKET_NAME = "tartarus.sock"
_MAX_SOCKET_PATH_BYTES = 107


class Places(NamedTuple):
    """A daemon's state directory and socket, as absolute paths."""

    state_dir: str
    socket: str

    @classmethod
    def at(cls, state_dir: str, socket: str = "") -> Places:
        """The places of a daemon whose state is in `state_dir`; the socket is below it unless given."""
        # Not os.path.abspath: pathlib, which Settings uses, keeps ".." (it may lead through a symlink).
        state_dir = _absolute(state_dir)
        socket = _absolute(socket) if socket else os.path.join(state_dir, "run", _SOCKET_NAME)
        size = len(os.fsencode(socket))
        if size > _MAX_SOCKET_PATH_BYTES:
            raise InvalidRequest(
                f"the socket's path {socket!r} is {size} bytes long",
                why=f"Unix sockets take at most {_MAX_SOCKET_PATH_BYTES}",
                fix="choose a shorter TARTARUS_HOME or --socket",
            )
        return cls(state_dir, socket)

    @classmethod
    def from_environment(cls, environ: Mapping[str, str], uid: int) -> Places:
        """The places of the daemon that user `uid`'s commands talk to."""
        home = environ.get("TARTARUS_HOME", "")
        if home:
            return cls.at(os.path.expanduser(home))
        if uid == 0:
            return cls.at("/var/lib/tartarus", "/run/tartarus/" + _SOCKET_NAME)
        state_home = environ.get("XDG_STATE_HOME", "")
        if not state_home.startswith("/"):
            state_home = os.path.join(environ.get("HOME", "/"), ".local", "state")
        runtime = environ.get("XDG_RUNTIME_DIR", "")
        socket = os.path.join(runtime, "tartarus", _SOCKET_NAME) if runtime.startswith("/") else ""
        return cls.at(os.path.join(state_home, "tartarus"), socket)

    @property
    def log_file(self) -> str:
        """The daemon's log, JSON lines."""
        return os.path.join(self.state_dir, "daemon.log")


def _absolute(path: str) -> str:
    """Absolute, without empty and "." parts, as pathlib writes it."""
    parts = [part for part in os.path.join(os.getcwd(), path).split("/") if part not in ("", ".")]
    return "/" + "/".join(parts)
