"""What guests changed, as layers: digested, copied and packed so that nothing is lost and nothing comes along."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.escape.images.archives import TAR
from tests.escape.images.ground import UID_BASE, kinds
from tests.images.overlays import views

from tartarus.images.oci import Descriptor
from tartarus.images.store import LayerStore
from tartarus.images.unpack.capture import Packed, copy_tree, digest_tree, pack_layer
from tartarus.images.unpack.layers import unpack_layer
from tartarus.images.unpack.limits import Limits
from tartarus.model.errors import ImageRefused

pytestmark = [pytest.mark.anyio, pytest.mark.needs("user-namespaces", "root")]

# What a guest may do in its overlay: every kind of change that there is.
_CHANGES = """
set -e
mount -i -t overlay -o userxattr,lowerdir=$1/lower,upperdir=$1/upper,workdir=$1/work overlay $1/mount
cd $1/mount
rm gone
rm -r tree && mkdir tree && echo new > tree/new
echo more >> changed
echo x > "new
line"
ln changed second
ln -s /etc/passwd link
mkfifo pipe
truncate -s 8M holes && printf end >> holes
mkdir -m 1777 tmp && touch tmp/mine
chown 7:8 tool && chmod 4755 tool
cd / && umount $1/mount
"""


def shift(root: Path) -> None:
    """Give files to the sandbox's ids, as its user namespace would have."""
    assert UID_BASE is not None
    for folder, folders, files in os.walk(root):
        for name in (".", *folders, *files):
            path = Path(folder) / name
            status = path.lstat()
            if status.st_uid < UID_BASE:
                os.chown(path, UID_BASE + status.st_uid, UID_BASE + status.st_gid, follow_symlinks=False)
                if not stat.S_ISLNK(status.st_mode):
                    path.chmod(stat.S_IMODE(status.st_mode))


@pytest.fixture
def upper(tmp_path: Path) -> Path:
    """The upper directory of an overlay in which things were changed; the lower one is beside it."""
    for name in ("lower", "upper", "work", "mount", "lower/tree"):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(0o755)
    for name in ("gone", "changed", "tree/old", "tool", "kept"):
        (tmp_path / "lower" / name).write_text(name)
    script = ["unshare", "-m", "sh", "-c", _CHANGES, "sh", str(tmp_path)]
    subprocess.run(script, check=True, capture_output=True, timeout=30)
    shift(tmp_path / "lower")
    shift(tmp_path / "upper")
    os.setxattr(tmp_path / "upper" / "changed", "user.note", b"\0\xff")
    return tmp_path / "upper"


async def test_a_copy_is_the_same_to_an_overlay(tmp_path: Path, upper: Path) -> None:
    kept = await copy_tree(LayerStore(tmp_path / "store"), upper, UID_BASE, kind="snapshot")
    assert kept.name.startswith("snapshot-")
    assert kinds(kept.path) == kinds(upper)
    before, after = views(tmp_path, [[upper, tmp_path / "lower"], [kept.path, tmp_path / "lower"]])
    assert before == after
    assert "gone" not in after
    assert "tree/old" not in after
    assert (kept.path / "second").stat().st_ino == (kept.path / "changed").stat().st_ino
    assert (kept.path / "holes").stat().st_blocks * 512 < 1 << 20
    assert kept.bytes > 8 << 20
    assert kept.digest == await digest_tree(upper, UID_BASE) == await digest_tree(kept.path, UID_BASE)
    # Overlayfs's own notes stay behind.
    assert {name for path in kept.path.rglob("*") for name in os.listxattr(path, follow_symlinks=False)} == {
        "user.overlay.opaque", "user.note",
    }  # fmt: skip


async def test_the_same_changes_are_kept_once(tmp_path: Path, upper: Path) -> None:
    store = LayerStore(tmp_path / "store")
    first = await copy_tree(store, upper, UID_BASE)
    os.utime(upper / "changed", (1, 1))
    assert await copy_tree(store, upper, UID_BASE) == first
    assert (await copy_tree(store, upper, UID_BASE, times=True)).name != first.name


_DIFFERENCES: dict[str, Callable[[Path], object]] = {
    "content": lambda upper: (upper / "changed").write_text("other"),
    "mode": lambda upper: (upper / "tool").chmod(0o755),
    "set-id bit": lambda upper: (upper / "changed").chmod(0o4644),
    "owner": lambda upper: os.chown(upper / "link", 5, 5, follow_symlinks=False),
    "target": lambda upper: ((upper / "link").unlink(), (upper / "link").symlink_to("/etc/group")),
    "name": lambda upper: (upper / "link").rename(upper / "lime"),
    "a new name": lambda upper: os.link(upper / "tool", upper / "tool2"),
    "a link undone": lambda upper: ((upper / "second").unlink(), (upper / "second").write_bytes((upper / "changed").read_bytes())),
    "attribute": lambda upper: os.setxattr(upper / "changed", "user.note", b"x"),
    "opaque": lambda upper: os.removexattr(upper / "tree", "user.overlay.opaque"),
    "whiteout": lambda upper: (upper / "gone").unlink(),
    "kind": lambda upper: ((upper / "pipe").unlink(), (upper / "pipe").touch()),
    "root": lambda upper: upper.chmod(0o700),
    "size of a hole": lambda upper: os.truncate(upper / "holes", 9 << 20),
    "a directory": lambda upper: (upper / "empty").mkdir(),
}  # fmt: skip


