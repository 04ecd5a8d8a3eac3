"""A sandbox's place on the network, as whoever took it sees it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING

from tartarus.network.compiled import Compiled
from tartarus.network.egress.messages import Carried, Credential
from tartarus.network.families import NEXT_HOP_6

if TYPE_CHECKING:
    from tartarus.network.pool import SlotPool


class Slot:
    """A sandbox's place on the network, from `take` until `give_back`.

    `address_6` is None where the host can't carry IPv6. `why_not_6`: why no packet of it passes, if none does.
    `told` is called at the end of each connection that went through the egress proxy, and `credential` for what that
    one is to add to requests for a domain.
    """

    def __init__(
        self, number: int, addresses: tuple[IPv4Address, IPv6Address], gateway: IPv4Address, pool: SlotPool,
        contract: Compiled,
    ) -> None:  # fmt: skip
        self.number = number
        self.contract = contract
        self.address = addresses[0]
        self.gateway = gateway
        self.address_6: IPv6Address | None = addresses[1]
        self.why_not_6 = ""
        self._pool = pool
        self.busy = asyncio.Lock()
        self.given_back = False
        self.cut = False
        self.final: dict[str, int] = {}
        self.told: Callable[[Carried], None] = lambda _: None
        self.credential: Callable[[str], Credential | None] = lambda _: None

    @property
    def gateway_6(self) -> IPv6Address:
        """Who takes its packets of IPv6."""
        return NEXT_HOP_6

    @property
    def mtu(self) -> int:
        """Of its link, in bytes."""
        return self._pool.mtu

    @property
    def resolv_conf(self) -> bytes:
        """What the guest's /etc/resolv.conf must say."""
        return self._pool.resolv_conf

    def counters(self) -> dict[str, int]:
        """What this slot did since it was taken; see `SlotPool.give_back` for the names."""
        return self._pool.counters(self)
