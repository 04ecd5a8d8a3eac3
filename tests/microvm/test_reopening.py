"""The nursery of all machines can be killed at any moment, also while another one is begun."""

from __future__ import annotations

import os
import signal

import pytest

from tartarus.model.errors import IsolationUnavailable
from tartarus.runtimes.base import GuestRequest
from tartarus.runtimes.microvm.machinery import Machinery
from tartarus.runtimes.microvm.runtime import MicrovmRuntime
from tartarus.runtimes.microvm.snapshot import MachineSnapshot

from .conftest import RESOURCES, sh, start

pytestmark = [pytest.mark.anyio, pytest.mark.needs("root", "busybox", "microvm")]


async def test_what_machines_need_is_known_while_none_can_run(
    runtime: MicrovmRuntime, snapshot: MachineSnapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A template that stands goes on to work with the next nursery; a saved machine is not refused meanwhile."""
    needs = runtime.needs(snapshot)
    assert runtime._machinery is not None
    nursery = runtime._machinery._launcher._nursery
    os.kill(nursery.pid, signal.SIGKILL)
    await nursery.control.closed

    async def fail(*_: object, **__: object) -> Machinery:
        raise IsolationUnavailable("no monitor runs a machine here")

    with monkeypatch.context() as patch:
        patch.setattr(Machinery, "open", fail)
        with pytest.raises(IsolationUnavailable, match="no monitor"):
            await runtime.clone(snapshot, GuestRequest("machine-none", "machine-none", RESOURCES), warm=False)
    assert runtime.needs(snapshot) == needs
    guest = await start(runtime, snapshot, "machine-again")
    assert await sh(guest, "echo again") == "again\n"
    await guest.destroy()
