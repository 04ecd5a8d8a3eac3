"""Where hostile layers are unpacked: a store, with bait around it that nothing may touch."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from tests.escape.images.archives import Blob

from tartarus.images.store import LayerStore
from tartarus.images.unpack.layers import layer_name, unpack_layer
from tartarus.images.unpack.limits import Limits

UID_BASE = 0x7000_0000 if os.geteuid() == 0 else None
SMALL = Limits(bytes=8 << 20, entries=2000, depth=50, header_bytes=64 << 10, xattr_bytes=8 << 10, ratio=50,
               ratio_free_bytes=1 << 20, memory_bytes=512 << 20, cpu_s=20, timeout_s=60)  # fmt: skip
_HOSTS = ("/etc/passwd", "/etc/group", "/etc/shadow", "/tmp", "/dev/null", "/root")


class Ground:
    """A directory with a store and, beside it and above it, files that attacks aim at."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.bait = root / "bait"
        self.bait.mkdir()
        (self.bait / "file").write_text("untouched")
        (self.bait / "sub").mkdir()
        (self.bait / "sub" / "file").write_text("untouched")
        (root / "file").write_text("untouched")
        self.store = LayerStore(root / "store")
        self._before = self.surroundings()

    async def unpack(self, blob: Blob, limits: Limits = SMALL) -> Path:
        place = self.root / "blob"
        place.write_bytes(blob.data)
        try:
            return await unpack_layer(self.store, place, blob.descriptor, blob.diff_id, UID_BASE, limits)
        finally:
            place.unlink()

    def facts(self, blob: Blob) -> dict[str, object]:
        return self.store.manifest(layer_name(blob.descriptor, blob.diff_id, UID_BASE))

    def surroundings(self) -> dict[str, tuple[object, ...]]:
        """Everything outside the store that an attack could change."""
        found: dict[str, tuple[object, ...]] = {}
        for path in [*_HOSTS, *map(str, self._outside())]:
            status = os.lstat(path)
            content = Path(path).read_bytes() if stat.S_ISREG(status.st_mode) else b""
            # Others use the host's directories meanwhile; ours are ours alone.
            times = (status.st_mtime_ns, status.st_ctime_ns) if path.startswith(str(self.bait)) else ()
            facts = (status.st_mode, status.st_uid, status.st_gid, status.st_ino, *times, content)
            found[path] = (*facts, tuple(os.listxattr(path, follow_symlinks=False)))
        return found

    def _outside(self) -> Iterator[Path]:
        yield self.root
        for folder, folders, files in os.walk(self.root):
            if folder == str(self.root):
                folders.remove("store") if "store" in folders else None
            yield from (Path(folder) / name for name in (*folders, *files))

    def check(self) -> None:
        """Nothing outside was touched, nothing unfinished lies in the store, and nobody holds anything open here."""
        assert self.surroundings() == self._before
        assert [path.name for path in (self.root / "store").iterdir() if path.name.startswith(".")] == []
        assert holders(self.root) == []


def holders(root: Path) -> list[str]:
    """Processes other than this one that have something below `root` open."""
    found = []
    for process in os.listdir("/proc"):
        if not process.isdigit() or int(process) == os.getpid():
            continue
        try:
            fds = f"/proc/{process}/fd"
            links = [os.readlink(f"{fds}/{name}") for name in os.listdir(fds)]
        except OSError:
            continue
        if any(link.startswith(str(root)) for link in links):
            found.append(process)
    return found


def kinds(tree: Path) -> dict[str, str]:
    """What is in a layer, by path: d, f, l, p, w (a whiteout), or c for any other device."""
    letters = {stat.S_IFDIR: "d", stat.S_IFREG: "f", stat.S_IFLNK: "l", stat.S_IFIFO: "p", stat.S_IFCHR: "c"}
    found = {}
    for folder, folders, files in os.walk(tree):
        for name in (*folders, *files):
            path = Path(folder) / name
            status = path.lstat()
            letter = letters.get(stat.S_IFMT(status.st_mode), "?")
            found[str(path.relative_to(tree))] = "w" if letter == "c" and status.st_rdev == 0 else letter
    return found
