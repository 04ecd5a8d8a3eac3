"""Images: from a registry on loopback to directories that can be stacked, beside skopeo and umoci.

The image is made here: ten layers of 30 MB, half of it text and half of it noise, in a few thousand files of the
sizes that distributions have. Peers get it from the same registry in the same run.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import itertools
import json
import os
import random
import shutil
import socket
import subprocess
import tarfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from benchmarks.measure import Row, Timed, alternate
from benchmarks.node_benches import PANDAS, STATE, run_once, running_node
from tartarus.images import LayerStore
from tartarus.images.blobs import BlobStore
from tartarus.images.reference import Reference
from tartarus.images.registry import RegistrySettings, pull
from tartarus.images.unpack.layers import unpack_layers
from tartarus.model.definition import BuildNetwork
from tartarus.model.definition_yaml import read_definition
from tartarus.model.library import CreateTemplate, DockerfileSource, UploadSource
from tartarus.model.sandbox import ExecSpec, Isolation, SandboxSpec
from tartarus.model.shipped import place_of
from tartarus.node.service import Node
from tartarus.runtimes.idmap import PRIVILEGED_BASE
from tartarus.runtimes.trees import remove_tree

LAYERS = 10
LAYER_BYTES = 30 * 1000 * 1000
SHARED = 8
_WORDS = [f"word{number} ".encode() for number in range(4000)]
_RUNS = 5
_TENANT, _BASE, _TEMPLATE = "uid-0", "bench-debian", "bench-python-ds"


def _layer(seed: int) -> bytes:
    """A layer's tar: files of 1 kB to 1 MB until it is as large as it should be."""
    chance = random.Random(seed)
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for number in itertools.count():
            size = min(int(chance.paretovariate(0.7) * 1000), 1_000_000)
            half = b"".join(chance.choices(_WORDS, k=size // 12 + 1))[: size // 2]
            content = half + chance.randbytes(size - len(half))
            member = tarfile.TarInfo(f"usr/share/layer{seed}/{number % 97}/file{number}")
            member.size, member.mtime = size, 1_700_000_000
            archive.addfile(member, io.BytesIO(content))
            if stream.tell() >= LAYER_BYTES:
                return stream.getvalue()
    raise AssertionError


def _write_layout(place: Path, name: str, layers: list[tuple[bytes, str]]) -> None:
    """Add an image to an OCI layout: `layers` are (compressed, digest of the uncompressed)."""
    blobs = place / "blobs" / "sha256"
    blobs.mkdir(parents=True, exist_ok=True)

    def put(content: bytes, media_type: str) -> dict[str, object]:
        digest = hashlib.sha256(content).hexdigest()
        (blobs / digest).write_bytes(content)
        return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(content)}

    config = {
        "architecture": "amd64", "os": "linux", "config": {},
        "rootfs": {"type": "layers", "diff_ids": [diff_id for _, diff_id in layers]},
    }  # fmt: skip
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": put(json.dumps(config).encode(), "application/vnd.oci.image.config.v1+json"),
        "layers": [put(blob, "application/vnd.oci.image.layer.v1.tar+gzip") for blob, _ in layers],
    }
    entry = put(json.dumps(manifest).encode(), "application/vnd.oci.image.manifest.v1+json")
    index_file = place / "index.json"
    index: dict[str, Any] = {"schemaVersion": 2, "manifests": []}
    if index_file.exists():
        index = json.loads(index_file.read_text())
    index["manifests"].append({**entry, "annotations": {"org.opencontainers.image.ref.name": name}})
    index_file.write_text(json.dumps(index))
    (place / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')


def _images(place: Path) -> None:
    """Two images, `first` and `second`, that share all but two layers."""

    def made(seed: int) -> tuple[bytes, str]:
        tar = _layer(seed)
        # As registries have them: compressed by gzip at its usual level.
        packed = subprocess.run(["gzip", "-n", "-6"], input=tar, capture_output=True, check=True).stdout
        return packed, f"sha256:{hashlib.sha256(tar).hexdigest()}"

    layers = [made(seed) for seed in range(LAYERS + LAYERS - SHARED)]
    _write_layout(place, "first", layers[:LAYERS])
    _write_layout(place, "second", layers[:SHARED] + layers[LAYERS:])


@contextlib.contextmanager
def _registry(place: Path) -> Iterator[str]:
    """Debian's docker-registry on a free port of loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = {
        "version": 0.1, "log": {"level": "error"}, "http": {"addr": f"127.0.0.1:{port}"},
        "storage": {"filesystem": {"rootdirectory": str(place / "storage")}},
    }  # fmt: skip
    (place / "config.yml").write_text(json.dumps(config))
    with (place / "log").open("wb") as log:
        process = subprocess.Popen(["docker-registry", "serve", str(place / "config.yml")], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.02)
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def absent() -> list[str]:
    """What the bench needs and is not installed."""
    return [name for name in ("docker-registry", "skopeo", "umoci") if not shutil.which(name)]


async def pull_and_unpack(home: Path) -> list[Row]:
    """An image of 300 MB in ten layers, from the registry to directories."""
    if absent():
        return []
    place = home / "images"
    place.mkdir()
    async with _pushed(place) as host:
        return await alternate("pull and unpack, 300 MB", _contenders(place, host), _RUNS, _RUNS)


@contextlib.asynccontextmanager
async def _pushed(place: Path) -> AsyncIterator[str]:
    await asyncio.to_thread(_images, place / "layout")
    with _registry(place) as host:
        for name in ("first", "second"):
            await _run("skopeo", "copy", "--quiet", "--dest-tls-verify=false", f"oci:{place}/layout:{name}",
                       f"docker://{host}/{name}:1")  # fmt: skip
        yield host


def _contenders(place: Path, host: str) -> dict[str, Timed]:
    counter = itertools.count()

    async def ours(first: bool) -> float:
        """The time for one image; for the second, the first is there already."""
        home = place / f"ours-{next(counter)}"
        blobs, store = BlobStore(home / "blobs"), LayerStore(home / "layers", remove=remove_tree)
        if not first:
            await _pull_one(blobs, store, f"{host}/first:1")
        began = time.perf_counter()
        await _pull_one(blobs, store, f"{host}/{'first' if first else 'second'}:1")
        took = (time.perf_counter() - began) * 1e3
        await asyncio.to_thread(remove_tree, home)
        return took

    async def peers() -> float:
        home = place / f"peers-{next(counter)}"
        home.mkdir()
        began = time.perf_counter()
        await _run(
            "skopeo", "copy", "--quiet", "--src-tls-verify=false", f"docker://{host}/first:1", f"oci:{home}/oci:1"
        )
        await _run("umoci", "unpack", "--image", f"{home}/oci:1", f"{home}/bundle")
        took = (time.perf_counter() - began) * 1e3
        await asyncio.to_thread(remove_tree, home)
        return took

    return {
        "tartarus": lambda: ours(first=True),
        "skopeo copy + umoci unpack": peers,
        f"tartarus, {SHARED} of {LAYERS} layers there": lambda: ours(first=False),
    }


async def warm_from_image(home: Path) -> list[Row]:
    """First output of pandas in a template that a Dockerfile made of a Debian from packages; built once, then kept."""
    if os.geteuid() != 0 or not shutil.which("mmdebstrap"):
        return []
    rows: list[Row] = []
    # A state of its own: a node warms its users' templates when it starts, which other benches would measure.
    async with running_node(STATE / "images") as node:
        began = time.perf_counter()
        made = await _data_science(node, home)
        if made:
            rows.append(Row("template from a Dockerfile", "base imported, python-ds built and warmed", "s",
                            [time.perf_counter() - began]))  # fmt: skip
        first: list[float] = []
        for _ in range(30):
            spec = SandboxSpec(
                template=_TEMPLATE, isolation=Isolation.CONTAINER,
                command=ExecSpec(argv=("python3", "-c", PANDAS)),
            )  # fmt: skip
            first.append((await run_once(node, spec, b"45\n"))[0])
    return [*rows, Row("warm python-ds from an image", "tartarus, first output", "ms", first[2:])]


async def _data_science(node: Node, home: Path) -> bool:
    """Whether the template had to be made: Debian's packages, then the definition that comes with Tartarus."""
    templates = node.library.templates
    if _TEMPLATE in {info.name for info in await templates.list(_TENANT)}:
        return False
    tar = home / "debian.tar"
    include = "--include=python3,python3-venv,ca-certificates"
    await _run("mmdebstrap", "--quiet", "--variant=minbase", include, "bookworm", str(tar))
    upload = await node.library.uploads.put(_TENANT, _file(tar))
    await _make(node, CreateTemplate(name=_BASE, source=UploadSource(upload=upload.id), replace=True))
    place = place_of("python-ds")
    assert place is not None
    definition = read_definition((place / "template.yaml").read_text())
    source = DockerfileSource(dockerfile=(place / "Dockerfile").read_text(), args={"BASE": _BASE})
    request = CreateTemplate(
        name=_TEMPLATE, source=source, definition=definition, network=BuildNetwork.OPEN, ca_bundle=True
    )
    await _make(node, request)
    return True


async def _make(node: Node, request: CreateTemplate) -> None:
    async for _ in node.library.templates.create(_TENANT, request):
        pass


async def _file(path: Path) -> AsyncIterator[bytes]:
    with path.open("rb") as file:
        while data := file.read(1024**2):
            yield data


async def _pull_one(blobs: BlobStore, store: LayerStore, name: str) -> None:
    image = await pull(Reference.parse(name), blobs, RegistrySettings())
    layers = []
    for layer, diff_id in zip(image.layers, image.diff_ids, strict=True):
        blob = blobs.find(layer.digest)
        assert blob is not None
        layers.append((blob, layer, diff_id))
    await unpack_layers(store, layers, PRIVILEGED_BASE)


async def _run(*argv: str) -> None:
    process = await asyncio.create_subprocess_exec(*argv, stdout=asyncio.subprocess.DEVNULL)
    if await process.wait():
        raise RuntimeError(f"{argv[0]} failed")
