"""The id map of a jailed child's user namespace: its ids 0 to 65535 are the sandbox's, as files on disk have them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tartarus.images.unpack.limits import IDS
from tartarus.model.errors import IsolationUnavailable

_TOOL_TIMEOUT_S = 10


def apply(pid: int, uid_base: int | None) -> None:
    """Write the maps of process `pid`, which is in a new user namespace.

    `uid_base`: the host id of id 0, when we are root; without root, the first of the user's subordinate ids, which
    are 1 and up, and id 0 is the user. None: the only id is the user's own. Raises IsolationUnavailable.
    """
    own = (os.geteuid(), os.getegid())
    try:
        if uid_base is None:
            if own[0] != 0:
                Path(f"/proc/{pid}/setgroups").write_text("deny", encoding="ascii")
            for name, value in zip(("uid_map", "gid_map"), own, strict=True):
                Path(f"/proc/{pid}/{name}").write_text(f"0 {value} 1", encoding="ascii")
        elif own[0] == 0:
            for name in ("uid_map", "gid_map"):
                Path(f"/proc/{pid}/{name}").write_text(f"0 {uid_base} {IDS}", encoding="ascii")
        else:
            for tool, value in zip(("newuidmap", "newgidmap"), own, strict=True):
                _run([tool, str(pid), "0", str(value), "1", "1", str(uid_base), str(IDS - 1)])
    except OSError as error:
        raise IsolationUnavailable(
            "can't map the ids of the process that unpacks layers",
            why=str(error),
            fix="run `tartarus doctor`; as a user, check /etc/subuid and /etc/subgid",
        ) from error


def _run(argv: list[str]) -> None:
    try:
        subprocess.run(argv, check=True, capture_output=True, text=True, timeout=_TOOL_TIMEOUT_S)
    except subprocess.CalledProcessError as error:
        raise OSError(f"{argv[0]}: {error.stderr.strip()}") from error
    except subprocess.TimeoutExpired as error:
        raise OSError(f"{argv[0]} does not end") from error
