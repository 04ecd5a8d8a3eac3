"""Which of gVisor's platforms its guests run on: systrap, or KVM where a guest was seen to run on it in time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Literal

import structlog

from tartarus.model.errors import IsolationUnavailable, TartarusError

Wanted = Literal["systrap", "kvm", "auto"]
PROBE_S = 10.0
"""How long a first guest may take on KVM. On nested machines /dev/kvm may open and run nothing: such a guest hangs."""
_log = structlog.get_logger("tartarus.runtimes.gvisor")


class Platforms:
    """`name` is what guests are started on; `why` says, for `auto` that came to systrap, why not KVM."""

    def __init__(self, wanted: Wanted) -> None:
        self.name = "systrap" if wanted == "auto" else wanted
        self.why = ""
        self._wanted = wanted
        self._settled = wanted == "systrap"
        self._settling = asyncio.Lock()

    @property
    def may_be_kvm(self) -> bool:
        """Whether runsc is to find /dev/kvm."""
        return self._wanted != "systrap"

    def __str__(self) -> str:
        if not self._settled:
            return f"{self._wanted} (not tried yet)"
        return f"{self.name}, since {self.why}" if self.why else self.name

    async def settle(self, start_one: Callable[[], Awaitable[None]]) -> None:
        """Find out, once. Raises IsolationUnavailable where KVM was asked for and a guest does not run on it.

        `start_one` starts a guest on `name`, waits until it serves, and ends it.
        """
        async with self._settling:
            if self._settled:
                return
            self.name = "kvm"
            why = ""
            try:
                async with asyncio.timeout(PROBE_S):
                    await start_one()
            except TimeoutError:
                why = f"no guest ran on KVM within {PROBE_S:g} s"
            except TartarusError as error:
                why = f"no guest ran on KVM: {str(error).splitlines()[0]}"
            if why and self._wanted == "kvm":
                raise IsolationUnavailable(
                    "gVisor can't use KVM here", why=why, fix="set gvisor.platform to systrap or auto in config.yaml"
                )
            if why:
                self.name, self.why = "systrap", why
                _log.warning("kvm_unusable", error=why)
            self._settled = True
