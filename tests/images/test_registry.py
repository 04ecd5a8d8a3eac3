"""Pulling from and pushing to real registries (Debian's docker-registry), with every kind of login."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import os
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.images.registries import (
    PASSWORD,
    USER,
    Blob,
    MadeImage,
    Running,
    Server,
    TokenServer,
    docker_registry,
    htpasswd_auth,
    index_of,
    make_image,
    manifest_of,
    upload,
)

from tartarus.images.blobs import BlobStore
from tartarus.images.manifests import OCI_LAYER
from tartarus.images.oci import ImageConfig, Platform
from tartarus.images.reference import Reference
from tartarus.images.registry import BlobProgress, Credentials, RegistrySettings, pull, push
from tartarus.images.registry.credentials import ask_helper
from tartarus.images.stored import blobs_of, store_image
from tartarus.model.errors import ImageNotFound, ImageRefused, InvalidRequest, RegistryFailed

pytestmark = [pytest.mark.anyio, pytest.mark.needs("docker-registry")]

AMD64 = Platform()
SETTINGS = RegistrySettings(attempts=3, backoff_s=0.01)
BASIC = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
LOGIN = Credentials(USER, PASSWORD)
MADE = make_image(
    {"etc/os-release": b"ID=test\n"}, {"srv/data": os.urandom(300_000)}, {"srv/more": b"x" * 100_000},
    Env=["PATH=/bin", "A=b=c"], Cmd=["/bin/sh"], WorkingDir="/srv", User="app", ExposedPorts={"80/tcp": {}},
)  # fmt: skip


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with docker_registry(tmp_path_factory.mktemp("registry")) as running:
        upload(running.host, "a/app", "1", MADE)
        yield running


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    directory = tmp_path_factory.mktemp("private")
    with docker_registry(directory, htpasswd_auth(directory)) as running:
        upload(running.host, "app", "1", MADE, BASIC)
        yield running


@pytest.fixture
def blobs(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "blobs")


def at(running: Running, name: str) -> Reference:
    return Reference.parse(running.reference(name))


def is_complete(blobs: BlobStore, made: MadeImage) -> bool:
    return all(blobs.read(blob.digest, 2**30) == blob.content for blob in (*made.blobs, made.manifest))


async def test_an_image_is_pulled(registry: Running, blobs: BlobStore) -> None:
    seen: list[BlobProgress] = []
    image = await pull(at(registry, "a/app:1"), blobs, SETTINGS, seen.append, AMD64)
    assert is_complete(blobs, MADE)
    assert image.reference == f"{registry.host}/a/app:1"
    assert image.digest == MADE.manifest.digest
    assert image.config_digest == MADE.config.digest
    assert image.diff_ids == MADE.diff_ids
    assert [layer.media_type for layer in image.layers] == [f"{OCI_LAYER}+gzip"] * 3
    assert image.config == ImageConfig(
        env={"PATH": "/bin", "A": "b=c"}, cmd=("/bin/sh",), workdir="/srv", user="app", exposed_ports=("80/tcp",)
    )
    assert set(blobs_of(image)) == {blob.digest for blob in (*MADE.blobs, MADE.manifest)}
    done = {each.digest: each.total_bytes for each in seen if each.state == "done"}
    assert done == {blob.digest: len(blob.content) for blob in MADE.blobs}


async def test_by_digest_and_with_the_plain_name(registry: Running, blobs: BlobStore) -> None:
    reference = at(registry, f"a/app@{MADE.manifest.digest}")
    assert (await pull(reference, blobs, SETTINGS, platform=AMD64)).digest == MADE.manifest.digest


async def test_layers_that_are_there_are_not_fetched(registry: Running, blobs: BlobStore) -> None:
    await pull(at(registry, "a/app:1"), blobs, SETTINGS, platform=AMD64)
    second = make_image({"new": b"layer"}, compress=True)
    both = joined(MADE, second)
    upload(registry.host, "a/second", "1", both)
    seen: list[BlobProgress] = []
    await pull(at(registry, "a/second:1"), blobs, SETTINGS, seen.append, AMD64)
    assert {each.digest for each in seen if each.state == "there"} == {blob.digest for blob in MADE.layers}
    assert {each.digest for each in seen if each.state == "done"} == {both.config.digest, second.layers[0].digest}


def joined(*parts: MadeImage) -> MadeImage:
    """An image of the parts' layers."""
    layers = tuple(layer for part in parts for layer in part.layers)
    diff_ids = tuple(each for part in parts for each in part.diff_ids)
    document = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": diff_ids}}
    config = Blob(parts[0].config.kind, json.dumps(document).encode())
    return MadeImage(manifest_of(config, layers), config, layers, diff_ids)


