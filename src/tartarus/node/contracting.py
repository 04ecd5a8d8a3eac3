"""What a sandbox's owner may see of its network, and how it is held to another contract."""

from __future__ import annotations

import asyncio

import msgspec

from tartarus.model.audit import AuditEntry
from tartarus.model.contract import Contract, NetworkState
from tartarus.model.errors import InvalidState, TartarusError
from tartarus.model.sandbox import Network
from tartarus.node.admission import Admission
from tartarus.node.auditing import Auditor
from tartarus.node.networking import refuse_closed
from tartarus.node.sandbox import Sandbox
from tartarus.policy.contracts import contract_of
from tartarus.store.audit.entries import digest_of


class Contracts:
    """The contracts of live sandboxes."""

    def __init__(self, admission: Admission, audit: Auditor) -> None:
        self._admission = admission
        self._audit = audit

    async def state(self, sandbox: Sandbox) -> NetworkState:
        """The contract in force and what was counted; nothing for a sandbox without a network."""
        line = sandbox.line
        ports = () if sandbox.published is None else sandbox.published.ports
        if line is None:
            return NetworkState(published=ports)
        counters = await asyncio.to_thread(line.counters)
        return NetworkState(line.contract, line.address, counters, ports, line.address_6, line.why_not_6)

    async def swear(self, sandbox: Sandbox, contract: Contract) -> NetworkState:
        """Put another contract in its place, at one moment. Raises RequestRejected, InvalidState, InvalidRequest.

        Of two at once, the one that is written down last is the one that holds.
        """
        refuse_closed(contract)
        async with sandbox.turn:
            line, record, place = sandbox.line, sandbox.record, sandbox.place
            if line is None and record.spec.network is not Network.NONE:
                raise InvalidState("this sandbox sleeps, and has no network meanwhile", fix="wake it first")
            if line is None or place is None:
                raise InvalidState("this sandbox was made without a network", fix="make a new one with --network")
            spec = msgspec.structs.replace(record.spec, network=Network.CONTRACT, contract=contract)
            self._admission.admit_contract(place, spec)
            held = contract_of(spec, self._admission.limits(record.tenant, record.template).network)
            assert held is not None
            entry = AuditEntry(
                actor=record.tenant, tenant=record.tenant, action="network.swear", target=record.id, sandbox=record.id,
                decision="allow", input_digest=digest_of(contract), summary=f"{len(held.networks())} networks, "
                f"{len(held.domains())} domains",
            )  # fmt: skip
            await self._audit.record(entry)
            try:
                await line.swear(held)
            except (TartarusError, OSError):
                self._audit.note(msgspec.structs.replace(entry, decision="error", reason="the old one holds"))
                raise
            sandbox.end_unexposed()
        return await self.state(sandbox)
