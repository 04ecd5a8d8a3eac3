"""Which system calls a sandbox makes: every one, of every process in it, from its agent's first instruction on.

A second filter, over the level's own, hands each call over that the level lets pass; it is noted, and goes on. What
the level refuses stays refused, and is not noted: a profile made of this is never wider than the level.
"""

from __future__ import annotations

import socket
from collections import Counter
from functools import cache
from typing import Final

from tartarus.guest.program import Fd, Program
from tartarus.guest.syscalls import machine, table
from tartarus.runtimes.confine.bpf import ALLOW, ASK, assemble
from tartarus.runtimes.confine.listening import Listener, let_go_on, next_call
from tartarus.runtimes.confine.seccomp import hand_over

UNSEEN: Final = ("close", "sendmsg")
"""What hands the listener over, when nobody listens yet; every agent makes these calls."""
_WAIT_KILLABLE = 1 << 5


@cache
def recording_filter(arch: str | None = None) -> bytes:
    """Asks about every call but `UNSEEN`."""
    numbers = table(arch)
    return assemble(arch or machine(), {numbers[name]: ALLOW for name in UNSEEN}, ASK, foreign=ALLOW)


def add_recording(program: Program, recorder: Fd) -> None:
    """Install it: the program's last step, after the level's own filter. Needs Linux 5.19.

    `recorder`: a passed end of a socket pair; a `CallRecorder` has the other.
    """
    hand_over(program, recording_filter(), recorder, flags=_WAIT_KILLABLE)


class CallRecorder(Listener):
    """Notes how often each call was made. A sandbox that calls without end takes an eighth of the daemon's time."""

    most_per_s = 5000

    def __init__(self, link: socket.socket) -> None:
        self._calls: Counter[str] = Counter()
        super().__init__(link)

    @classmethod
    def open(cls) -> tuple[CallRecorder, int]:
        """One that serves until the last process ends, and the end for the guest, which the caller closes."""
        ours, theirs = socket.socketpair()
        return cls(ours), theirs.detach()

    def serve(self, listener: int) -> None:
        """Note one call, and let it go on."""
        call = next_call(listener)
        if call is not None:
            self._calls[call.name] += 1
            let_go_on(listener, call)

    @property
    def calls(self) -> dict[str, int]:
        """The names of the calls, with how often each was made; numbers without a name are left out."""
        return {name: count for name, count in sorted(self._calls.items()) if name}
