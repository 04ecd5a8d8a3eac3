"""The first file system of a microVM: the guest agent as /init, and the kernel modules it loads, as a cpio archive.

Not compressed: without hardware virtualisation, unpacking would take longer than reading.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

_MAGIC = "070701"
_DIRECTORY, _FILE, _DEVICE = 0o040755, 0o100755, 0o020600
_CONSOLE = (5, 1)


def initramfs(agent: bytes, modules: Sequence[tuple[str, bytes]]) -> bytes:
    """The archive; `modules` (file name, content) are loaded in this order."""
    return archive({"init": agent, **_modules("modules.list", modules)})


def more_modules(modules: Sequence[tuple[str, bytes]]) -> dict[str, bytes]:
    """Files for another archive behind that one: modules that are loaded after its own, in this order."""
    return _modules("more-modules.list", modules)


def _modules(listing: str, modules: Sequence[tuple[str, bytes]]) -> dict[str, bytes]:
    files = {f"lib/{name}": content for name, content in modules}
    return {listing: "".join(f"/{path}\n" for path in files).encode(), **files}


def archive(files: Mapping[str, bytes]) -> bytes:
    """A cpio archive ("newc") with these files, the directories above them, and /dev/console."""
    directories = sorted({"dev", *(path.rpartition("/")[0] for path in files if "/" in path)})
    parts = [_entry(number, path, _DIRECTORY) for number, path in enumerate(directories, 1)]
    parts.append(_entry(len(parts) + 1, "dev/console", _DEVICE, device=_CONSOLE))
    parts += [_entry(number, path, _FILE, content) for number, (path, content) in enumerate(files.items(), len(parts))]
    parts.append(_entry(0, "TRAILER!!!", 0))
    return b"".join(parts)


def _entry(number: int, path: str, mode: int, content: bytes = b"", device: tuple[int, int] = (0, 0)) -> bytes:
    name = path.encode() + b"\0"
    fields = (number, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(name), 0)
    head = _MAGIC.encode() + b"".join(b"%08x" % field for field in fields) + name
    return _padded(head) + _padded(content)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
