"""Requests to one repository of one registry: permitted, redirected, retried and bounded.

httpx (kept by Encode) brings TLS, pooling, proxies and HTTP framing; what is of the registry protocol is here.
Nothing that a registry sends is trusted: its addresses, its sizes, its words in our errors.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from typing import TypeVar

import httpx

from tartarus.images.blobs import Fetch
from tartarus.images.manifests import INDEXES, MANIFESTS, MAX_MANIFEST_BYTES, digest_of
from tartarus.images.oci import Descriptor
from tartarus.images.reference import is_digest
from tartarus.images.registry.answers import ANSWER_TIMEOUT_S, Temporary, check, connection_failure, read_at_most
from tartarus.images.registry.auth import MAX_TOKEN_BYTES, Authenticator, parse_challenges
from tartarus.images.registry.credentials import Credentials, DockerConfig
from tartarus.images.registry.places import Place, check_followed, same_origin
from tartarus.images.registry.settings import RegistrySettings
from tartarus.model.errors import ImageRefused, InvalidRequest, RegistryFailed

_MAX_REDIRECTS = 5
_REDIRECTS = {301, 302, 303, 307, 308}
# Less than this for a whole blob is no transfer but a way to keep us busy.
_SLOWEST_BYTES_PER_S = 16 * 1024
# A connection that brings this much before it breaks is worth any number of new ones.
_PROGRESS_BYTES = 1024**2
_VAGUE_TYPES = {"", "application/json", "application/octet-stream", "text/plain"}
_T = TypeVar("_T")
Body = Callable[[], AsyncIterator[bytes]]


class Repository:
    """One repository at one place; made by `connect`."""

    def __init__(self, http: httpx.AsyncClient, base: httpx.URL, place: Place, settings: RegistrySettings) -> None:
        self._http = http
        self._settings = settings
        self._root = base.join(f"/v2/{place.repository}/")
        self._place = place
        self._auth = Authenticator(base, self._credentials, (f"repository:{place.repository}:pull",), self._plain)

    def ask_for(self, *scopes: str) -> None:
        """What we need permission for, when it is more than to pull."""
        self._auth = Authenticator(self._root, self._credentials, scopes, self._plain)

    async def manifest(self, target: str) -> tuple[bytes, str]:
        """The manifest under a tag or digest, and its media type. Raises ImageNotFound.

        Its content is checked against the digest, asked for or told.
        """

        async def attempt() -> tuple[bytes, str]:
            accept = {"Accept": ", ".join((*MANIFESTS, *INDEXES))}
            async with self._exchange("GET", f"manifests/{target}", accept) as response:
                await check(response, f"{self._place.registry}/{self._place.repository}:{target}")
                content = await read_at_most(response, MAX_MANIFEST_BYTES, "the manifest")
                kind = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
                told = response.headers.get("Docker-Content-Digest", "")
                return _checked(content, target, told), "" if kind in _VAGUE_TYPES else kind

        return await self._retried(attempt)

    def blob(self, descriptor: Descriptor) -> Fetch:
        """What brings a blob from any offset on, over as many connections as that takes."""

        async def fetch(offset: int) -> AsyncGenerator[bytes, None]:
            deadline = time.monotonic() + ANSWER_TIMEOUT_S + (descriptor.size - offset) / _SLOWEST_BYTES_PER_S
            failures, mark = 0, offset
            while offset < descriptor.size:
                try:
                    async with contextlib.aclosing(self._piece(descriptor, offset)) as chunks:
                        async for chunk in chunks:
                            yield chunk
                            offset += len(chunk)
                            if time.monotonic() > deadline:
                                raise RegistryFailed(f"{self._place.host} sends blob {descriptor.digest} too slowly")
                except Temporary as failed:
                    failures = 0 if offset - mark >= _PROGRESS_BYTES else failures
                    failures, mark = failures + 1, offset
                    await self._pause(failed, failures)

        return fetch

    async def _piece(self, descriptor: Descriptor, offset: int) -> AsyncGenerator[bytes, None]:
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        got = offset
        async with self._exchange("GET", f"blobs/{descriptor.digest}", headers) as response:
            await check(response, f"blob {descriptor.digest}")
            skip = _to_skip(response, offset)
            async for chunk in response.aiter_raw():
                rest = chunk[skip:]
                skip -= len(chunk) - len(rest)
                if rest:
                    got += len(rest)
                    yield rest
        if got < descriptor.size:
            failed = RegistryFailed(f"{self._place.host} sent {got} of the {descriptor.size} bytes of a blob")
            raise Temporary(failed)

    async def has_blob(self, digest: str) -> bool:
        """Whether the repository has the blob already."""

        async def attempt() -> bool:
            async with self._exchange("HEAD", f"blobs/{digest}") as response:
                if response.status_code == 404:
                    return False
                await check(response, f"blob {digest}")
                return True

        return await self._retried(attempt)

    async def put_blob(self, descriptor: Descriptor, content: Body, mount_from: str = "") -> bool:
        """Upload a blob, in one piece; whether it moved: False if the registry took it from `mount_from` itself."""

        async def attempt() -> bool:
            mount = f"?mount={descriptor.digest}&from={mount_from}" if mount_from else ""
            async with self._exchange("POST", f"blobs/uploads/{mount}", {"Content-Length": "0"}) as response:
                await check(response, f"repository {self._place.repository} to upload to")
                if response.status_code == 201:
                    return False
                place = self._location(response, "the place to upload to")
            place = place.copy_set_param("digest", descriptor.digest)
            headers = {"Content-Type": "application/octet-stream", "Content-Length": str(descriptor.size)}
            slowest_s = descriptor.size / _SLOWEST_BYTES_PER_S
            async with self._exchange("PUT", place, headers, content, slowest_s) as response:
                await check(response, f"the upload of blob {descriptor.digest}")
            return True

        return await self._retried(attempt)

    async def put_manifest(self, target: str, content: bytes, media_type: str) -> None:
        """Store a manifest under a tag or its digest."""

        async def attempt() -> None:
            async def body() -> AsyncIterator[bytes]:
                yield content

            headers = {"Content-Type": media_type, "Content-Length": str(len(content))}
            async with self._exchange("PUT", f"manifests/{target}", headers, body) as response:
                await check(response, f"the manifest of {self._place.repository}:{target}")
                told = response.headers.get("Docker-Content-Digest", "")
                if is_digest(told) and told != digest_of(content):
                    raise RegistryFailed(f"{self._place.host} stored another manifest than it was given", why=told)

        await self._retried(attempt)

    @contextlib.asynccontextmanager
    async def _exchange(
        self,
        method: str,
        where: str | httpx.URL,
        headers: Mapping[str, str] = {},
        content: Body | None = None,
        body_s: float = 0.0,
    ) -> AsyncGenerator[httpx.Response, None]:
        """One attempt at a request: with permission, renewed once if refused, and to where we are redirected.

        Raises Temporary for connections that fail or break, while the answer is read as well. `body_s`: how long
        our own body may take.
        """
        url = self._root.join(where) if isinstance(where, str) else where
        renewed = False
        for _ in range(_MAX_REDIRECTS + 2):
            request = self._http.build_request(method, url, headers=headers, content=content() if content else None)
            # Our permission is for the registry: whom it sends us to never sees it.
            used = self._auth.header() if same_origin(url, self._root) else ""
            if used:
                request.headers["Authorization"] = used
            with connection_failure(url):
                async with asyncio.timeout(ANSWER_TIMEOUT_S + body_s):
                    response = await self._http.send(request, stream=True)
                try:
                    if response.status_code == 401 and not renewed and same_origin(url, self._root):
                        renewed = True
                        challenges = parse_challenges(response.headers.get_list("WWW-Authenticate"))
                        if await self._auth.renew(used, challenges):
                            # Read to its end, the connection serves the next attempt.
                            await read_at_most(response, MAX_TOKEN_BYTES, "the registry's refusal")
                            continue
                    elif response.status_code in _REDIRECTS and method in {"GET", "HEAD"}:
                        url = self._location(response, "the place of a blob")
                        continue
                    yield response
                    return
                finally:
                    await response.aclose()
        raise RegistryFailed(f"{self._place.host} redirects without end")

    def _location(self, response: httpx.Response, what: str) -> httpx.URL:
        try:
            url = response.url.join(response.headers.get("Location", ""))
        except httpx.InvalidURL:
            raise RegistryFailed(f"{self._place.host} gives an unusable address as {what}") from None
        check_followed(self._root, url, what)
        return url

    async def _plain(self, request: httpx.Request) -> tuple[httpx.Response, bytes]:
        """A request to a token server: retried, but neither permitted nor redirected."""

        async def attempt() -> tuple[httpx.Response, bytes]:
            with connection_failure(request.url):
                async with asyncio.timeout(ANSWER_TIMEOUT_S):
                    response = await self._http.send(request, stream=True)
                try:
                    if response.status_code >= 500 or response.status_code == 429:
                        await check(response, "a token")
                    return response, await read_at_most(response, MAX_TOKEN_BYTES, "a token")
                finally:
                    await response.aclose()

        return await self._retried(attempt)

    async def _credentials(self) -> Credentials | None:
        given = self._settings.credentials.get(self._place.registry)
        if given is not None or self._settings.docker_config is None:
            return given
        return await DockerConfig(self._settings.docker_config).find(self._place.registry)

    async def _retried(self, attempt: Callable[[], Awaitable[_T]]) -> _T:
        failures = 0
        while True:
            try:
                return await attempt()
            except Temporary as failed:
                failures += 1
                await self._pause(failed, failures)

    async def _pause(self, failed: Temporary, failures: int) -> None:
        """Wait before the next attempt, as long as the registry asks for; give up after the last."""
        if failures >= self._settings.attempts:
            raise failed.error from failed
        backoff = self._settings.backoff_s * 2 ** (failures - 1) * random.uniform(1.0, 1.5)  # noqa: S311 - no secret
        await asyncio.sleep(max(backoff, failed.delay_s))


def _checked(content: bytes, target: str, told: str) -> bytes:
    """The manifest, when it is what was asked for, and what the registry itself says it is."""
    digest = digest_of(content)
    for expected in (target if ":" in target else "", told):
        if expected and expected != digest:
            raise ImageRefused(
                f"the registry's manifest is not {expected[:100]}",
                why=f"its digest is {digest}",
                fix="the registry is damaged or dishonest; don't trust the image",
            )
    return content


def _to_skip(response: httpx.Response, offset: int) -> int:
    """How much of the answer we have already: all of `offset`, when the registry knows no ranges."""
    if response.status_code == 200 or not offset:
        return offset
    if not response.headers.get("Content-Range", "").startswith(f"bytes {offset}-"):
        raise RegistryFailed("the registry sends another part of a blob than was asked for")
    return 0


@contextlib.asynccontextmanager
async def connect(place: Place, settings: RegistrySettings) -> AsyncGenerator[Repository, None]:
    """Requests to a repository. No request is made yet, but to find out whether loopback speaks TLS."""
    # Their lines at INFO and DEBUG have whole URLs, and those of redirects carry signatures.
    for name in ("httpx", "httpcore"):
        logging.getLogger(name).setLevel(logging.WARNING)
    context = await asyncio.to_thread(_tls, settings, place)
    try:
        http = httpx.AsyncClient(
            verify=context,
            # Settings come from one object, not from the environment.
            trust_env=False,
            proxy=settings.proxy if settings.proxy and not place.is_loopback else None,
            timeout=httpx.Timeout(settings.silence_timeout_s, connect=settings.connect_timeout_s, pool=None),
            limits=httpx.Limits(max_connections=settings.parallel + 4),
            headers={"User-Agent": "tartarus", "Accept-Encoding": "identity"},
        )
    except (ValueError, httpx.InvalidURL):
        raise InvalidRequest("the proxy for registries is not an HTTP proxy's URL") from None
    async with http:
        yield Repository(http, await _base(http, place), place, settings)


def _tls(settings: RegistrySettings, place: Place) -> ssl.SSLContext:
    context = ssl.create_default_context()
    ca_file = settings.ca_files.get(place.registry)
    if ca_file is not None:
        try:
            context.load_verify_locations(ca_file)
        except (OSError, ssl.SSLError) as error:
            raise InvalidRequest(f"{ca_file} has no certificates in PEM", why=str(error)) from None
    return context


async def _base(http: httpx.AsyncClient, place: Place) -> httpx.URL:
    """HTTPS; on loopback, plain HTTP where TLS is not spoken."""
    base = httpx.URL(f"https://{place.host}/")
    if not place.is_loopback:
        return base
    try:
        with connection_failure(base):
            async with http.stream("HEAD", base.join("/v2/")):
                return base
    except Temporary:
        return base.copy_with(scheme="http")
