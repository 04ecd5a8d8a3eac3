"""The API's operations on a sandbox's network, as data; see `calls`."""

from __future__ import annotations

import msgspec

from tartarus.model.contract import Contract, NetworkState
from tartarus.sdk.calls import encode
from tartarus.sdk.http import Call, target

_STATE = msgspec.json.Decoder(NetworkState)


def state(sandbox: str) -> Call[NetworkState]:
    """The contract and what was counted."""
    return Call("GET", target("sandboxes", sandbox, "network"), _STATE.decode)


def swear(sandbox: str, contract: Contract) -> Call[NetworkState]:
    """Another contract."""
    return Call("PUT", target("sandboxes", sandbox, "network", "contract"), _STATE.decode, encode(contract))