async def test_pulls_at_the_same_moment_do_the_work_once(registry: Running, blobs: BlobStore) -> None:
    seen: list[BlobProgress] = []
    pulls = [pull(at(registry, "a/app:1"), blobs, SETTINGS, seen.append, AMD64) for _ in range(5)]
    assert len({image.digest for image in await asyncio.gather(*pulls)}) == 1
    assert is_complete(blobs, MADE)


@pytest.mark.parametrize("name", ["a/app:2", "nothing:1", f"a/app@sha256:{'0' * 64}"])
async def test_what_is_not_there_is_said(registry: Running, blobs: BlobStore, name: str) -> None:
    with pytest.raises(ImageNotFound, match=f"{registry.host.partition(':')[0]} has no"):
        await pull(at(registry, name), blobs, SETTINGS, platform=AMD64)


async def test_another_platform_s_image_is_refused(registry: Running, blobs: BlobStore) -> None:
    with pytest.raises(ImageRefused, match="for linux/amd64, not for linux/arm64"):
        await pull(at(registry, "a/app:1"), blobs, SETTINGS, platform=Platform("linux", "arm64"))


async def test_the_platform_of_an_index_is_pulled(registry: Running, blobs: BlobStore) -> None:
    arm = make_image({"arm": b"1"}, architecture="arm64")
    upload(registry.host, "a/multi", "arm", arm)
    upload(registry.host, "a/multi", "amd", MADE)
    index = index_of((arm, {"os": "linux", "architecture": "arm64"}), (MADE, {"os": "linux", "architecture": "amd64"}))
    request = urllib.request.Request(
        f"http://{registry.host}/v2/a/multi/manifests/all", index.content, {"Content-Type": index.kind}, method="PUT"
    )
    urllib.request.urlopen(request).close()
    assert (await pull(at(registry, "a/multi:all"), blobs, SETTINGS, platform=AMD64)).digest == MADE.manifest.digest
    image = await pull(at(registry, "a/multi:all"), blobs, SETTINGS, platform=Platform("linux", "arm64"))
    assert image.digest == arm.manifest.digest
    with pytest.raises(ImageRefused, match=r"does not exist for linux/s390x: it has linux/amd64, linux/arm64"):
        await pull(at(registry, "a/multi:all"), blobs, SETTINGS, platform=Platform("linux", "s390x"))


@pytest.mark.needs("skopeo")
@pytest.mark.parametrize(("form", "compression"), [("oci", "gzip"), ("oci", "zstd"), ("v2s2", "gzip")])
async def test_what_other_tools_push_is_pulled(
    registry: Running, blobs: BlobStore, tmp_path: Path, form: str, compression: str
) -> None:
    name = f"skopeo/{form}-{compression}:1"
    _skopeo("copy", "--src-tls-verify=false", "--dest-tls-verify=false", "--format", form, "--dest-compress",
            "--dest-compress-format", compression,
            f"docker://{registry.host}/a/app:1", f"dir:{tmp_path / 'dir'}")  # fmt: skip
    _skopeo("copy", "--dest-tls-verify=false", f"dir:{tmp_path / 'dir'}", f"docker://{registry.host}/{name}")
    image = await pull(at(registry, name), blobs, SETTINGS, platform=AMD64)
    assert image.diff_ids == MADE.diff_ids
    assert image.config.user == "app"


