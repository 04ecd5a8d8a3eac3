"""Directories that guests have written in: their digest, a copy as a layer, and a layer as an archive to push."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from tartarus.images.store import LayerStore
from tartarus.images.unpack.jailed import JailPlace, count_of, digest_of, run_jailed
from tartarus.images.unpack.layers import own
from tartarus.images.unpack.limits import Limits
from tartarus.model.errors import TemplateFailed


class Captured(msgspec.Struct, frozen=True):
    """A directory of changes, kept as a layer. `bytes` are its files' sizes together."""

    path: Path
    name: str
    digest: str
    bytes: int
    entries: int


class Packed(msgspec.Struct, frozen=True):
    """A layer's archive: the digest of its content, of the blob as it was written, and the blob's bytes."""

    diff_id: str
    digest: str
    size: int
    media_type: str


async def digest_tree(path: Path, uid_base: int | None, limits: Limits | None = None, *, times: bool = False) -> str:
    """``sha256:…`` over all that a layer directory holds: equal for equal trees, wherever they lie.

    Names, kinds, modes, owners as the sandbox sees them, user attributes, contents, hard links, whiteouts; also the
    files' times when `times`. Raises ImageRefused for what no layer can hold (a device, too much of anything).
    """
    facts = await run_jailed(
        "digest", str(path.name), [JailPlace(str(path), "/target")], uid_base, limits or Limits(), times=times
    )
    return digest_of(facts, "digest")


async def copy_tree(
    store: LayerStore,
    source: Path | int,
    uid_base: int | None,
    limits: Limits | None = None,
    *,
    kind: str = "changes",
    times: bool = False,
) -> Captured:
    """Keep an overlay's upper directory as a layer of `store`, named by `kind` and its digest; once per content.

    `source` is its path, or a descriptor of it.

    Nothing may write to `source` meanwhile: a change that is noticed is ImageRefused. Sockets are left out, and so
    are overlayfs's notes on where files came from. `times` as in `digest_tree`; the copy has them either way.
    """
    limits = limits or Limits()
    # A descriptor, not a path: a live sandbox's storage lies in no mount namespace that a copy could be mounted from.
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    opened = os.open(source, flags) if isinstance(source, Path) else os.open(".", flags, dir_fd=source)
    try:
        return await _copy(store, opened, uid_base, limits, kind, times=times)
    finally:
        os.close(opened)


async def _copy(
    store: LayerStore, source: int, uid_base: int | None, limits: Limits, kind: str, *, times: bool
) -> Captured:
    fds = {"source": source}
    seen = await run_jailed("digest", "the sandbox's changes", [], uid_base, limits, fds=fds, times=times)
    digest = digest_of(seen, "digest")
    name = f"{kind}-{digest.removeprefix('sha256:')[:32]}-{'own' if uid_base is None else uid_base}"

    async def build(tree: Path, lock: int) -> dict[str, object]:
        own(tree, uid_base)
        places = [JailPlace(str(tree), "/target", write=True)]
        facts = await run_jailed(
            "copy", "the sandbox's changes", places, uid_base, limits, fds=fds, lock=lock, times=times
        )
        if facts["digest"] != digest:
            raise TemplateFailed(
                "can't capture the sandbox's changes", why="they changed meanwhile", fix="pause the sandbox first"
            )
        return {"digest": digest} | {name: count_of(facts, name) for name in ("entries", "bytes", "sockets_left_out")}

    path = await store.get(name, build)
    return Captured(path, name, digest, count_of(seen, "bytes"), count_of(seen, "entries"))


async def pack_layer(
    path: Path, uid_base: int | None, out: int, limits: Limits | None = None, *, compressed: bool = True
) -> Packed:
    """Write a layer directory as an OCI layer to the open file `out`; the same tree gives the same bytes.

    Raises ImageRefused for what an archive can't say, such as a file whose name begins with ``.wh.``.
    """
    facts = await run_jailed(
        "pack",
        str(path.name),
        [JailPlace(str(path), "/target")],
        uid_base,
        limits or Limits(),
        fds={"out": out},
        compressed=compressed,
    )
    media_type = "application/vnd.oci.image.layer.v1.tar" + ("+gzip" if compressed else "")
    return Packed(digest_of(facts, "diff_id"), digest_of(facts, "blob"), count_of(facts, "size"), media_type)
