"""A sandbox's place on the network, as whoever took it sees it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from ipaddress import IPv4Address
from typing import TYPE_CHECKING

from tartarus.network.compiled import Compiled
from tartarus.network.egress.messages import Carried, Credential

if TYPE_CHECKING:
    from tartarus.network.pool import SlotPool


class Slot:
    """A sandbox's place on the network, from `take` until `give_back`.

    `told` is called at the end of each connection that went through the egress proxy, and `credential` for what that
    one is to add to requests for a domain.
    """

    def __init__(
        self, number: int, address: IPv4Address, gateway: IPv4Address, pool: SlotPool, contract: Compiled
    ) -> None:
        self.number = number
        self.contract = contract
        self.address = address
        self.gateway = gateway
        self._pool = pool
        self.busy = asyncio.Lock()
        self.given_back = False
        self.cut = False
        self.final: dict[str, int] = {}
        self.told: Callable[[Carried], None] = lambda _: None
        self.credential: Callable[[str], Credential | None] = lambda _: None

    @property
    def mtu(self) -> int:
        """Of its link, in bytes."""
        return self._pool.mtu

    @property
    def resolv_conf(self) -> bytes:
        """What the guest's /etc/resolv.conf must say."""
        return f"nameserver {self.gateway}\n".encode()

    def counters(self) -> dict[str, int]:
        """What this slot did since it was taken; see `SlotPool.give_back` for the names."""
        return self._pool.counters(self)
