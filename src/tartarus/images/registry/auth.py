"""Getting a registry's permission: Basic, or the Bearer token flow of the distribution specification.

A token is asked for exactly what we are about to do, whatever the registry's challenge asks for.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Iterable

import httpx
import msgspec

from tartarus.images.registry.credentials import Credentials
from tartarus.images.registry.places import check_followed
from tartarus.model.errors import RegistryFailed

_CLIENT_ID = "tartarus"
MAX_TOKEN_BYTES = 64 * 1024
"""How much of a token server's answer is read."""
# A token that says nothing of its lifetime is good for this long, says the specification.
_DEFAULT_LIFETIME_S = 60.0
_PARAMETER = re.compile(r"\s*([A-Za-z0-9_-]+)\s*=\s*(?:\"((?:[^\"\\]|\\.)*)\"|([^\s,]+))\s*(?:,|$)")

Send = Callable[[httpx.Request], Awaitable[tuple[httpx.Response, bytes]]]
"""Sends one request, and reads its answer up to a limit."""


class _Token(msgspec.Struct):
    token: str = ""
    access_token: str = ""
    expires_in: float | None = None

    def __repr__(self) -> str:
        return "_Token(…)"


class Challenge(msgspec.Struct, frozen=True):
    """One way in that a WWW-Authenticate header offers (RFC 9110, 11.6.1); `scheme` is in lower case."""

    scheme: str
    parameters: dict[str, str] = {}


def parse_challenges(headers: Iterable[str]) -> list[Challenge]:
    """The challenges of all WWW-Authenticate headers, one a header as registries send them. Bad ones are left out."""
    found = []
    for header in list(headers)[:8]:
        scheme, _, rest = header[:4096].strip().partition(" ")
        parameters: dict[str, str] = {}
        position = 0
        while match := _PARAMETER.match(rest, position):
            quoted, plain = match.group(2), match.group(3)
            parameters[match.group(1).lower()] = re.sub(r"\\(.)", r"\1", quoted) if quoted is not None else plain
            position = match.end()
        found.append(Challenge(scheme.lower(), parameters))
    return found


class Authenticator:
    """The Authorization header for one registry, found out when it first refuses us, shared by all requests to it."""

    def __init__(
        self, base: httpx.URL, find: Callable[[], Awaitable[Credentials | None]], scopes: tuple[str, ...], send: Send
    ) -> None:
        self._base = base
        self._find = find
        self._scopes = scopes
        self._send = send
        self._alone = asyncio.Lock()
        self._header = ""
        self._until = float("inf")

    def header(self) -> str:
        """The header's value, or nothing while none is known to be needed."""
        return self._header if time.monotonic() < self._until else ""

    async def renew(self, used: str, challenges: list[Challenge]) -> bool:
        """After a refusal of `used`, find another; whether there is one to try."""
        async with self._alone:
            if self.header() not in {"", used}:
                return True  # another request has just done it
            self._header, self._until = "", float("inf")
            bearer = next((each for each in challenges if each.scheme == "bearer"), None)
            if bearer is not None:
                await self._fetch_token(bearer)
            elif any(each.scheme == "basic" for each in challenges):
                credentials = await self._find()
                self._header = credentials.basic() if credentials is not None else ""
            return self._header not in {"", used}

    async def _fetch_token(self, challenge: Challenge) -> None:
        try:
            realm = httpx.URL(challenge.parameters.get("realm", ""))
        except httpx.InvalidURL:
            raise RegistryFailed("the registry gives an unusable address for tokens") from None
        check_followed(self._base, realm, "the place for tokens")
        response, body = await self._send(self._request(realm, challenge, await self._find()))
        if response.status_code in {400, 401, 403}:
            raise RegistryFailed(
                f"{realm.host} gives no token for {self._base.host}",
                why=f"it answered {response.status_code}",
                fix="check the login (docker login) and that it may use this repository",
            )
        if response.status_code != 200:
            raise RegistryFailed(f"{realm.host} gives no token", why=f"it answered {response.status_code}")
        try:
            token = msgspec.json.decode(body, type=_Token)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            raise RegistryFailed(f"{realm.host} gave no token that can be understood") from None
        value = token.token or token.access_token
        if not re.fullmatch(r"[\x21-\x7e]{1,32768}", value):
            raise RegistryFailed(f"{realm.host} gave no token that a header can carry")
        self._header = f"Bearer {value}"
        # Renewed a little early: it must still be good when the request arrives.
        self._until = time.monotonic() + max(token.expires_in or _DEFAULT_LIFETIME_S, 10.0) - 5.0

    def _request(self, realm: httpx.URL, challenge: Challenge, credentials: Credentials | None) -> httpx.Request:
        service = challenge.parameters.get("service", "")
        if credentials is not None and credentials.identity_token:
            form = {
                "grant_type": "refresh_token",
                "service": service,
                "client_id": _CLIENT_ID,
                "scope": " ".join(self._scopes),
                "refresh_token": credentials.identity_token,
            }
            return httpx.Request("POST", realm, data=form)
        asked = {"scope": self._scopes, **({"service": service} if service else {})}
        headers = {"Authorization": credentials.basic()} if credentials is not None else {}
        return httpx.Request("GET", realm.copy_merge_params(httpx.QueryParams(asked)), headers=headers)
