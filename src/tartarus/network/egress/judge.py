"""What the daemon thinks of what its egress proxy asks: the same contracts and answers that the packet filter has."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from ipaddress import AddressValueError, IPv4Address, IPv6Address
from typing import Any

from tartarus.model.contract import HTTP_PORT
from tartarus.network.compiled import Compiled
from tartarus.network.egress.messages import Ask, Credential, Verdict
from tartarus.network.resolver import Asker, Resolver

Credentials = Callable[[str, str], Credential | None]
"""What is added to requests of a slot for a name."""
Refuses = Callable[[IPv4Address | IPv6Address, Compiled], str]


class Judge:
    """Decides; nothing that is asked is believed but the slot, which the packet filter vouches for."""

    def __init__(self, resolver: Resolver, refuses: Refuses, credentials: Credentials) -> None:
        self._resolver = resolver
        self._refuses = refuses
        self._credentials = credentials

    def decide(self, ask: Ask) -> Verdict | Coroutine[Any, Any, Verdict]:
        """Whether a slot may reach what it names, and where that is: at once, unless that must be looked up."""
        slot = IPv4Address(ask.slot)
        asker = self._resolver.asker(slot)
        if asker is None:
            return Verdict(ask.number, refused="name")
        contract = asker.contract
        address = _address(ask.name)
        if address is not None:
            open_to_it = contract.allows(address, ask.port) and not self._refuses(address, contract)
            if not open_to_it or ask.kind == "tls" or (ask.address and ask.address != ask.name):
                return Verdict(ask.number, refused="name")
            return Verdict(ask.number, addresses=(ask.name,))
        credential = self._credentials(ask.slot, ask.name) if ask.kind == "http" else None
        if credential is not None and ask.port not in {HTTP_PORT, credential.port}:
            credential = None  # of another server on that host
        ports = contract.ports_of(ask.name)
        if ports is not None and (ask.port if credential is None else credential.port) not in ports:
            return Verdict(ask.number, refused="name")
        if ask.live:
            closed = ask.address and self._refuses(IPv4Address(ask.address), contract)
            return Verdict(ask.number, refused="name" if closed else "")
        if ask.address:
            if not asker.was_answered(ask.name, IPv4Address(ask.address)):
                return Verdict(ask.number, refused="mismatch")
            return Verdict(ask.number, addresses=(ask.address,), credential=credential)
        return self._looked_up(ask, asker, credential)

    async def _looked_up(self, ask: Ask, asker: Asker, credential: Credential | None) -> Verdict:
        slot, contract = IPv4Address(ask.slot), asker.contract
        found = await self._resolver.look_up(slot, ask.name)
        if self._resolver.asker(slot) is not asker or asker.contract is not contract or not found:
            return Verdict(ask.number, refused="unresolved")
        return Verdict(ask.number, addresses=tuple(map(str, found)), credential=credential)


def _address(text: str) -> IPv4Address | None:
    try:
        return IPv4Address(text)
    except AddressValueError:
        return None
