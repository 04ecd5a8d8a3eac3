"""The other tenant's sandbox: what runs in it, and how it is asked whether anybody disturbed it.

`live` is shipped into a sandbox of its own, like an attack. It opens every door its level lets it open, says
where they are, and at the end says whether somebody came.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

SECRET = "tartarus-bait-of-the-neighbour"
_SIGNALS = (1, 2, 3, 10, 12, 13, 14, 15, 18, 20, 23, 28, 29)


def _listeners() -> dict[str, Any]:
    doors: dict[str, Any] = {}
    for name, family, address in (
        ("tcp4", socket.AF_INET, ("127.0.0.1", 0)),
        ("tcp6", socket.AF_INET6, ("::1", 0)),
        ("abstract", socket.AF_UNIX, "\0tartarus-neighbour"),
        ("socket", socket.AF_UNIX, os.path.abspath("neighbour.sock")),
    ):
        try:
            door = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            door.bind(address)
            door.listen(16)
        except OSError:
            continue  # this level has no such thing
        doors[name] = door
    return doors


def _files(places: list[str]) -> list[str]:
    made = []
    for place in places:
        path = os.path.join(place, "neighbours-secret")
        try:
            with open(path, "w") as file:
                file.write(SECRET)
            os.chmod(path, 0o666)
        except OSError:
            continue
        made.append(path)
    return made


def _visitors(doors: dict[str, Any]) -> list[str]:
    found = []
    for name, door in doors.items():
        try:
            door.accept()
        except BlockingIOError:
            continue
        found.append(f"somebody reached the neighbour's {name}")
    return found


def live() -> None:
    """Open the doors, say where they are; on each line of input, say what happened since."""
    came: list[str] = []
    for number in _SIGNALS:
        signal.signal(number, lambda got, _frame: came.append(f"signal {got} came"))
    doors = _listeners()
    files = _files([os.getcwd(), "/tmp", "/dev/shm", "tmp"])
    where = {
        "pid": os.getpid(),
        "home": os.getcwd(),
        "files": [os.path.abspath(path) for path in files],
        "ports": {name: doors[name].getsockname()[1] for name in ("tcp4", "tcp6") if name in doors},
    }
    os.write(1, json.dumps(where).encode() + b"\n")
    for _line in sys.stdin:
        came += _visitors(doors)
        for path in files:
            with open(path) as file:
                came += [] if file.read() == SECRET else [f"{path} was changed"]
        os.write(1, json.dumps(came).encode() + b"\n")
