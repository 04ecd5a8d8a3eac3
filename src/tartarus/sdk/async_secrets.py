"""The async twin of `secrets`."""

from __future__ import annotations

from tartarus.model.secrets import SecretsRefreshed
from tartarus.sdk.async_client import AsyncClient
from tartarus.sdk.secrets import refreshing


class AsyncSecrets:
    """The secrets of your sandboxes; see `Secrets`, whose names it has."""

    def __init__(self, client: AsyncClient | None = None) -> None:
        self._client = client or AsyncClient()

    async def refresh(self, sandbox: str) -> SecretsRefreshed:
        """Replace a running sandbox's secret files by what their providers say now; variables stay as they are."""
        return await self._client.transport.call(refreshing(sandbox))
