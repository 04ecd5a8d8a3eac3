"""`Secrets`: those of live sandboxes, by name only; what a new sandbox gets is said when it is made."""

from __future__ import annotations

import msgspec

from tartarus.model.secrets import SecretsRefreshed
from tartarus.sdk.client import Client
from tartarus.sdk.http import Call, target


class Secrets:
    """The secrets of your sandboxes."""

    def __init__(self, client: Client | None = None) -> None:
        self._client = client or Client()

    def refresh(self, sandbox: str) -> SecretsRefreshed:
        """Replace a running sandbox's secret files by what their providers say now; variables stay as they are.

        Raises SecretUnavailable, SecretRefused when the host grants one no more, and InvalidState.
        """
        return self._client.transport.call(refreshing(sandbox))


def refreshing(sandbox: str) -> Call[SecretsRefreshed]:
    """The call, as data."""
    read = msgspec.json.Decoder(SecretsRefreshed).decode
    return Call("POST", target("sandboxes", sandbox, "secrets", "refresh"), read)
