"""The HTTP client for monitors that are driven over a Unix socket: Firecracker's and Cloud Hypervisor's.

httpx does HTTP; what is ours are the limits, for a guest may have taken the monitor over: how long it may take to
answer, how much it may say, and that nothing it says is followed.
"""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any

import httpx

from tartarus.model.errors import GuestFailed
from tartarus.runtimes.microvm.home import Home

CALL_TIMEOUT_S = 60.0
"""For one call; writing a snapshot of a large machine is the longest."""
_ANSWER_MAX = 256 * 1024
_WORDS_MAX = 500


class VmmApi:
    """Calls one monitor, one after the other."""

    def __init__(self, home: Home, socket_name: str, base: str = "") -> None:
        self._held = home.hold_socket(socket_name)
        self._base = base
        transport = httpx.AsyncHTTPTransport(
            uds=f"/proc/self/fd/{self._held}", limits=httpx.Limits(max_connections=1, max_keepalive_connections=1)
        )
        self._client = httpx.AsyncClient(
            transport=transport,
            base_url="http://localhost",
            timeout=CALL_TIMEOUT_S,
            follow_redirects=False,
            trust_env=False,
        )
        self._one = asyncio.Lock()

    async def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """One request; the JSON object that it answers. Raises GuestFailed with the monitor's own words."""
        what = f"{method} {path}"
        try:
            async with self._one, asyncio.timeout(CALL_TIMEOUT_S):
                status, said = await self._ask(method, self._base + path, body)
        except TimeoutError:
            raise _lost(f"it did not answer {what} within {CALL_TIMEOUT_S:g} s") from None
        except (httpx.HTTPError, httpx.StreamError, OSError) as error:
            raise _lost(f"{what}: {str(error)[:_WORDS_MAX] or type(error).__name__}") from error
        if not 200 <= status < 300:
            raise GuestFailed(f"the virtual machine monitor refused {what}", why=f"{status}: {words_of(said)}")
        return _object(said, what)

    async def close(self) -> None:
        """Let go of it."""
        if self._held >= 0:
            os.close(self._held)
            self._held = -1
            await self._client.aclose()

    async def _ask(self, method: str, path: str, body: dict[str, Any] | None) -> tuple[int, bytes]:
        said = b""
        async with self._client.stream(method, path, json=body) as response:
            async for piece in response.aiter_raw():
                said += piece
                if len(said) > _ANSWER_MAX:
                    raise GuestFailed("the virtual machine monitor misbehaves", why="it said more than it may")
        return response.status_code, said


def words_of(said: bytes) -> str:
    """What an error answer says: Firecracker's `fault_message`, Cloud Hypervisor's list of causes, or the text."""
    text = said.decode("utf-8", "replace")
    try:
        found = json.loads(said)
    except (ValueError, RecursionError):
        found = text
    if isinstance(found, dict):
        found = found.get("fault_message", text)
    if isinstance(found, list):
        found = ": ".join(str(part) for part in found[:8])
    return " ".join(str(found).split())[:_WORDS_MAX] or "it does not say why"


def _object(said: bytes, what: str) -> dict[str, Any]:
    if not said.strip():
        return {}
    try:
        found = json.loads(said)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise GuestFailed("the virtual machine monitor misbehaves", why=f"it did not answer {what} with JSON")
    return found


def _lost(why: str) -> GuestFailed:
    return GuestFailed("the virtual machine monitor can't be reached", why=why)
