"""Values in HashiCorp Vault or OpenBao: the KV engine's version 2, by a token or an AppRole.

Three requests of a stable API, each bounded in bytes and time; hvac would read an answer of any size.
"""

from __future__ import annotations

import ipaddress
import ssl
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import httpx
import msgspec

from tartarus.model.errors import InvalidRequest, SecretUnavailable
from tartarus.model.secrets import Reference
from tartarus.secrets.files import read_private, wipe
from tartarus.secrets.providers import take
from tartarus.secrets.providers.envfile import absolute

MAX_ANSWER_BYTES = 1024**2
LIMIT_S = 8.0
"""For one request; the broker waits two seconds longer, so that the reason is known."""
_MAX_TOKEN_BYTES = 64 * 1024
_FORBIDDEN, _NOT_FOUND = 403, 404


class HashicorpVault:
    """One server. `fetch` reads ``vault:MOUNT/PATH#FIELD``."""

    def __init__(self, options: dict[str, str]) -> None:
        names = ("token_file", "role_id", "secret_id_file", "auth_mount", "namespace", "ca_file")
        address, token, role, secret, mount, namespace, ca_file = take(options, "address", optional=names)
        if bool(token) == bool(role and secret) or bool(role) != bool(secret):
            raise InvalidRequest("it needs one way to log in", fix="give token_file, or role_id and secret_id_file")
        self._address = server_address(address)
        self._token_file = absolute(token) if token else None
        self._role_id, self._secret_id_file = role, absolute(secret) if secret else None
        self._auth_mount = mount or "approle"
        self._headers = {"X-Vault-Request": "true", "Accept-Encoding": "identity"} | (
            {"X-Vault-Namespace": namespace} if namespace else {}
        )
        self._ca_file = absolute(ca_file) if ca_file else None
        self._login = threading.Lock()
        self._token = ""

    def fetch(self, reference: Reference) -> bytes:
        """The field of the newest version. Raises SecretUnavailable."""
        mount, _, path = reference.path.partition("/")
        if not path or not reference.field:
            raise SecretUnavailable(
                "a reference to Vault needs a mount, a path and a field", fix="as in vault:kv/app#token"
            )
        place = f"/v1/{quote(mount, safe='')}/data/{quote(path, safe='/')}"
        with self._client() as client:
            status, answer = self._call(client, "GET", place, token=self._current_token(client))
            if status == _FORBIDDEN and self._role_id:
                # Its lease is over, most likely.
                self._token = ""
                status, answer = self._call(client, "GET", place, token=self._current_token(client))
        if status == _NOT_FOUND:
            raise SecretUnavailable(
                f"Vault has no {reference.path}", fix="check the path; deleted versions count as none"
            )
        if status != httpx.codes.OK:
            raise SecretUnavailable(f"Vault refused to give {reference.path}", why=f"HTTP {status}")
        value = _within(answer, "data", "data", reference.field)
        if not isinstance(value, str):
            raise SecretUnavailable(f"Vault's {reference.path} has no text in {reference.field!r}")
        return value.encode("utf-8", "surrogateescape")

    def _client(self) -> httpx.Client:
        verify = ssl.create_default_context(cafile=str(self._ca_file) if self._ca_file else None)
        # No redirects: the token would go along. No proxies from the environment.
        return httpx.Client(
            base_url=self._address, verify=verify, timeout=LIMIT_S / 2, follow_redirects=False, trust_env=False
        )

    def _current_token(self, client: httpx.Client) -> str:
        if self._token_file is not None:
            return _line(self._token_file)
        with self._login:
            if not self._token:
                assert self._secret_id_file is not None
                login = {"role_id": self._role_id, "secret_id": _line(self._secret_id_file)}
                place = f"/v1/auth/{quote(self._auth_mount, safe='/')}/login"
                status, answer = self._call(client, "POST", place, body=login)
                token = _within(answer, "auth", "client_token")
                if status != httpx.codes.OK or not isinstance(token, str) or not token.isascii():
                    raise SecretUnavailable("Vault did not take the AppRole", why=f"HTTP {status}")
                self._token = token
            return self._token

    def _call(
        self, client: httpx.Client, method: str, path: str, *, token: str = "", body: dict[str, str] | None = None
    ) -> tuple[int, Any]:
        """(status, JSON). Of an error only the status is kept: its text may be anything."""
        headers = self._headers | ({"X-Vault-Token": token} if token else {})
        end = time.monotonic() + LIMIT_S
        content = bytearray()
        try:
            with client.stream(method, path, headers=headers, json=body) as answer:
                # As it comes: whole pieces would be waited for, and what is packed could be a bomb.
                for piece in answer.iter_raw():
                    content += piece
                    if len(content) > MAX_ANSWER_BYTES or time.monotonic() > end:
                        raise SecretUnavailable("Vault's answer has no end", why="too many bytes, or too slow")
                status = answer.status_code
        except (httpx.HTTPError, ssl.SSLError) as error:
            raise SecretUnavailable("Vault can't be reached", why=type(error).__name__) from None
        try:
            return status, msgspec.json.decode(content)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            return status, None
        finally:
            wipe(content)


def server_address(text: str) -> str:
    """An address that a token may be sent to: https, or this host itself. Raises InvalidRequest."""
    parts = urlsplit(text)
    plain = parts.path in {"", "/"} and not (parts.query or parts.fragment or parts.username or parts.password)
    if not parts.hostname or not plain or parts.scheme not in {"http", "https"}:
        raise InvalidRequest(f"{text!r} is no server's address", fix="write it like https://vault.example.org:8200")
    if parts.scheme == "http" and not _is_this_host(parts.hostname):
        raise InvalidRequest("secrets are not fetched without TLS", fix="use https://, with ca_file if need be")
    return f"{parts.scheme}://{parts.netloc}"


def _is_this_host(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _line(path: Path) -> str:
    content = read_private(path, _MAX_TOKEN_BYTES)
    try:
        text = content.decode("ascii", "replace").strip()
    finally:
        wipe(content)
    if not text.isprintable() or not text.isascii() or not text:
        raise SecretUnavailable(f"{path} holds no token", fix="put it in its only line")
    return text


def _within(answer: Any, *keys: str) -> Any:
    for key in keys:
        answer = answer.get(key) if isinstance(answer, dict) else None
    return answer