def _skopeo(*words: str) -> str:
    done = subprocess.run(
        ["skopeo", "--insecure-policy", *words], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# Logins.


def docker_config(directory: Path, content: dict[str, object]) -> RegistrySettings:
    path = directory / "config.json"
    path.write_text(json.dumps(content))
    return RegistrySettings(docker_config=path, attempts=2, backoff_s=0.01)


def auth_entry(user: str = USER, password: str = PASSWORD) -> dict[str, str]:
    return {"auth": base64.b64encode(f"{user}:{password}".encode()).decode()}


async def test_a_private_registry_refuses_strangers(private: Running, blobs: BlobStore) -> None:
    wrong = RegistrySettings(credentials={private.host: Credentials(USER, "wrong-one")}, attempts=1)
    for settings in (SETTINGS, wrong):
        with pytest.raises(RegistryFailed, match="refuses access") as refused:
            await pull(at(private, "app:1"), blobs, settings, platform=AMD64)
        assert "docker login" in refused.value.fix
        assert "wrong-one" not in str(refused.value)


async def test_with_a_login_given(private: Running, blobs: BlobStore) -> None:
    settings = RegistrySettings(credentials={private.host: LOGIN})
    await pull(at(private, "app:1"), blobs, settings, platform=AMD64)
    assert is_complete(blobs, MADE)


@pytest.mark.parametrize("key", ["{}", "http://{}", "https://{}/v2/", "{}/"])
async def test_with_docker_s_login(private: Running, blobs: BlobStore, tmp_path: Path, key: str) -> None:
    settings = docker_config(
        tmp_path, {"auths": {key.format(private.host): auth_entry(), "other.example": auth_entry()}}
    )
    await pull(at(private, "app:1"), blobs, settings, platform=AMD64)
    assert is_complete(blobs, MADE)


def helper(directory: Path, body: str, name: str = "test") -> None:
    path = directory / f"docker-credential-{name}"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


@pytest.fixture
def bin_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "bin"
    place.mkdir()
    monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")
    return place


@pytest.mark.parametrize("config", [{"credsStore": "test"}, {"credHelpers": {"HOST": "test"}, "credsStore": "none"}])
async def test_with_a_credential_helper(
    private: Running, blobs: BlobStore, tmp_path: Path, bin_directory: Path, config: dict[str, object]
) -> None:
    answer = json.dumps({"ServerURL": private.host, "Username": USER, "Secret": PASSWORD})
    helper(bin_directory, f"""read -r key; [ "$1 $key" = "get {private.host}" ] && echo '{answer}'""")
    if "credHelpers" in config:
        config = {**config, "credHelpers": {private.host: "test"}}
    await pull(at(private, "app:1"), blobs, docker_config(tmp_path, config), platform=AMD64)
    assert is_complete(blobs, MADE)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("echo credentials not found in native keychain; exit 1", "refuses access"),
        ("echo something secret; exit 3", "failed: exit status 3"),
        ("echo no json", "no answer that can be understood"),
        ("yes '{'", "no answer that can be understood"),
        ("echo '{}'", "refuses access"),
    ],
)
async def test_a_helper_that_does_not_help(
    private: Running, blobs: BlobStore, tmp_path: Path, bin_directory: Path, body: str, reason: str
) -> None:
    helper(bin_directory, body)
    with pytest.raises(RegistryFailed, match=reason) as refused:
        await pull(at(private, "app:1"), blobs, docker_config(tmp_path, {"credsStore": "test"}), platform=AMD64)
    assert "something secret" not in str(refused.value)


async def test_a_helper_that_hangs_is_ended(bin_directory: Path) -> None:
    helper(bin_directory, f"sleep 1000 & echo $! >{bin_directory}/pid; wait")
    with pytest.raises(RegistryFailed, match=r"did not answer in 0\.5 s"):
        await ask_helper("test", "x", timeout_s=0.5)
    child = int((bin_directory / "pid").read_text())
    assert not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text()


@pytest.mark.parametrize("name", ["../../bin/sh", "a/b", "", "x y", "-x", "a" * 65])
async def test_a_helper_s_name_leads_nowhere_else(
    private: Running, blobs: BlobStore, tmp_path: Path, bin_directory: Path, name: str
) -> None:
    settings = docker_config(tmp_path, {"credHelpers": {private.host: name}})
    with pytest.raises((InvalidRequest, RegistryFailed), match=r"not a credential helper's name|refuses access"):
        await pull(at(private, "app:1"), blobs, settings, platform=AMD64)