async def test_every_difference_is_one_to_the_digest(upper: Path) -> None:
    seen = {await digest_tree(upper, UID_BASE): "as it was"}
    for name, change in _DIFFERENCES.items():
        change(upper)
        digest = await digest_tree(upper, UID_BASE)
        assert digest not in seen, f"{name} looks like {seen.get(digest)}"
        seen[digest] = name


async def test_what_no_layer_can_hold_is_refused_or_left_out(tmp_path: Path, upper: Path) -> None:
    store = LayerStore(tmp_path / "store")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(upper / "socket"))
    kept = await copy_tree(store, upper, UID_BASE)
    assert "socket" not in kinds(kept.path)
    os.setxattr(upper / "tree", "user.overlay.redirect", b"/etc")
    with pytest.raises(ImageRefused, match="depends on what lies below"):
        await copy_tree(store, upper, UID_BASE)
    os.removexattr(upper / "tree", "user.overlay.redirect")
    os.mknod(upper / "null", stat.S_IFCHR, os.makedev(1, 3))
    with pytest.raises(ImageRefused, match="is a device"):
        await digest_tree(upper, UID_BASE)
    assert [path.name for path in (tmp_path / "store").iterdir()] == [kept.name]


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        (Limits(entries=5), "too many entries"),
        (Limits(bytes=1 << 20), "too large"),
        (Limits(depth=1), "too deep"),
        (Limits(xattr_bytes=5), "too many attributes"),
    ],
)
async def test_the_limits_hold(tmp_path: Path, upper: Path, limits: Limits, reason: str) -> None:
    with pytest.raises(ImageRefused, match=reason):
        await copy_tree(LayerStore(tmp_path / "store"), upper, UID_BASE, limits)
    assert list((tmp_path / "store").iterdir()) == []


async def test_links_in_it_lead_nowhere(tmp_path: Path) -> None:
    upper = tmp_path / "upper"
    upper.mkdir()
    (tmp_path / "outside").write_text("secret")
    (upper / "file").symlink_to(tmp_path / "outside")
    (upper / "folder").symlink_to(tmp_path)
    shift(upper)
    kept = await copy_tree(LayerStore(tmp_path / "store"), upper, UID_BASE)
    assert kinds(kept.path) == {"file": "l", "folder": "l"}


async def packed(tree: Path, into: Path, *, compressed: bool = True) -> Packed:
    file = os.open(into, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        return await pack_layer(tree, UID_BASE, file, compressed=compressed)
    finally:
        os.close(file)


@pytest.mark.parametrize("compressed", [True, False])
async def test_a_packed_layer_unpacks_to_the_same(tmp_path: Path, upper: Path, compressed: bool) -> None:
    os.setxattr(upper / "tree", "user.name", "Ä=\n".encode())
    (upper / ("n" * 120)).mkdir()
    os.close(os.open(os.fsencode(upper) + b"/" + b"n" * 120 + b"/\xff", os.O_CREAT))
    shift(upper)
    made = await packed(upper, tmp_path / "blob", compressed=compressed)
    assert made == await packed(upper, tmp_path / "again", compressed=compressed)
    assert (tmp_path / "blob").read_bytes() == (tmp_path / "again").read_bytes()
    descriptor = Descriptor(made.media_type, made.digest, made.size)
    assert made.media_type == (f"{TAR}+gzip" if compressed else TAR)
    tree = await unpack_layer(LayerStore(tmp_path / "store"), tmp_path / "blob", descriptor, made.diff_id, UID_BASE)
    assert await digest_tree(tree, UID_BASE) == await digest_tree(upper, UID_BASE)


async def test_others_read_a_packed_layer(tmp_path: Path, upper: Path) -> None:
    await packed(upper, tmp_path / "blob")
    with tarfile.open(tmp_path / "blob") as archive:
        found = {member.name: member for member in archive}
    assert {".wh.gone", "tree/.wh..wh..opq", "changed", "holes"} <= found.keys()
    assert "gone" not in found
    assert (found["tool"].mode, found["tool"].uid, found["tool"].gid) == (0o4755, 7, 8)
    assert found["second"].linkname == "changed"


async def test_a_name_that_marks_a_deletion_is_not_packed(tmp_path: Path, upper: Path) -> None:
    (upper / ".wh.kept").touch()
    shift(upper)
    with pytest.raises(ImageRefused, match="marks a deletion"):
        await packed(upper, tmp_path / "blob")
