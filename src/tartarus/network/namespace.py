"""Acting in another network namespace: always in a thread made for it, which ends there.

No thread ever comes back from another namespace, so none can be left in the wrong one by a failure, and the event
loop and its workers stay in the host's.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from typing import TypeVar

_CLONE_NEWNET = 0x40000000
# Of the thread, not of the process as /proc/self would say: they may differ here.
_OWN = "/proc/thread-self/ns/net"

T = TypeVar("T")


def run_in(namespace: int, work: Callable[[], T]) -> T:
    """Run `work` in the network namespace of an open namespace file or of a pidfd's process; raises what it raises.

    Raises ProcessLookupError when that process has ended.
    """
    return _in_new_thread(lambda: _call("setns", namespace, _CLONE_NEWNET), work)


def create() -> int:
    """A new network namespace, as an open file: it lives as long as something holds that file or lives in it."""
    return _in_new_thread(lambda: _call("unshare", _CLONE_NEWNET), current)


def current() -> int:
    """The calling thread's network namespace as an open file."""
    return os.open(_OWN, os.O_RDONLY | os.O_CLOEXEC)


def identity(namespace: int | None = None) -> tuple[int, int]:
    """What tells one network namespace from another; the calling thread's unless given."""
    status = os.stat(_OWN) if namespace is None else os.fstat(namespace)
    return status.st_dev, status.st_ino


def _in_new_thread(enter: Callable[[], None], work: Callable[[], T]) -> T:
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            enter()
            results.append(work())
        except BaseException as error:  # noqa: BLE001 - handed to the caller's thread
            errors.append(error)

    thread = threading.Thread(target=run, name="network-namespace")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def _call(name: str, *args: int) -> None:
    # os.setns and os.unshare came with Python 3.12.
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*args) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), name)