@pytest.mark.parametrize(
    "content",
    [b"{", b"[]", b'{"auths": []}', b'{"auths": {"HOST": {"auth": "top-secret"}}}', b"[" * 100_000, b" " * 2_000_000],
)
async def test_a_damaged_docker_configuration_is_refused_and_not_quoted(
    private: Running, blobs: BlobStore, tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content.replace(b"HOST", private.host.encode()))
    with pytest.raises(InvalidRequest, match=r"config\.json") as refused:
        await pull(at(private, "app:1"), blobs, RegistrySettings(docker_config=path), platform=AMD64)
    assert "top-secret" not in str(refused.value)


def test_secrets_are_not_shown() -> None:
    settings = RegistrySettings(credentials={"x": Credentials("me", "s3cret", "t0ken")})
    for text in (repr(settings), str(settings), f"{settings.credentials['x']!r}"):
        assert "s3cret" not in text
        assert "t0ken" not in text
    assert list(Credentials("me", "s3cret").__rich_repr__()) == []


# Tokens, granted by a server of the tests' own to a real registry.


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, TokenServer]]:
    directory = tmp_path_factory.mktemp("tokens")
    granter = TokenServer(directory)
    with (
        Server(granter.answer) as server,
        docker_registry(directory, granter.auth(f"http://{server.host}/token")) as it,
    ):
        yield it, granter


