"""Why the egress proxy does not carry something."""

from __future__ import annotations

REASONS = {
    "name": "the contract does not allow that name at that port",
    "no_name": "it names nobody: TLS needs SNI, and HTTP a Host",
    "mismatch": "the names that it says differ, or the address is not one that its name was answered with",
    "ech": "its name is hidden (Encrypted Client Hello)",
    "protocol": "it is neither TLS nor HTTP/1",
    "malformed": "it can't be read, or can be read in two ways",
    "unresolved": "that name has no address that a sandbox may reach",
    "limit": "it is too large, too slow, or one too many",
    "credential": "what came back holds the credential, or asks for it to be shown",
}
"""Each is counted as ``refused_proxy_REASON``."""


class Refusal(Exception):
    """A connection, or a request, that is not carried. `reason` is one of `REASONS`."""

    def __init__(self, reason: str) -> None:
        super().__init__(REASONS[reason])
        self.reason = reason


def counter(reason: str) -> str:
    """What a refusal is counted as."""
    return f"refused_proxy_{reason}"
