"""What policies let network contracts open, at most: a request's contract is narrowed by them, or refused.

Private addresses and the metadata services of clouds are opened by nobody who is not let by name: what a policy
leaves out is closed.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from tartarus.model.contract import HTTP_PORT, OPEN, Contract, Grant, Network, normal, parse_network
from tartarus.model.sandbox import Network as Mode
from tartarus.model.sandbox import SandboxSpec
from tartarus.policy.documents import NetworkPolicy


def contract_of(spec: SandboxSpec, policy: NetworkPolicy) -> Contract | None:
    """The contract that a request is held to, with what the policy denies besides; None without a network.

    An open network is open as far as the policy lets it be.
    """
    if spec.network is Mode.NONE:
        return None
    if spec.network is Mode.OPEN:
        limited = policy.allowed_cidrs is not None or policy.allowed_domains is not None
        asked = msgspec.structs.replace(
            OPEN,
            allowed_cidrs=(policy.allowed_cidrs or ()) if limited else OPEN.allowed_cidrs,
            allowed_domains=policy.allowed_domains or (),
            allowed_ports=policy.allowed_egress_ports or (),
            deny_dns=bool(policy.deny_dns) and not policy.allowed_domains,
        )
    else:
        asked = spec.contract or Contract()
    most = [value for value in (asked.max_connections, policy.max_connections) if value is not None]
    # Requests that the egress proxy adds a secret to come as HTTP, and leave it as HTTPS.
    plain = tuple(Grant(to=use.target, ports=(HTTP_PORT,)) for use in spec.secrets if use.as_ == "proxy" and use.target)
    return msgspec.structs.replace(
        asked, grants=(*asked.grants, *plain), denied_cidrs=(*asked.denied_cidrs, *(policy.denied_cidrs or ())),
        max_connections=min(most, default=None),
    )  # fmt: skip


def refusals(spec: SandboxSpec, policy: NetworkPolicy) -> Iterator[tuple[str, str]]:
    """What of a request's network the policy does not let be: what is asked for, and what would be accepted."""
    if spec.network is Mode.NONE:
        return
    if policy.allow is False:
        yield "a network", "network none"
        return
    contract = spec.contract
    if contract is None:
        return
    if not contract.deny_private and policy.deny_private is not False:
        yield "private addresses", "deny_private: true"
    if not contract.deny_metadata and policy.deny_metadata is not False:
        yield "the metadata services", "deny_metadata: true"
    names_matter = policy.allowed_domains is not None and not policy.allow_direct
    if contract.direct_domains() and (names_matter or policy.allow_direct is False):
        yield "domains past the egress proxy", "domains that are not direct"
    if policy.deny_dns and not contract.deny_dns:
        yield "names that resolve", "deny_dns: true"
    if policy.allowed_egress_ports is not None:
        most = set(policy.allowed_egress_ports)
        for ports in (ports for _, ports in (*contract.networks(), *contract.domains())):
            if not ports or set(ports) - most:
                beyond = ", ".join(map(str, sorted(set(ports) - most))) or "all of them"
                yield f"ports: {beyond}", f"ports {', '.join(map(str, sorted(most)))}"
                break
    yield from _beyond(contract, policy)


def _beyond(contract: Contract, policy: NetworkPolicy) -> Iterator[tuple[str, str]]:
    if policy.allowed_cidrs is None and policy.allowed_domains is None:
        return
    networks = [parse_network(text) for text in policy.allowed_cidrs or ()]
    for network, _ in contract.networks():
        if not any(_within(network, most) for most in networks):
            yield f"network {network}", f"networks {', '.join(map(str, networks)) or 'none'}"
            break
    domains = [normal(text) for text in policy.allowed_domains or ()]
    for name, _ in contract.domains():
        if not any(_covers(most, name) for most in domains):
            yield f"domain {name}", f"domains {', '.join(domains) or 'none'}"
            break


def _within(network: Network, most: Network) -> bool:
    first, last = network.network_address, network.broadcast_address
    return network.version == most.version and first in most and last in most


def _covers(most: str, name: str) -> bool:
    """Whether what a policy allows (``*.`` for all below) holds all that a contract names."""
    if not most.startswith("*."):
        return name == most
    return name == most or name.removeprefix("*.").endswith(most[1:])
