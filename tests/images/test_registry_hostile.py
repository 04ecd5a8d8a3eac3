"""Registries that fail, lie or attack: what a pull makes of each."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.images.registries import Answer, Blob, Request, Server, Shelf, index_of, make_image, sha256

from tartarus.images.blobs import BlobStore
from tartarus.images.manifests import OCI_INDEX, OCI_MANIFEST
from tartarus.images.oci import Image, Platform
from tartarus.images.reference import Reference
from tartarus.images.registry import Credentials, RegistrySettings, pull, push
from tartarus.images.registry.auth import parse_challenges
from tartarus.images.registry.places import check_followed, is_loopback, same_origin
from tartarus.model.errors import ImageNotFound, ImageRefused, InvalidRequest, RegistryFailed, TartarusError

pytestmark = pytest.mark.anyio

AMD64 = Platform()
SETTINGS = RegistrySettings(attempts=3, backoff_s=0.01, silence_timeout_s=5)
MADE = make_image({"a": os.urandom(400_000)}, {"b": b"b" * 1000})
BIG = MADE.layers[0]
SECRET = "s3cr3t-p4ssw0rd"

Spoil = Callable[[Request], Answer | None]


@contextlib.contextmanager
def serving(spoil: Spoil = lambda _: None, shelf: Shelf | None = None) -> Iterator[Server]:
    """A registry with MADE, where `spoil` may answer in place of the shelf."""
    shelf = shelf or Shelf(MADE)
    with Server(lambda request: spoil(request) or shelf.route(request)) as server:
        yield server


async def pull_from(server: Server, blobs: BlobStore, settings: RegistrySettings = SETTINGS, name: str = "x") -> Image:
    return await pull(Reference.parse(f"{server.host}/{name}"), blobs, settings, platform=AMD64)


@pytest.fixture
def blobs(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "blobs")


def is_blob(request: Request, blob: Blob) -> bool:
    return request.path.endswith(f"/blobs/{blob.digest}")


def times(count: int, answer: Callable[[Request], Answer | None]) -> Spoil:
    """Only for the first `count` requests that it has an answer for."""
    left = [count]

    def spoil(request: Request) -> Answer | None:
        found = answer(request) if left[0] else None
        left[0] -= found is not None
        return found

    return spoil


# Failures that pass.


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
async def test_what_fails_for_a_moment_is_tried_again(blobs: BlobStore, status: int) -> None:
    with serving(times(2, lambda _: Answer(status))) as server:
        await pull_from(server, blobs)
    assert blobs.find(BIG.digest)


@pytest.mark.parametrize("value", ["0.3", lambda: formatdate(time.time() + 1.5, usegmt=True)])
async def test_the_registry_says_when(blobs: BlobStore, value: object) -> None:
    after = str(value() if callable(value) else value)
    with serving(times(1, lambda _: Answer(429, headers={"Retry-After": after}))) as server:
        started = time.monotonic()
        await pull_from(server, blobs)
        assert time.monotonic() - started > 0.3


@pytest.mark.parametrize("value", ["soon", "-5", "nan", "Tue, 99 Foo 0000"])
async def test_nonsense_is_no_time(blobs: BlobStore, value: str) -> None:
    with serving(times(1, lambda _: Answer(503, headers={"Retry-After": value}))) as server:
        await pull_from(server, blobs)


async def test_what_fails_for_ever_is_an_error(blobs: BlobStore) -> None:
    with serving(lambda _: Answer(503, b'{"errors": [{"message": "tired \\u001b]0;x"}]}')) as server:
        with pytest.raises(RegistryFailed, match=r"it answered 503, tired \]0;x") as failed:
            await pull_from(server, blobs)
        assert "\x1b" not in str(failed.value)
        assert len(server.asked("manifests")) == SETTINGS.attempts


async def test_a_broken_connection_is_taken_up_where_it_broke(blobs: BlobStore) -> None:
    answer = times(2, lambda request: cut(request, 100_000) if is_blob(request, BIG) else None)
    with serving(answer) as server:
        await pull_from(server, blobs)
        starts = [request.headers.get("range") for request in server.asked(BIG.digest)]
    assert starts[0] is None
    assert all(starts[1:])
    assert len(set(starts)) == 3


def cut(request: Request, after: int) -> Answer:
    return Shelf(MADE).route(request)._replace(cut=after)


async def test_a_registry_without_ranges_is_read_from_the_start(blobs: BlobStore) -> None:
    def spoil(request: Request) -> Answer | None:
        if is_blob(request, BIG):
            return Answer(200, BIG.content, cut=None if "range" in request.headers else 100_000)
        return None

    with serving(spoil) as server:
        await pull_from(server, blobs)
    assert blobs.read(BIG.digest, 2**20) == BIG.content


async def test_another_part_than_asked_for_is_refused(blobs: BlobStore) -> None:
    def spoil(request: Request) -> Answer | None:
        if is_blob(request, BIG) and "range" in request.headers:
            return Answer(206, BIG.content[:10], {"Content-Range": f"bytes 0-9/{len(BIG.content)}"})
        return cut(request, 1000) if is_blob(request, BIG) else None

    with serving(spoil) as server, pytest.raises(RegistryFailed, match="another part"):
        await pull_from(server, blobs)


async def test_a_blob_that_always_breaks_is_given_up(blobs: BlobStore) -> None:
    def spoil(request: Request) -> Answer | None:
        return cut(request, 10) if is_blob(request, BIG) else None

    with serving(spoil) as server:
        with pytest.raises(RegistryFailed, match="can't talk to"):
            await pull_from(server, blobs)
        assert len(server.asked(BIG.digest)) == SETTINGS.attempts


async def test_a_silent_registry_is_given_up(blobs: BlobStore) -> None:
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        settings = RegistrySettings(attempts=1, silence_timeout_s=0.2, connect_timeout_s=0.2)
        with pytest.raises(RegistryFailed, match=r"can't talk to 127\.0\.0\.1"):
            await pull(Reference.parse(f"127.0.0.1:{deaf.getsockname()[1]}/x"), blobs, settings)


async def test_nobody_there(blobs: BlobStore) -> None:
    for name in ("127.0.0.1:1/x", "no-such-host.invalid/x"):
        with pytest.raises(RegistryFailed, match="can't talk to"):
            await pull(Reference.parse(name), blobs, RegistrySettings(attempts=1, connect_timeout_s=2))


# Lies.


async def test_the_manifest_must_be_the_one_asked_for(blobs: BlobStore) -> None:
    other = make_image({"evil": b"x"})
    shelf = Shelf(MADE, tags={MADE.manifest.digest: other.manifest})
    shelf.tags[MADE.manifest.digest] = other.manifest
    with serving(shelf=shelf) as server, pytest.raises(ImageRefused, match="the registry's manifest is not sha256"):
        await pull_from(server, blobs, name=f"x@{MADE.manifest.digest}")


async def test_the_manifest_must_have_the_digest_it_is_told_to_have(blobs: BlobStore) -> None:
    lie = Answer(200, MADE.manifest.content, {"Content-Type": OCI_MANIFEST, "Docker-Content-Digest": sha256(b"")})
    with serving(lambda _: lie) as server, pytest.raises(ImageRefused, match="the registry's manifest is not"):
        await pull_from(server, blobs)


@pytest.mark.parametrize("blob", [MADE.config, *MADE.layers])
@pytest.mark.parametrize("content", [b"", b"x", "same size", "longer"])
async def test_every_blob_is_verified(blobs: BlobStore, blob: Blob, content: bytes | str) -> None:
    spoilt = {"same size": b"\0" * len(blob.content), "longer": blob.content + b"x"}
    sent = spoilt[content] if isinstance(content, str) else content
    refused = pytest.raises((ImageRefused, RegistryFailed), match=r"other content|longer|shorter|of the|failed at")
    with serving(lambda request: Answer(200, sent) if is_blob(request, blob) else None) as server, refused:
        await pull_from(server, blobs)
    assert blobs.find(blob.digest) is None


async def test_a_lying_registry_leaves_nothing_to_build_on(tmp_path: Path) -> None:
    def spoil(request: Request) -> Answer | None:
        return Answer(200, b"\0" * len(BIG.content), cut=200_000) if is_blob(request, BIG) else None

    blobs = BlobStore(tmp_path)
    with serving(spoil) as server, pytest.raises((RegistryFailed, ImageRefused)):
        await pull_from(server, blobs)
    with serving() as server:
        await pull_from(server, blobs)
    assert blobs.read(BIG.digest, 2**20) == BIG.content


def spoilt_index(**changes: object) -> Blob:
    index = json.loads(index_of((MADE, {"os": "linux", "architecture": "amd64"})).content)
    index["manifests"][0].update(changes)
    return Blob(OCI_INDEX, json.dumps(index).encode())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"size": 1}, "another size"),
        ({"mediaType": OCI_INDEX}, "contradicts itself"),
        ({"mediaType": "text/plain"}, "contradicts itself"),
        ({"digest": sha256(b"gone")}, "has no"),
    ],
)
async def test_an_index_must_tell_the_truth(blobs: BlobStore, changes: dict[str, object], reason: str) -> None:
    shelf = Shelf(MADE, tags={"latest": spoilt_index(**changes)})
    with serving(shelf=shelf) as server, pytest.raises((ImageRefused, ImageNotFound), match=reason):
        await pull_from(server, blobs)


async def test_indexes_don_t_nest(blobs: BlobStore) -> None:
    inner = index_of((MADE, {"os": "linux", "architecture": "amd64"}))
    entry = inner.descriptor(platform={"os": "linux", "architecture": "amd64"})
    outer = Blob(OCI_INDEX, json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [entry]}).encode())
    shelf = Shelf(MADE, tags={"latest": outer, inner.digest: inner})
    with serving(shelf=shelf) as server:
        with pytest.raises(ImageRefused, match="something else than an image"):
            await pull_from(server, blobs)
        assert len(server.asked("manifests")) == 2


async def test_an_index_that_names_itself_ends(blobs: BlobStore) -> None:
    """No content can hold its own digest; the registry pretends."""
    index = Answer(200, spoilt_index(mediaType=OCI_INDEX, digest=sha256(b"me")).content, {"Content-Type": OCI_INDEX})
    with serving(lambda _: index) as server:
        with pytest.raises(ImageRefused):
            await pull_from(server, blobs)
        assert len(server.asked("manifests")) == 2


# Too much.


@pytest.mark.parametrize("length", ["told", "not told"])
async def test_a_manifest_without_end_is_cut_off(blobs: BlobStore, length: str) -> None:
    content = b" " * (5 * 1024**2)
    headers = {} if length == "told" else {"Content-Length": str(2**40)}
    with serving(lambda _: Answer(200, content, headers)) as server, pytest.raises(RegistryFailed, match="too much"):
        await pull_from(server, blobs)


async def test_an_image_over_the_limit_is_not_begun(blobs: BlobStore) -> None:
    with serving() as server:
        with pytest.raises(ImageRefused, match="the limit is 1000"):
            await pull_from(server, blobs, RegistrySettings(max_image_bytes=1000))
        assert server.asked("blobs") == []


async def test_a_compressed_answer_is_no_bomb(blobs: BlobStore) -> None:
    with (
        serving(lambda _: Answer(200, b"x", {"Content-Encoding": "gzip"})) as server,
        pytest.raises(RegistryFailed, match="compressed"),
    ):
        await pull_from(server, blobs)


async def test_headers_without_end_are_cut_off(blobs: BlobStore) -> None:
    with (
        serving(lambda _: Answer(200, b"", {f"X-{number}": "y" * 1000 for number in range(300)})) as server,
        pytest.raises(RegistryFailed, match="can't talk to"),
    ):
        await pull_from(server, blobs)


async def test_a_drip_is_no_transfer(blobs: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(request: Request) -> Answer | None:
        if is_blob(request, BIG):
            return Shelf(MADE).route(request)._replace(pause_s=0.05)
        return None

    monkeypatch.setattr("tartarus.images.registry.client.ANSWER_TIMEOUT_S", 0.01)
    monkeypatch.setattr("tartarus.images.registry.client._SLOWEST_BYTES_PER_S", 2**40)
    with serving(spoil) as server, pytest.raises(RegistryFailed, match=r"too slowly|too long"):
        await pull_from(server, blobs, RegistrySettings(attempts=1))


async def test_neither_is_a_manifest_that_drips(blobs: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tartarus.images.registry.answers.ANSWER_TIMEOUT_S", 0.05)
    drip = Answer(200, b" " * 2**20, {"Content-Type": OCI_MANIFEST}, pause_s=0.03)
    with serving(lambda _: drip) as server, pytest.raises(RegistryFailed, match="too slowly"):
        await pull_from(server, blobs)


# Redirects.


async def test_blobs_may_lie_elsewhere_and_our_login_stays_here(
    blobs: BlobStore, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with serving() as elsewhere:

        def spoil(request: Request) -> Answer | None:
            if not request.headers.get("authorization"):
                return Answer(401, headers={"WWW-Authenticate": 'Basic realm="x"'})
            if "/blobs/" in request.path:
                return Answer(307, headers={"Location": f"http://{elsewhere.host}{request.path}?signature={SECRET}"})
            return None

        with serving(spoil) as server:
            settings = RegistrySettings(credentials={server.host: Credentials("me", SECRET)})
            await pull_from(server, blobs, settings)
            assert server.asked("blobs")
        assert elsewhere.requests
        assert not any("authorization" in request.headers for request in elsewhere.requests)
    assert SECRET not in caplog.text


async def test_errors_don_t_show_signatures(blobs: BlobStore) -> None:
    def spoil(request: Request) -> Answer | None:
        if "/blobs/" in request.path:
            return Answer(307, headers={"Location": f"http://127.0.0.1:1/x?signature={SECRET}"})
        return None

    with serving(spoil) as server, pytest.raises(RegistryFailed) as failed:
        await pull_from(server, blobs, RegistrySettings(attempts=1))
    error: BaseException | None = failed.value
    while error is not None:
        assert SECRET not in str(error)
        error = error.__cause__ or error.__context__


async def test_redirects_end(blobs: BlobStore) -> None:
    with serving(lambda request: Answer(302, headers={"Location": request.path})) as server:
        with pytest.raises(RegistryFailed, match="without end"):
            await pull_from(server, blobs)
        assert len(server.requests) < 15


@pytest.mark.parametrize(
    "location",
    [
        "http://registry.example/x",
        "file:///etc/passwd",
        "ftp://x/",
        "",
        "http://u:p@127.0.0.1/x",
        "http://[",
        "//",
        "gopher://127.0.0.1:6379/x",
    ],
)
async def test_a_redirect_does_not_lead_just_anywhere(blobs: BlobStore, location: str) -> None:
    def spoil(request: Request) -> Answer | None:
        return Answer(302, headers={"Location": location}) if "/blobs/" in request.path else None

    with serving(spoil) as server, pytest.raises(RegistryFailed, match=r"unusable|plain HTTP|without end|can't talk"):
        await pull_from(server, blobs)


@pytest.mark.parametrize(
    ("target", "allowed"),
    [
        ("https://cdn.example/x", True),
        ("https://registry.example:8443/x", True),
        ("http://cdn.example/x", False),
        ("http://127.0.0.1/x", False),
        ("https://localhost:6443/x", False),
        ("https://127.1.2.3/x", False),
        ("https://[::1]/x", False),
        ("http://169.254.169.254/latest/meta-data", False),
        ("https://user@cdn.example/x", False),
        ("unix:///run/docker.sock", False),
    ],
)
def test_a_registry_on_the_network_can_t_turn_us_on_ourselves(target: str, allowed: bool) -> None:
    with contextlib.nullcontext() if allowed else pytest.raises(RegistryFailed):
        check_followed(httpx.URL("https://registry.example/v2/"), httpx.URL(target), "a place")


def test_hosts_are_told_apart() -> None:
    assert not is_loopback(httpx.URL("https://127.0.0.1.example/"))
    assert not is_loopback(httpx.URL("https://localhost.example/"))
    assert same_origin(httpx.URL("https://a/x"), httpx.URL("https://a:443/y"))
    assert not same_origin(httpx.URL("https://a/x"), httpx.URL("http://a/x"))
    assert not same_origin(httpx.URL("https://a/x"), httpx.URL("https://a:444/x"))
    assert not same_origin(httpx.URL("https://a/x"), httpx.URL("https://a.b/x"))


# Tokens.


@pytest.mark.parametrize(
    ("realm", "reason"),
    [
        ("http://auth.example/token", "plain HTTP"),
        ("", "unusable"),
        ("file:///etc/passwd", "unusable"),
        ("http://x:99999999/", "plain HTTP"),
        ("https://me:pw@auth.example/", "unusable"),
    ],
)
async def test_a_login_is_not_carried_to_just_anywhere(blobs: BlobStore, realm: str, reason: str) -> None:
    challenge = {"WWW-Authenticate": f'Bearer realm="{realm}",service="x",scope="repository:victim:push"'}
    with serving(lambda _: Answer(401, headers=challenge)) as server:
        settings = RegistrySettings(credentials={server.host: Credentials("me", SECRET)})
        with pytest.raises(RegistryFailed, match=reason):
            await pull_from(server, blobs, settings)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"x", "no token that can be understood"),
        (b"{}", "no token that a header can carry"),
        (b'{"token": "a\\r\\nX-Evil: 1"}', "no token that a header can carry"),
        (b'{"token": "\\u00e9"}', "no token that a header can carry"),
        (b"[" * 60_000, "no token that can be understood"),
        (b'{"token": "' + b"x" * 100_000 + b'"}', "too much"),
    ],
)
async def test_bad_tokens_are_refused(blobs: BlobStore, body: bytes, reason: str) -> None:
    with Server(lambda _: Answer(200, body)) as granter:
        challenge = {"WWW-Authenticate": f'Bearer realm="http://{granter.host}/"'}
        with serving(lambda _: Answer(401, headers=challenge)) as server, pytest.raises(RegistryFailed, match=reason):
            await pull_from(server, blobs)


async def test_only_what_we_do_is_asked_for(blobs: BlobStore) -> None:
    with Server(lambda _: Answer(200, b'{"access_token": "abc", "expires_in": 0}')) as granter:
        challenge = f'Bearer realm="http://{granter.host}/t?a=b",service="s",scope="repository:victim:delete,push"'

        def spoil(request: Request) -> Answer | None:
            if request.headers.get("authorization") != "Bearer abc":
                return Answer(401, headers={"WWW-Authenticate": challenge})
            return None

        with serving(spoil) as server:
            await pull_from(server, blobs)
        assert granter.requests[0].query == {"a": ["b"], "service": ["s"], "scope": ["repository:x:pull"]}
        assert len(granter.requests) == 1


async def test_a_token_that_ends_in_between_is_renewed(blobs: BlobStore) -> None:
    granted: list[str] = []

    def grant(_: Request) -> Answer:
        granted.append(f"t{len(granted)}")
        return Answer(200, json.dumps({"token": granted[-1]}).encode())

    with Server(grant) as granter:

        def spoil(request: Request) -> Answer | None:
            wanted = "t0" if "manifests" in request.path else "t1"
            if request.headers.get("authorization") != f"Bearer {wanted}":
                return Answer(401, headers={"WWW-Authenticate": f'Bearer realm="http://{granter.host}/"'})
            return None

        with serving(spoil) as server:
            await pull_from(server, blobs)
    assert granted == ["t0", "t1"]


@given(st.lists(st.text(max_size=60) | st.text(alphabet='Bearer ="\\,xy', max_size=60), max_size=3))
def test_no_challenge_is_more_than_ignored(headers: list[str]) -> None:
    parse_challenges(headers)


def test_challenges_are_read() -> None:
    found = parse_challenges(['Bearer realm="https://a/b,c",service=x , scope="a \\"b\\""', "Basic", "Digest x"])
    assert found[0].parameters == {"realm": "https://a/b,c", "service": "x", "scope": 'a "b"'}
    assert [each.scheme for each in found] == ["bearer", "basic", "digest"]
    parse_challenges(["Bearer " + 'a="' * 100_000])


# Uploads.


@pytest.mark.parametrize("location", ["http://registry.example/x", "", "http://["])
async def test_an_upload_goes_to_no_other_place(blobs: BlobStore, location: str) -> None:
    with serving() as server:
        image = await pull_from(server, blobs)

    def spoil(request: Request) -> Answer:
        return Answer(202, headers={"Location": location}) if request.method == "POST" else Answer(404)

    with Server(spoil) as server, pytest.raises(TartarusError):
        await push(image, Reference.parse(f"{server.host}/x:1"), blobs, SETTINGS)


async def test_an_upload_elsewhere_goes_without_our_login(blobs: BlobStore) -> None:
    with serving() as server:
        image = await pull_from(server, blobs)
    with Server(lambda _: Answer(201)) as elsewhere:

        def route(request: Request) -> Answer:
            if not request.headers.get("authorization"):
                return Answer(401, headers={"WWW-Authenticate": "Basic"})
            if request.method == "POST":
                return Answer(202, headers={"Location": f"http://{elsewhere.host}/up?state=1"})
            return Answer(404) if request.method == "HEAD" else Answer(201)

        with Server(route) as server:
            settings = RegistrySettings(credentials={server.host: Credentials("me", SECRET)})
            await push(image, Reference.parse(f"{server.host}/x:1"), blobs, settings)
        assert {sha256(request.body) for request in elsewhere.requests} == {blob.digest for blob in MADE.blobs}
        assert not any("authorization" in request.headers for request in elsewhere.requests)
        assert {request.query["state"][0] for request in elsewhere.requests} == {"1"}


async def test_a_broken_upload_is_tried_again(blobs: BlobStore) -> None:
    with serving() as server:
        image = await pull_from(server, blobs)
    failing = times(2, lambda request: Answer(500) if request.method == "PUT" else None)

    def route(request: Request) -> Answer:
        answers = {"HEAD": Answer(404), "POST": Answer(202, headers={"Location": "/up"}), "PUT": Answer(201)}
        return failing(request) or answers[request.method]

    with Server(route) as server:
        await push(image, Reference.parse(f"{server.host}/x:1"), blobs, SETTINGS)
        uploaded = {sha256(request.body) for request in server.asked("PUT /up")}
    assert uploaded == {blob.digest for blob in MADE.blobs}


# Proxies.


async def test_a_proxy_is_asked_for_what_is_not_on_this_host(blobs: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    with Server(lambda _: Answer(502)) as proxy, serving() as server:
        monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
        monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
        settings = RegistrySettings(proxy=f"http://{proxy.host}", attempts=1)
        with pytest.raises(RegistryFailed, match="can't talk to registry.invalid"):  # noqa: RUF043
            await pull(Reference.parse("registry.invalid/x"), blobs, settings)
        assert [(request.method, request.path) for request in proxy.requests] == [("CONNECT", "registry.invalid:443")]
        await pull_from(server, blobs, settings)
        assert len(proxy.requests) == 1


@pytest.mark.parametrize("proxy", ["nonsense", "ftp://x"])
async def test_a_proxy_must_be_one(blobs: BlobStore, proxy: str) -> None:
    with pytest.raises(InvalidRequest, match="not an HTTP proxy"):
        await pull(Reference.parse("registry.invalid/x"), blobs, RegistrySettings(proxy=proxy))


# TLS.


@pytest.mark.needs("docker-registry")
async def test_a_certificate_must_be_trusted(blobs: BlobStore, tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    shelf = Shelf(MADE)
    with Server(shelf.route, context) as server:
        with pytest.raises(RegistryFailed, match="no certificate that we trust") as refused:
            await pull_from(server, blobs)
        assert "ca_file" in refused.value.fix
        settings = RegistrySettings(ca_files={server.host: certificate}, attempts=1)
        await pull_from(server, blobs, settings)
    assert blobs.find(BIG.digest)
