"""Manifests and configurations: what is taken, what is refused and with which words."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tartarus.images.blobs import BlobStore
from tartarus.images.configs import read_config, write_config
from tartarus.images.manifests import (
    DOCKER_CONFIG,
    DOCKER_LAYER,
    DOCKER_LIST,
    DOCKER_MANIFEST,
    MAX_LAYERS,
    MAX_MANIFEST_BYTES,
    OCI_CONFIG,
    OCI_INDEX,
    OCI_LAYER,
    OCI_MANIFEST,
    Index,
    Manifest,
    choose,
    parse_manifest,
)
from tartarus.images.oci import ImageConfig, Platform
from tartarus.images.stored import blobs_of, image_of, store_image, stored_image
from tartarus.model.errors import ImageNotFound, ImageRefused

pytestmark = pytest.mark.anyio

D1, D2, D3 = (f"sha256:{digit * 64}" for digit in "123")
AMD64 = Platform()


def manifest(layers: list[dict[str, Any]] | None = None, **changes: Any) -> bytes:
    document = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": {"mediaType": OCI_CONFIG, "digest": D1, "size": 100},
        "layers": [{"mediaType": f"{OCI_LAYER}+gzip", "digest": D2, "size": 10}] if layers is None else layers,
    } | changes
    return json.dumps({name: value for name, value in document.items() if value is not None}).encode()


def layer(kind: str = OCI_LAYER, digest: str = D2, size: Any = 10) -> dict[str, Any]:
    return {"mediaType": kind, "digest": digest, "size": size}


def index(*platforms: dict[str, str] | None, **changes: Any) -> bytes:
    entries = [
        {
            "mediaType": OCI_MANIFEST,
            "digest": f"sha256:{number:064x}",
            "size": 5,
            **({"platform": each} if each else {}),
        }
        for number, each in enumerate(platforms)
    ]
    return json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries} | changes).encode()


def parsed_index(*platforms: dict[str, str] | None) -> Index:
    found = parse_manifest(index(*platforms))
    assert isinstance(found, Index)
    return found


def test_a_manifest_is_read() -> None:
    found = parse_manifest(manifest(), OCI_MANIFEST)
    assert isinstance(found, Manifest)
    assert found.config.digest == D1
    assert [each.digest for each in found.layers] == [D2]
    assert [each.digest for each in found.blobs] == [D1, D2]


@pytest.mark.parametrize("kind", [
    OCI_LAYER, f"{OCI_LAYER}+gzip", f"{OCI_LAYER}+zstd", DOCKER_LAYER, f"{DOCKER_LAYER}.gzip", f"{DOCKER_LAYER}.zstd",
])  # fmt: skip
def test_layers_of_these_kinds_are_taken(kind: str) -> None:
    parse_manifest(manifest([layer(kind)]))


def test_docker_s_names_are_taken() -> None:
    content = manifest(
        mediaType=DOCKER_MANIFEST, config={"mediaType": DOCKER_CONFIG, "digest": D1, "size": 1}
    )  # fmt: skip
    parse_manifest(content, DOCKER_MANIFEST)
    parse_manifest(index(None, mediaType=DOCKER_LIST), DOCKER_LIST)


@pytest.mark.parametrize(
    ("content", "declared", "reason"),
    [
        (b"", "", "can't be read"),
        (b"[]", "", "can't be read"),
        (b"\xff\xfe", "", "can't be read"),
        (b'{"schemaVersion": 2, "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "", "nested too deeply"),
        (b" " * (MAX_MANIFEST_BYTES + 1), "", "too large"),
        (manifest(schemaVersion=1), "", "schema 1"),
        (b'{"schemaVersion": 1, "name": "x", "fsLayers": []}', "", "schema 1"),
        (manifest(), "application/vnd.docker.distribution.manifest.v1+prettyjws", "schema 1"),
        (manifest(schemaVersion=3), "", "neither one image nor an index"),
        (b"{}", "", "can't be read"),
        (b'{"schemaVersion": 2}', "", "neither one image nor an index"),
        (manifest(manifests=[]), "", "neither one image nor an index"),
        (manifest(config=None, manifests=[]), "", "neither one image nor an index"),
        (manifest(), DOCKER_MANIFEST, "contradicts itself"),
        (manifest(), OCI_INDEX, "contradicts itself"),
        (manifest(mediaType=OCI_INDEX), "", "not an image's"),
        (index(None, mediaType=OCI_MANIFEST), "", "not an image's"),
        (manifest(mediaType="text/html"), "", "not an image's"),
        (manifest(config={"mediaType": "application/vnd.cncf.helm.config.v1+json", "digest": D1, "size": 1}), "", "not a container image"),
        (manifest(config={"mediaType": OCI_CONFIG, "digest": D1, "size": 9 * 1024**2}), "", "configuration is too large"),
        (manifest([layer(size=-1)]), "", "impossible size"),
        (manifest([layer(size=2**63)]), "", "impossible size|can't be read"),
        (manifest([layer(size=1.5)]), "", "can't be read"),
        (manifest([layer(size=40 * 1024**3)]), "", "the limit is"),
        (manifest([layer(size=10), layer(size=11)]), "", "two sizes"),
        (manifest([layer(digest="sha256:abc")]), "", "only SHA-256"),
        (manifest([layer(digest="sha512:" + "1" * 128)]), "", "only SHA-256"),
        (manifest([layer(digest="sha256:" + "../" * 21 + "x")]), "", "only SHA-256"),
        (manifest([layer()] * (MAX_LAYERS + 1)), "", "at most 512"),
        (index(*[None] * 1025), "", "at most 1024"),
        (manifest([layer("application/vnd.oci.image.layer.nondistributable.v1.tar+gzip")]), "", "somewhere else"),
        (manifest([layer("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip")]), "", "somewhere else"),
        (manifest([layer(f"{OCI_LAYER}+gzip+encrypted")]), "", "encrypted"),
        (manifest([layer("application/x-qemu-disk")]), "", "its media type is"),
    ],
)  # fmt: skip
def test_anything_else_is_refused(content: bytes, declared: str, reason: str) -> None:
    with pytest.raises(ImageRefused, match=reason):
        parse_manifest(content, declared)


def test_the_limit_of_size_is_the_caller_s() -> None:
    with pytest.raises(ImageRefused, match="the limit is 100"):
        parse_manifest(manifest(), max_bytes=100)
    parse_manifest(manifest(), max_bytes=110)


@given(st.binary(max_size=200))
def test_no_bytes_are_more_than_refused(content: bytes) -> None:
    with contextlib.suppress(ImageRefused):
        parse_manifest(content)
    with contextlib.suppress(ImageRefused):
        read_config(content)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from([D1, OCI_LAYER, 2]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from([
                "schemaVersion", "mediaType", "config", "layers", "manifests", "digest", "size", "platform", "os",
                "architecture", "Env", "Cmd", "rootfs", "diff_ids", "annotations",
            ]),
            inner, max_size=6,
        )
    ),
    max_leaves=12,
)  # fmt: skip


@given(JSON)
def test_no_document_is_more_than_refused(document: Any) -> None:
    content = json.dumps(document).encode()
    with contextlib.suppress(ImageRefused):
        parse_manifest(content)
    with contextlib.suppress(ImageRefused):
        read_config(content)


@pytest.mark.parametrize(
    ("platforms", "wanted", "chosen"),
    [
        ([{"os": "linux", "architecture": "arm64"}, {"os": "linux", "architecture": "amd64"}], AMD64, 1),
        ([{"os": "windows", "architecture": "amd64"}, {"os": "linux", "architecture": "x86_64"}], AMD64, 1),
        ([{"os": "linux", "architecture": "amd64", "variant": "v3"}, {"os": "linux", "architecture": "amd64"}], AMD64, 1),
        ([{"os": "linux", "architecture": "amd64", "variant": "v1"}], AMD64, 0),
        ([{"os": "linux", "architecture": "arm64", "variant": "v8"}], Platform("linux", "arm64"), 0),
        ([{"os": "linux", "architecture": "arm", "variant": "v6"}, {"os": "linux", "architecture": "arm", "variant": "v7"}], Platform("linux", "arm", "v7"), 1),
        ([{"os": "unknown", "architecture": "unknown"}, {"os": "linux", "architecture": "amd64"}], AMD64, 1),
        ([None], AMD64, 0),
    ],
)  # fmt: skip
def test_the_image_for_the_platform_is_chosen(platforms: list[Any], wanted: Platform, chosen: int) -> None:
    assert choose(parsed_index(*platforms), wanted).digest == f"sha256:{chosen:064x}"


def test_what_there_is_instead_is_said() -> None:
    offered = parsed_index(
        {"os": "linux", "architecture": "arm64", "variant": "v8"},
        {"os": "linux", "architecture": "amd64", "variant": "v3"},
    )
    with pytest.raises(ImageRefused, match=r"linux/amd64.*linux/amd64/v3, linux/arm64/v8"):
        choose(offered, AMD64)
    with pytest.raises(ImageRefused, match="no platform"):
        choose(parsed_index(), AMD64)


CONFIG = ImageConfig(
    env={"PATH": "/bin", "EMPTY": "", "EQ": "a=b"}, entrypoint=("/init",), cmd=("serve", "--now"), workdir="/srv",
    user="1000:1000", labels={"a": "b"}, exposed_ports=("80/tcp",), shell=("/bin/sh", "-c"), stop_signal="SIGINT",
    healthcheck=("CMD", "true"),
)  # fmt: skip


def test_a_configuration_is_read_as_it_was_written() -> None:
    content = write_config(CONFIG, (D1,), Platform("linux", "arm64", "v8"))
    assert read_config(content) == (CONFIG, Platform("linux", "arm64", "v8"), (D1,))
    assert read_config(write_config(ImageConfig(), (), AMD64)) == (ImageConfig(), AMD64, ())


def test_nulls_are_nothing() -> None:
    run = dict.fromkeys(("Env", "Entrypoint", "Cmd", "Labels", "ExposedPorts", "Shell", "Healthcheck"))
    content = json.dumps({"architecture": "amd64", "os": "linux", "config": run, "rootfs": {"diff_ids": None}}).encode()
    assert read_config(content) == (ImageConfig(), AMD64, ())
    assert read_config(b'{"config": null, "architecture": "amd64"}') == (ImageConfig(), AMD64, ())


@pytest.mark.parametrize(
    "run",
    [
        {"Env": ["=x"]}, {"Env": ["A=\0"]}, {"Cmd": ["a\0b"]}, {"User": "\0"}, {"WorkingDir": "/\0"}, {"Env": "A=b"},
        {"Env": [1]}, {"Cmd": "sh"},
    ],
)  # fmt: skip
def test_impossible_configurations_are_refused(run: dict[str, Any]) -> None:
    with pytest.raises(ImageRefused):
        read_config(json.dumps({"config": run}).encode())


def test_parts_that_disagree_are_refused() -> None:
    found = parse_manifest(manifest())
    assert isinstance(found, Manifest)
    with pytest.raises(ImageRefused, match="1 layers, its configuration 2"):
        image_of(found, D3, write_config(ImageConfig(), (D1, D2), AMD64), "", AMD64)
    with pytest.raises(ImageRefused, match="for linux/arm64, not for linux/amd64"):
        image_of(found, D3, write_config(ImageConfig(), (D1,), Platform("linux", "arm64")), "", AMD64)
    with pytest.raises(ImageRefused, match="only SHA-256"):
        image_of(found, D3, b'{"rootfs": {"diff_ids": ["../x"]}}', "", AMD64)


def test_a_variant_may_be_left_out_of_the_configuration() -> None:
    found = parse_manifest(manifest())
    assert isinstance(found, Manifest)
    wanted = Platform("linux", "arm", "v7")
    config = write_config(ImageConfig(), (D1,), Platform("linux", "arm"))
    assert image_of(found, D3, config, "x", wanted).platform == Platform("linux", "arm")


async def test_an_image_is_made_of_layers_and_found_again(tmp_path: Path) -> None:
    blobs = BlobStore(tmp_path)
    stored = await blobs.put_bytes(b"layer", f"{DOCKER_LAYER}.gzip")
    made = await store_image(blobs, CONFIG, (stored,), (D1,), AMD64, "mine")
    assert stored_image(blobs, made.digest, "mine") == made
    assert made.layers[0].media_type == f"{OCI_LAYER}+gzip"
    again = await store_image(blobs, CONFIG, (stored,), (D1,), AMD64)
    assert again.digest == made.digest
    assert all(blobs.find(digest) for digest in blobs_of(made))
    with pytest.raises(ImageNotFound):
        stored_image(blobs, D1)
    found = await blobs.put_bytes(index(None))
    with pytest.raises(ImageRefused, match="an index"):
        stored_image(blobs, found.digest)