async def test_tokens_let_push_and_pull(
    tokens: tuple[Running, TokenServer], registry: Running, blobs: BlobStore, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    running, granter = tokens
    caplog.set_level(logging.DEBUG)
    settings = RegistrySettings(credentials={running.host: LOGIN}, backoff_s=0.01)
    image = await pull(at(registry, "a/app:1"), blobs, settings, platform=AMD64)
    granter.scopes.clear()
    await push(image, at(running, "team/app:1"), blobs, settings)
    assert granter.scopes == [["repository:team/app:pull,push"]]
    granter.scopes.clear()
    other = BlobStore(tmp_path / "other")
    assert (await pull(at(running, "team/app:1"), other, settings, platform=AMD64)).digest == image.digest
    assert is_complete(other, MADE)
    assert granter.scopes == [["repository:team/app:pull"]]
    # From one repository of the registry to another, the registry moves the blobs itself.
    granter.scopes.clear()
    seen: list[BlobProgress] = []
    pulled = await pull(at(running, "team/app:1"), other, settings, platform=AMD64)
    await push(pulled, at(running, "team/copy:1"), other, settings, seen.append)
    assert {each.state for each in seen} == {"there"}
    assert granter.scopes[-1] == ["repository:team/copy:pull,push", "repository:team/app:pull"]
    assert PASSWORD not in caplog.text
    assert "Bearer" not in caplog.text


async def test_an_identity_token_gets_tokens(
    tokens: tuple[Running, TokenServer], blobs: BlobStore, tmp_path: Path, bin_directory: Path
) -> None:
    running, granter = tokens
    granter.identity_tokens.add("refresh-me")
    settings = docker_config(tmp_path, {"auths": {running.host: {"auth": "", "identitytoken": "refresh-me"}}})
    with pytest.raises(ImageNotFound):
        await pull(at(running, "none:1"), blobs, settings, platform=AMD64)
    helper(bin_directory, """echo '{"Username": "<token>", "Secret": "refresh-me"}'""")
    with pytest.raises(ImageNotFound):
        await pull(at(running, "none:1"), blobs, docker_config(tmp_path, {"credsStore": "test"}), platform=AMD64)


async def test_without_a_login_there_is_no_token(tokens: tuple[Running, TokenServer], blobs: BlobStore) -> None:
    running, _ = tokens
    with pytest.raises(RegistryFailed, match=r"gives no token.*401") as refused:
        await pull(at(running, "team/app:1"), blobs, SETTINGS, platform=AMD64)
    assert "docker login" in refused.value.fix


# Mirrors.


async def test_a_mirror_is_asked_first(registry: Running, blobs: BlobStore) -> None:
    settings = RegistrySettings(mirrors={"unreachable.invalid": (f"{registry.host}/a",)})
    image = await pull(Reference.parse("unreachable.invalid/app:1"), blobs, settings, platform=AMD64)
    assert image.reference == "unreachable.invalid/app:1"
    assert is_complete(blobs, MADE)


async def test_a_mirror_that_fails_is_passed_over(registry: Running, private: Running, blobs: BlobStore) -> None:
    mirrors = ("127.0.0.1:1", private.host, f"{registry.host}/nothing/there")
    settings = RegistrySettings(mirrors={registry.host: mirrors}, attempts=1)
    await pull(at(registry, "a/app:1"), blobs, settings, platform=AMD64)
    assert is_complete(blobs, MADE)


@pytest.mark.parametrize("mirror", ["https://x.example", "x.example/../y", "user@x.example", "", "x.example?a"])
async def test_a_mirror_is_a_place_and_nothing_else(registry: Running, blobs: BlobStore, mirror: str) -> None:
    with pytest.raises(InvalidRequest, match="not a mirror's place"):
        await pull(at(registry, "a/app:1"), blobs, RegistrySettings(mirrors={registry.host: (mirror,)}))


# Publishing.


async def test_an_image_made_here_is_published(registry: Running, blobs: BlobStore, tmp_path: Path) -> None:
    with blobs.draft() as draft:
        draft.write(os.urandom(3_000_000))
        layer = draft.commit(OCI_LAYER)
    image = await store_image(blobs, ImageConfig(cmd=("x",)), (layer,), (layer.digest,), AMD64)
    seen: list[BlobProgress] = []
    assert await push(image, at(registry, "made/here:1"), blobs, SETTINGS, seen.append) == image.digest
    assert {each.state for each in seen} == {"moving", "done"}
    seen.clear()
    await push(image, at(registry, "made/here:2"), blobs, SETTINGS, seen.append)
    assert {each.state for each in seen} == {"there"}
    other = BlobStore(tmp_path / "other")
    pulled = await pull(at(registry, f"made/here@{image.digest}"), other, SETTINGS, platform=AMD64)
    assert (pulled.layers, pulled.config) == (image.layers, image.config)


@pytest.mark.needs("skopeo")
async def test_other_tools_read_what_we_publish(registry: Running, blobs: BlobStore) -> None:
    image = await pull(at(registry, "a/app:1"), blobs, SETTINGS, platform=AMD64)
    made = await store_image(blobs, image.config, image.layers, image.diff_ids, AMD64)
    await push(made, at(registry, "made/again:1"), blobs, SETTINGS)
    facts = json.loads(_skopeo("inspect", "--tls-verify=false", f"docker://{registry.host}/made/again:1"))
    assert facts["Layers"] == [layer.digest for layer in MADE.layers]
    assert facts["Env"] == ["PATH=/bin", "A=b=c"]


async def test_a_push_without_a_login_is_refused(private: Running, registry: Running, blobs: BlobStore) -> None:
    image = await pull(at(registry, "a/app:1"), blobs, SETTINGS, platform=AMD64)
    with pytest.raises(RegistryFailed, match="refuses access"):
        await push(image, at(private, "x:1"), blobs, SETTINGS)
    with pytest.raises(InvalidRequest, match="digest"):
        await push(image, at(registry, f"x@sha256:{'0' * 64}"), blobs, SETTINGS)


async def test_an_image_whose_blobs_are_gone_is_not_published(registry: Running, blobs: BlobStore) -> None:
    image = await pull(at(registry, "a/app:1"), blobs, SETTINGS, platform=AMD64)
    place = blobs.find(MADE.layers[1].digest)
    assert place is not None
    place.unlink()
    with pytest.raises(ImageNotFound, match="not in the store"):
        await push(image, at(registry, "half:1"), blobs, SETTINGS)
    with pytest.raises(ImageNotFound):
        await pull(at(registry, "half:1"), blobs, SETTINGS, platform=AMD64)
