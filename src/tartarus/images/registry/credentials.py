"""Who we are to a registry: given by the caller, or found in Docker's config.json and its credential helpers.

The formats are Docker's: https://docs.docker.com/reference/cli/docker/login/#credential-stores.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import os
import re
import signal
from pathlib import Path
from typing import Any

import msgspec

from tartarus.images.reference import DOCKER_HUB
from tartarus.model.errors import InvalidRequest, RegistryFailed

_HUB_KEY = "https://index.docker.io/v1/"
_MAX_CONFIG_BYTES = 1024**2
_MAX_ANSWER_BYTES = 64 * 1024
_HELPER_TIMEOUT_S = 30.0
_HELPER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
# The helpers' way to say that they know nothing, in docker-credential-helpers' words.
_UNKNOWN = ("credentials not found", "no credentials server url", "not logged in")
_TOKEN_USER = "<token>"  # noqa: S105 - the name under which helpers hand out an identity token


class Credentials(msgspec.Struct, frozen=True):
    """A user name and password, or an identity token (an OAuth 2 refresh token). Never shown, logged or compared."""

    username: str = ""
    password: str = ""
    identity_token: str = ""

    def __repr__(self) -> str:
        """Without what must stay secret."""
        return "Credentials(…)"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        """The same, for those who print structs in their own way."""
        return []

    def basic(self) -> str:
        """The value of an Authorization header (RFC 7617)."""
        return "Basic " + base64.b64encode(f"{self.username}:{self.password}".encode()).decode()


class _Auth(msgspec.Struct):
    auth: str = ""
    username: str = ""
    password: str = ""
    identitytoken: str = ""

    def __repr__(self) -> str:
        return "_Auth(…)"


class _File(msgspec.Struct):
    auths: dict[str, _Auth] = {}
    credHelpers: dict[str, str] = {}  # noqa: N815 - Docker's names
    credsStore: str = ""  # noqa: N815


class _HelperAnswer(msgspec.Struct):
    Username: str = ""
    Secret: str = ""

    def __repr__(self) -> str:
        return "_HelperAnswer(…)"


class DockerConfig:
    """Docker's config.json, as far as it is about logins."""

    def __init__(self, path: Path) -> None:
        """Read the file, if there is one. Raises InvalidRequest when it can't be understood."""
        self._path = path
        self._file = _File()
        try:
            with open(path, "rb") as file:
                content = file.read(_MAX_CONFIG_BYTES + 1)
        except FileNotFoundError:
            return
        except OSError as error:
            raise InvalidRequest(f"can't read {path}", why=error.strerror or "") from None
        if len(content) > _MAX_CONFIG_BYTES:
            raise InvalidRequest(f"{path} is too large to be Docker's configuration")
        try:
            self._file = msgspec.json.decode(content, type=_File)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            # Not with the decoder's own words: they may quote what stands there.
            raise InvalidRequest(f"{path} is not a Docker configuration", fix="repair or remove it") from None

    async def find(self, registry: str) -> Credentials | None:
        """The credentials for a registry, or None. Raises RegistryFailed when a credential helper fails."""
        key = _HUB_KEY if registry == DOCKER_HUB else registry
        helper = self._helper(registry)
        if helper:
            return await ask_helper(helper, key)
        for name, auth in self._file.auths.items():
            if _host(name) == registry:
                return self._plain(name, auth)
        return None

    def _helper(self, registry: str) -> str:
        for name, helper in self._file.credHelpers.items():
            if _host(name) == registry:
                return helper
        return self._file.credsStore

    def _plain(self, name: str, auth: _Auth) -> Credentials | None:
        username, password = auth.username, auth.password
        if auth.auth:
            try:
                username, _, password = base64.b64decode(auth.auth, validate=True).decode().partition(":")
            except (binascii.Error, UnicodeDecodeError):
                raise InvalidRequest(
                    f"{self._path} has a damaged entry for {name!r}", fix="log in again with docker login"
                ) from None
            password = password.rstrip("\0")
        found = Credentials(username, password, auth.identitytoken)
        return found if username or auth.identitytoken else None


def _host(key: str) -> str:
    """The registry that a key of config.json is about: keys may be URLs with a version's path."""
    host = key.removeprefix("https://").removeprefix("http://").partition("/")[0].lower()
    return DOCKER_HUB if host in {"index.docker.io", "registry-1.docker.io"} else host


async def ask_helper(name: str, key: str, timeout_s: float = _HELPER_TIMEOUT_S) -> Credentials | None:
    """What ``docker-credential-<name> get`` answers for `key`; None when it knows nothing of it."""
    if not _HELPER_NAME.fullmatch(name):
        raise InvalidRequest(f"{name[:100]!r} is not a credential helper's name", fix="correct Docker's config.json")
    program = f"docker-credential-{name}"
    # Pipes of our own: asyncio's would have us wait for whoever else holds them when the helper has ended.
    question, answer = _question(key), os.pipe()
    try:
        process = await asyncio.create_subprocess_exec(
            program, "get", stdin=question, stdout=answer[1], stderr=asyncio.subprocess.DEVNULL, start_new_session=True
        )
    except OSError as error:
        os.close(answer[0])
        raise RegistryFailed(
            f"the credential helper {program} can't be run",
            why=error.strerror or "",
            fix="install it, or remove it from Docker's config.json",
        ) from None
    finally:
        os.close(question)
        os.close(answer[1])
    try:
        async with asyncio.timeout(timeout_s):
            said = await _read(answer[0])
            # One that says too much would wait for us to read on.
            status = await process.wait() if len(said) <= _MAX_ANSWER_BYTES else 0
    except TimeoutError:
        raise RegistryFailed(f"the credential helper {program} did not answer in {timeout_s:g} s") from None
    finally:
        await _end(process)
    return _understood(program, status, said)


def _question(key: str) -> int:
    """A pipe with the whole question in it: short enough for any pipe's buffer."""
    reading, writing = os.pipe()
    os.write(writing, key.encode() + b"\n")
    os.close(writing)
    return reading


async def _read(file: int) -> bytes:
    """What comes through the pipe, up to the limit and a little more; closes it."""
    reader = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(file, "rb", buffering=0)
    )
    try:
        said = b""
        while len(said) <= _MAX_ANSWER_BYTES and (piece := await reader.read(_MAX_ANSWER_BYTES)):
            said += piece
        return said
    finally:
        transport.close()


async def _end(process: asyncio.subprocess.Process) -> None:
    """Nothing of the helper stays, neither its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()


def _understood(program: str, status: int, answer: bytes) -> Credentials | None:
    if status != 0:
        said = answer.decode(errors="replace").lower()
        if any(words in said for words in _UNKNOWN):
            return None
        raise RegistryFailed(f"the credential helper {program} failed", why=f"exit status {status}")
    try:
        if len(answer) > _MAX_ANSWER_BYTES:
            raise ValueError
        found = msgspec.json.decode(answer, type=_HelperAnswer)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        raise RegistryFailed(f"the credential helper {program} gave no answer that can be understood") from None
    if found.Username == _TOKEN_USER:
        return Credentials(identity_token=found.Secret)
    return Credentials(found.Username, found.Secret) if found.Username else None
