"""A small process beside us that ends what we began in an engine, should we be killed: `python -m` runs it.

It knows one container and one act, and waits for the end of its standard input: the kernel closes that when we end,
however we end.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator

from tartarus.compat.engines import LegacyRuntime
from tartarus.compat.opening import reopen
from tartarus.model.errors import EngineFailed, TartarusError

_ACT_S = 180.0
_ORDERLY, _NOTHING = b".", b"-"
# Who was killed may have asked the engine for something that is still to come: so we look again.
_ATTEMPTS, _PAUSE_S = 5, 0.5
UNPAUSE, REMOVE = "unpause", "remove"


class Guard:
    """What a block that is guarded may say: that there is nothing to be done at its end."""

    word = _ORDERLY

    def cancel(self) -> None:
        """Leave the container as it is."""
        self.word = _NOTHING


@contextlib.contextmanager
def guarded(runtime: LegacyRuntime, act: str, container: str, token: str = "") -> Iterator[Guard]:
    """`act` (unpause or remove) is certain to be done at the block's end, even if that is a SIGKILL.

    `token`: of the request that the container to remove was made for. Raises EngineFailed when it could not be done.
    """
    guardian = subprocess.Popen(
        [sys.executable, "-P", "-m", "tartarus.compat.guardian", act, container, token, *runtime.words()],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for us; it has still to act then
    )  # fmt: skip
    assert guardian.stdin is not None
    assert guardian.stdout is not None
    with guardian.stdout:
        if guardian.stdout.readline() != b"ready\n":
            guardian.kill()
            guardian.wait()
            raise EngineFailed("the helper that watches over the container did not start")
        guard = Guard()
        try:
            yield guard
        finally:
            with contextlib.suppress(BrokenPipeError):
                guardian.stdin.write(guard.word)
                guardian.stdin.close()
            try:
                done = guardian.wait(_ACT_S) == 0
            except subprocess.TimeoutExpired:
                guardian.kill()
                guardian.wait()
                done = False
            if not done and guard.word == _ORDERLY:
                _act(runtime, act, container, token)  # it was killed itself


def _act(runtime: LegacyRuntime, act: str, container: str, token: str) -> None:
    if act == UNPAUSE:
        runtime.unpause(container)
    else:
        runtime.remove(container, token)


def main() -> int:
    """Say that we are there, wait, and act."""
    act, container, token, *words = sys.argv[1:]
    runtime = reopen(*words)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    word = sys.stdin.buffer.read()
    if word == _NOTHING:
        return 0
    orderly = word == _ORDERLY
    for attempt in range(1 if orderly else _ATTEMPTS):
        time.sleep(attempt * _PAUSE_S)
        try:
            _act(runtime, act, container, token)
        except TartarusError:
            if orderly:
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
