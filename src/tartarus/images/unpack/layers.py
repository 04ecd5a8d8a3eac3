"""From blobs to layer directories: each layer once, whoever asks for it."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from tartarus.images.oci import Descriptor
from tartarus.images.store import LayerStore
from tartarus.images.unpack.jailed import JailPlace, count_of, run_jailed
from tartarus.images.unpack.limits import Limits
from tartarus.model.errors import ImageRefused

Progress = Callable[[str, int], None]
"""Called with a layer's diff id and how many of its uncompressed bytes are done."""

MEDIA_TYPES = frozenset(
    f"{kind}{compression}"
    for kind, compressions in {
        "application/vnd.oci.image.layer.v1.tar": ("", "+gzip", "+zstd"),
        "application/vnd.oci.image.layer.nondistributable.v1.tar": ("", "+gzip", "+zstd"),
        "application/vnd.docker.image.rootfs.diff.tar": ("", ".gzip", ".zstd"),
        "application/vnd.docker.image.rootfs.foreign.diff.tar": ("", ".gzip"),
    }.items()
    for compression in compressions
)
"""The media types of layers. How one is really compressed is read off its first bytes: some builders say one and do
another, and the digest of the content is checked whichever it is."""
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_FORMAT = 1
# What is kept of what the child says: see `inside.extract.Facts`.
_COUNTS = (
    "archive_bytes", "bytes", "entries", "whiteouts", "opaque_root", "implied_directories", "devices_left_out",
    "attributes_left_out", "nobodys",
)  # fmt: skip
_AT_ONCE = 2


def layer_name(descriptor: Descriptor, diff_id: str, uid_base: int | None) -> str:
    """A layer's name in the LayerStore.

    The blob's digest is part of it beside the content's: what a blob claims to contain is checked by the process
    that decompresses it, and a blob that takes that process over must poison nobody's layer but its own.
    """
    both = hashlib.sha256(f"{_FORMAT} {diff_id} {descriptor.digest}".encode()).hexdigest()
    return f"layer-{both[:32]}-{'own' if uid_base is None else uid_base}"


async def unpack_layer(
    store: LayerStore,
    blob: Path,
    descriptor: Descriptor,
    diff_id: str,
    uid_base: int | None,
    limits: Limits | None = None,
    progress: Progress = lambda _diff_id, _bytes: None,
) -> Path:
    """The directory of a layer, as overlayfs stacks it; unpacked from the file `blob` unless that was done before.

    `uid_base`: the host id that owns what the layer gives to id 0 (see `idmap.apply`), None for the daemon's user.
    Raises ImageRefused for a hostile, damaged or mislabelled layer, NoSpace, IsolationUnavailable, TemplateFailed.
    """
    check_layer(descriptor, diff_id)
    limits = limits or Limits()

    async def build(tree: Path, lock: int) -> dict[str, object]:
        file = _open_blob(blob, descriptor)
        try:
            own(tree, uid_base)
            facts = await run_jailed(
                "unpack",
                f"layer {diff_id}",
                [JailPlace(str(tree), "/target", write=True)],
                uid_base,
                limits,
                fds={"blob": file},
                lock=lock,
                report=lambda count: progress(diff_id, count),
                diff_id=diff_id,
            )
        finally:
            os.close(file)
        counts = {name: count_of(facts, name) for name in _COUNTS}
        return {"diff_id": diff_id, "blob": descriptor.digest, **counts}

    return await store.get(layer_name(descriptor, diff_id, uid_base), build)


async def unpack_layers(
    store: LayerStore,
    layers: Sequence[tuple[Path, Descriptor, str]],
    uid_base: int | None,
    limits: Limits | None = None,
    progress: Progress = lambda _diff_id, _bytes: None,
) -> list[Path]:
    """`unpack_layer` for each (blob, descriptor, diff id), a few at a time; the directories in the same order.

    Raises what the first that fails raises, when the others have ended.
    """
    turns = asyncio.Semaphore(_AT_ONCE)

    async def one(blob: Path, descriptor: Descriptor, diff_id: str) -> Path:
        async with turns:
            return await unpack_layer(store, blob, descriptor, diff_id, uid_base, limits, progress)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(*layer)) for layer in layers]
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]


def check_layer(descriptor: Descriptor, diff_id: str) -> None:
    """Refuse what is no layer by its label."""
    if descriptor.media_type not in MEDIA_TYPES:
        raise ImageRefused(
            f"layer {diff_id[:80]!a} was refused",
            why=f"its media type {descriptor.media_type[:120]!a} is not that of a layer",
            fix="such artifacts are not images that can be run",
        )
    for digest in (descriptor.digest, diff_id):
        if not _DIGEST.fullmatch(digest):
            raise ImageRefused(f"layer {diff_id[:80]!a} was refused", why=f"{digest[:80]!a} is no SHA-256 digest")


def own(tree: Path, uid_base: int | None) -> None:
    """Make an empty directory the sandbox's root's, who fills it."""
    os.chmod(tree, 0o755)
    if uid_base is not None and os.geteuid() == 0:
        os.chown(tree, uid_base, uid_base)


def _open_blob(blob: Path, descriptor: Descriptor) -> int:
    file = os.open(blob, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    size = os.fstat(file).st_size
    if size != descriptor.size:
        os.close(file)
        raise ImageRefused(
            f"layer {descriptor.digest} was refused", why=f"it has {size} bytes and should have {descriptor.size}"
        )
    return file
