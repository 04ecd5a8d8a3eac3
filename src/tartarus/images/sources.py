"""Images that lie in files: whatever a user points to, recognised by its content, into the blob store.

The node calls `load` for `tartarus template import`. Archives and directories are hostile: see `bundles`.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from tartarus.images import rootfs
from tartarus.images.blobfiles import in_thread
from tartarus.images.blobs import BlobStore, Draft
from tartarus.images.bundles import ROOTFS_PARTS, Bundle, DirectoryBundle, TarBundle
from tartarus.images.layouts import load_layout, load_saved
from tartarus.images.manifests import MAX_IMAGE_BYTES, OCI_LAYER
from tartarus.images.oci import Descriptor, Image, ImageConfig, Platform, host_platform
from tartarus.images.registry.settings import BlobProgress, OnProgress, silent
from tartarus.images.stored import store_image
from tartarus.images.unpack.jailed import run_jailed
from tartarus.images.unpack.limits import Limits
from tartarus.model.errors import ImageRefused, InvalidRequest

_READ_BYTES = 4 * 1024**2
_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ\0": "xz", b"BZh": "bzip2"}
_OTHERS = {
    b"PK\3\4": "a zip archive", b"\x7fELF": "a program", b"hsqs": "a squashfs image", b"QFI\xfb": "a qcow2 disk image",
    b"#!": "a script", b"!<arch>": "a Debian package or an ar archive", b"Rar!": "a rar archive",
    b"7z\xbc\xaf": "a 7z archive", b"\xed\xab\xee\xdb": "an RPM package",
}  # fmt: skip
# Ids that no user and no sandbox of this host has: whoever decompresses owns nothing.
_JAIL_IDS = 0x70000000


async def load(
    path: Path,
    blobs: BlobStore,
    on_progress: OnProgress = silent,
    *,
    reference: str = "",
    platform: Platform | None = None,
    max_bytes: int = MAX_IMAGE_BYTES,
) -> Image:
    """Bring the image at `path` into the store, as `pull` does from a registry.

    `path` is an OCI image layout or what `docker save` wrote (each as a directory or an archive), or a root file
    system, as a directory or an archive. Archives may be compressed with gzip, zstd, xz or bzip2. `reference` names
    the image in an archive of several, and in what comes of it.

    Raises:
        ImageRefused: it is none of these, or is damaged or dishonest.
        InvalidRequest: it has several images and `reference` names none, or it can't be read.
        NoSpace: the disk is full.
    """
    platform = platform or host_platform()
    fd = _opened(path)
    try:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            directory = await in_thread(DirectoryBundle, fd)
            return await _Load(blobs, on_progress, reference, platform, max_bytes).from_directory(directory, fd)
        return await _Load(blobs, on_progress, reference, platform, max_bytes).from_file(fd, path.name)
    finally:
        os.close(fd)


def _opened(path: Path) -> int:
    try:
        # Without waiting for a writer, were it a fifo; what it is, is looked at afterwards.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise InvalidRequest(f"can't read {path}", why=error.strerror or "") from None
    mode = os.fstat(fd).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        os.close(fd)
        raise InvalidRequest(f"{path} is neither a file nor a directory")
    return fd


class _Load:
    def __init__(
        self, blobs: BlobStore, on_progress: OnProgress, reference: str, platform: Platform, max_bytes: int
    ) -> None:
        self._blobs = blobs
        self._on_progress = on_progress
        self._reference = reference
        self._platform = platform
        self._max_bytes = max_bytes

    async def from_directory(self, bundle: DirectoryBundle, fd: int) -> Image:
        image = await self._image(bundle)
        if image is not None:
            return image
        with self._blobs.draft() as draft:
            await in_thread(rootfs.pack, fd, draft, self._max_bytes)
            return await self._of_layer(await in_thread(draft.commit, OCI_LAYER))

    async def from_file(self, fd: int, name: str) -> Image:
        start = os.pread(fd, 8, 0)
        for magic, compression in _COMPRESSED.items():
            if start.startswith(magic):
                return await self._compressed(fd, f"{name} ({compression})")
        for magic, kind in _OTHERS.items():
            if start.startswith(magic):
                raise _no_image(f"{name} is {kind}")
        if os.fstat(fd).st_size > self._max_bytes:
            raise ImageRefused(f"{name} is too large for an image", why=f"at most {self._max_bytes} bytes are taken")
        image = await self._image(await in_thread(TarBundle, fd))
        if image is not None:
            return image
        with self._blobs.draft() as draft:
            await _copy(fd, draft)
            return await self._of_layer(await in_thread(draft.commit, OCI_LAYER))

    async def _compressed(self, fd: int, name: str) -> Image:
        """Expanded first, by somebody who could do no harm: decompressors are large and read foreign bytes."""
        with self._blobs.draft() as draft:
            limits = Limits(bytes=self._max_bytes)
            ids = _JAIL_IDS if os.geteuid() == 0 else None
            await run_jailed("expand", name, (), ids, limits, fds={"blob": fd, "out": draft.fileno()})
            await in_thread(draft.reread)
            image = await self._image(await in_thread(TarBundle, draft.fileno()))
            if image is not None:
                return image
            return await self._of_layer(await in_thread(draft.commit, OCI_LAYER))

    async def _image(self, bundle: Bundle) -> Image | None:
        """The image in a layout; None for a root file system. Docker writes both layouts into one archive."""
        for mark, loader in (("oci-layout", load_layout), ("manifest.json", load_saved)):
            if bundle.size(mark) is not None:
                return await loader(bundle, self._blobs, self._on_progress, self._reference, self._platform)
        if bundle.is_rootfs:
            return None
        names = ", ".join(ascii(name)[1:-1][:40] for name in bundle.names()[:10]) or "nothing"
        raise _no_image(f"found in it: {names}")

    async def _of_layer(self, layer: Descriptor) -> Image:
        """An image of one uncompressed layer, run with nothing but a search path."""
        self._on_progress(BlobProgress(layer.digest, layer.size, layer.size, "done"))
        config = ImageConfig(env={"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"})
        return await store_image(self._blobs, config, (layer,), (layer.digest,), self._platform, self._reference)


def _no_image(why: str) -> ImageRefused:
    return ImageRefused(
        "this is no image",
        why=why,
        fix="give an OCI layout, what `docker save` writes, or a root file system with one of /"
        + ", /".join(sorted(ROOTFS_PARTS)),
    )


async def _copy(fd: int, draft: Draft) -> None:
    """Piece by piece, so that who gives up does not wait for the whole."""
    offset = 0
    while chunk := await in_thread(os.pread, fd, _READ_BYTES, offset):
        await in_thread(draft.write, chunk)
        offset += len(chunk)
