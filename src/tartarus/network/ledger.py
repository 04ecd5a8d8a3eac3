"""What this daemon has changed on the host for its network, written down before it is changed.

Read at the next start after a daemon was killed, so that all of it can be put back.
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

import msgspec

from tartarus.durable import sync_directory, write_whole
from tartarus.model.errors import InvalidState
from tartarus.network import namespace

WAIT_S = 2.0
"""How long a killed daemon's last program may take to end."""
# flock(2) reports no readiness to wait for.
_LOOK_EVERY_S = 0.02
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Changes(msgspec.Struct, frozen=True):
    """`opened`: links that did not forward packets before; `settings_6`: what forwarding IPv6 took, as it was before.

    Good for one boot and one network namespace only.
    """

    boot: str
    namespace: tuple[int, int]
    table: str
    uplink: str
    opened: tuple[str, ...] = ()
    settings_6: tuple[tuple[str, str], ...] = ()

    @classmethod
    def here(cls, table: str, uplink: str) -> Changes:
        """None made yet, in this boot and the calling thread's network namespace."""
        return cls(_BOOT_ID.read_text().strip(), namespace.identity(), table, uplink)

    def is_here(self) -> bool:
        """Whether what they changed still exists: a reboot undoes everything."""
        return (self.boot, self.namespace) == (_BOOT_ID.read_text().strip(), namespace.identity())


class Ledger:
    """The file, and the lock that one daemon holds as long as it has a network."""

    def __init__(self, state_dir: Path) -> None:
        self._path = state_dir / "network.json"
        self._lock = state_dir / "network.lock"

    def lock(self) -> int:
        """Take the lock; the file that holds it. Raises InvalidState when another process keeps it.

        Programs that change the host for us inherit it, so that none of a killed daemon's is still at work when the
        next one begins to clean up.
        """
        self._lock.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        deadline = time.monotonic() + WAIT_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return file
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    os.close(file)
                    raise InvalidState(
                        "the network is in use", why="another daemon has it in the same state directory"
                    ) from error
            time.sleep(_LOOK_EVERY_S)

    def read(self) -> Changes | None:
        """What was written last; None if nothing is changed, or what it says can't be understood."""
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=Changes)
        except (FileNotFoundError, msgspec.DecodeError):
            # It is replaced as a whole, so one that is damaged was never ours to write.
            return None

    def write(self, changes: Changes) -> None:
        """Replace it, on disk when this returns. Raises OSError."""
        write_whole(self._path, msgspec.json.encode(changes))
        sync_directory(self._path.parent)

    def clear(self) -> None:
        """Nothing is changed any more."""
        self._path.unlink(missing_ok=True)
        sync_directory(self._path.parent)
