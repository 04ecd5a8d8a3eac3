"""Attacks over objects that processes share by number or name."""

from __future__ import annotations

import os
import struct

from tests.escape.attack import inside
from tests.escape.kit import ESCAPED, WORLD, asked, opened, outcome

_RDWR = 2


@inside("ipc/shared-memory", tries="attach to System V shared memory of the host", container="EINVAL", process="ENOSYS")
def shared_memory() -> dict[str, str]:
    number = WORLD["segment"]
    return {
        "attach": asked("shmat", number, 0, 0),
        "attach to read": asked("shmat", number, 0, 0o10000),
        "look": asked("shmctl", number, 2, bytes(128)),
        "remove": asked("shmctl", number, 0, None),
    }


@inside("ipc/messages", tries="read and send System V messages of the host", container="EINVAL", process="ENOSYS")
def messages() -> dict[str, str]:
    number = WORLD["queue"]
    return {
        "send": asked("msgsnd", number, struct.pack("<q8s", 1, b"x"), 8, 0o4000),
        "receive": asked("msgrcv", number, bytes(64), 32, 0, 0o4000),
        "look": asked("msgctl", number, 2, bytes(128)),
        "remove": asked("msgctl", number, 0, None),
    }


@inside("ipc/semaphores", tries="change System V semaphores of the host", container="EINVAL", process="ENOSYS")
def semaphores() -> dict[str, str]:
    number = WORLD["semaphores"]
    return {
        "raise": asked("semop", number, struct.pack("<Hhh", 0, 1, 0), 1),
        "raise with a deadline": asked("semtimedop", number, struct.pack("<Hhh", 0, 1, 0), 1, bytes(16)),
        "set": asked("semctl", number, 0, 16, 1),
        "remove": asked("semctl", number, 0, 0, 0),
    }


@inside("ipc/lists", tries="list System V objects of everybody", container="none", process="ENOSYS|EACCES")
def lists() -> dict[str, str]:
    def count(name: str, command: int) -> str:
        # The highest used index of a table that should be empty is 0.
        answer = asked(name, 0, command, bytes(128)) if name != "semctl" else asked(name, 0, 0, command, bytes(128))
        return "none" if answer == "escaped" else answer

    found = {"shared memory": count("shmctl", 14), "messages": count("msgctl", 12), "semaphores": count("semctl", 19)}
    for name in ("shm", "msg", "sem"):
        lines: list[bytes] = []

        def look(name: str = name, lines: list[bytes] = lines) -> None:
            with open(f"/proc/sysvipc/{name}", "rb") as file:
                lines.extend(file.readlines()[1:])

        answer = outcome(look, succeeded="none")
        found[f"table of {name}"] = ESCAPED if lines else answer
    return found


@inside("ipc/message-queues", tries="open POSIX message queues of the host", container="ENOENT", process="ENOSYS")
def message_queues() -> dict[str, str]:
    return {
        "open": asked("mq_open", WORLD["mq"], _RDWR | os.O_NONBLOCK, 0, None),
        "remove": asked("mq_unlink", WORLD["mq"]),
    }


@inside(
    "ipc/shared-files",
    tries="open the host's shared memory files and temporary files",
    container="ENOENT",
    process="EACCES",
)
def shared_files() -> dict[str, str]:
    path = WORLD["shared_memory"]
    return {
        "read": opened(path),
        "write": opened(path, os.O_RDWR),
        "remove": outcome(os.unlink, path),
        "bait in the temporary directory": opened(WORLD["bait"] + "/readable"),
    }


@inside(
    "ipc/temporary-files", tries="leave files where other users find them", container="own", process="EACCES",
    note="A container's /tmp, /var/tmp and /dev/shm are its own; the bait's neighbours on the host show that nothing came.",
)  # fmt: skip
def temporary_files() -> dict[str, str]:
    name = "left-by-tartarus-sandbox"
    own = "own" if WORLD["level"] != "process" else ESCAPED
    return {
        place: opened(f"{place}/{name}", os.O_CREAT | os.O_WRONLY, own) for place in ("/tmp", "/var/tmp", "/dev/shm")
    }
