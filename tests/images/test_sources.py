"""Images in files: recognised by content, verified, and harmless when they are hostile."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import stat
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.images.registries import Blob, MadeImage, index_of, make_image, sha256, tar_of, write_layout

from tartarus.images.blobs import BlobStore
from tartarus.images.bundles import TarBundle, read
from tartarus.images.manifests import OCI_INDEX, OCI_LAYER
from tartarus.images.oci import Descriptor, Image, Platform
from tartarus.images.registry import BlobProgress
from tartarus.images.sources import load
from tartarus.images.store import LayerStore
from tartarus.images.unpack.layers import unpack_layers
from tartarus.model.errors import ImageRefused, InvalidRequest, TartarusError

pytestmark = [pytest.mark.anyio, pytest.mark.needs("user-namespaces")]

AMD64 = Platform()
MADE = make_image({"etc/a": b"a"}, {"srv/b": os.urandom(2_000_000)}, Cmd=["/x"])
PLAIN = make_image({"etc/a": b"a"}, {"srv/b": b"b" * 100_000}, compress=False, Cmd=["/x"])


@pytest.fixture
def blobs(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "blobs")


def tar_up(directory: Path, archive: Path) -> Path:
    with tarfile.open(archive, "w") as out:
        out.add(directory, ".")
    return archive


def pack(archive: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(archive, "w") as out:
        for member, content in members:
            member.size = len(content)
            out.addfile(member, io.BytesIO(content))
    return archive


def entry(name: str, content: bytes = b"", **facts: Any) -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    for key, value in facts.items():
        setattr(member, key, value)
    return member, content


def saved(made: MadeImage, *tags: str, **changes: Any) -> list[tuple[tarfile.TarInfo, bytes]]:
    """What `docker save` wrote until version 25: a directory for each layer."""
    config_name = f"{made.config.digest.removeprefix('sha256:')}.json"
    layers = [f"{number:064x}/layer.tar" for number in range(len(made.layers))]
    facts = {"Config": config_name, "RepoTags": list(tags) or None, "Layers": layers} | changes
    return [
        entry(config_name, made.config.content),
        *(entry(name, layer.content) for name, layer in zip(layers, made.layers, strict=True)),
        entry("repositories", b"{}"),
        entry("manifest.json", json.dumps([facts]).encode()),
    ]


SMALL_ARCHIVE = tar_of({"a": b"1", "x/layer.tar": b"2" * 700, "long" * 40: b"3", "manifest.json": b"[]"})


def is_there(blobs: BlobStore, *made: Blob) -> bool:
    return all(blobs.read(blob.digest, 2**30) == blob.content for blob in made)


def left_behind(blobs_root: Path) -> list[str]:
    return [path.name for path in (blobs_root / "partial").iterdir()]


# OCI layouts.


@pytest.mark.parametrize("form", ["directory", "tar", "tar.gz"])
async def test_an_oci_layout_is_loaded(blobs: BlobStore, tmp_path: Path, form: str) -> None:
    place = write_layout(tmp_path / "layout", MADE, "1.0")
    if form != "directory":
        place = tar_up(place, tmp_path / "layout.tar")
    if form == "tar.gz":
        place.write_bytes(gzip.compress(place.read_bytes(), 1))
    seen: list[BlobProgress] = []
    image = await load(place, blobs, seen.append, platform=AMD64)
    assert image.digest == MADE.manifest.digest
    assert image.diff_ids == MADE.diff_ids
    assert image.reference == "1.0"
    assert image.config.cmd == ("/x",)
    assert is_there(blobs, *MADE.blobs, MADE.manifest)
    assert {each.digest for each in seen if each.state == "done"} == {blob.digest for blob in MADE.blobs}
    assert left_behind(tmp_path / "blobs") == []
    seen.clear()
    assert (await load(place, blobs, seen.append, reference="mine", platform=AMD64)).reference == "mine"
    assert {each.state for each in seen} <= {"there", "moving"}


def several(place: Path, *named: tuple[str, MadeImage]) -> Path:
    for number, (_, made) in enumerate(named):
        write_layout(place / str(number), made)
        subprocess.run(["cp", "-r", *(str(each) for each in (place / str(number)).iterdir()), str(place)], check=True)
        subprocess.run(["rm", "-r", str(place / str(number))], check=True)
    entries = [
        made.manifest.descriptor(annotations={"org.opencontainers.image.ref.name": name}) for name, made in named
    ]
    (place / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": entries}))
    return place


async def test_one_of_several_is_named(blobs: BlobStore, tmp_path: Path) -> None:
    place = several(tmp_path / "layout", ("app:1", MADE), ("docker.io/library/other:2", PLAIN))
    assert (await load(place, blobs, reference="app:1", platform=AMD64)).digest == MADE.manifest.digest
    assert (await load(place, blobs, reference="other:2", platform=AMD64)).digest == PLAIN.manifest.digest
    for reference in ("", "third"):
        with pytest.raises(InvalidRequest, match="app:1, docker.io/library/other:2"):  # noqa: RUF043
            await load(place, blobs, reference=reference, platform=AMD64)


@pytest.mark.parametrize("nested", [False, True])
async def test_the_platform_is_chosen(blobs: BlobStore, tmp_path: Path, nested: bool) -> None:
    arm = make_image({"arm": b"1"}, architecture="arm64")
    place = several(tmp_path / "layout", ("", MADE), ("", arm))
    index = index_of((arm, {"os": "linux", "architecture": "arm64"}), (MADE, {"os": "linux", "architecture": "amd64"}))
    if nested:
        (place / "blobs" / "sha256" / index.digest.removeprefix("sha256:")).write_bytes(index.content)
        (place / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [index.descriptor()]}))
    else:
        (place / "index.json").write_bytes(index.content)
    assert (await load(place, blobs, platform=AMD64)).digest == MADE.manifest.digest
    assert (await load(place, blobs, platform=Platform("linux", "arm64"))).digest == arm.manifest.digest


@pytest.mark.needs("skopeo")
@pytest.mark.parametrize("form", ["oci-archive", "docker-archive", "oci"])
async def test_what_other_tools_write_is_loaded(blobs: BlobStore, tmp_path: Path, form: str) -> None:
    write_layout(tmp_path / "source", MADE)
    target = tmp_path / "target"
    done = subprocess.run(
        ["skopeo", "--insecure-policy", "copy", f"oci:{tmp_path / 'source'}:latest", f"{form}:{target}:app:1"],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    image = await load(target, blobs, platform=AMD64)
    assert image.diff_ids == MADE.diff_ids
    assert image.reference in {"app:1", "docker.io/library/app:1"}
    assert image.config.cmd == ("/x",)


# docker save.


async def test_a_saved_image_is_loaded(blobs: BlobStore, tmp_path: Path) -> None:
    members = saved(PLAIN, "app:1")
    archive = pack(tmp_path / "saved.tar", *members)
    image = await load(archive, blobs, platform=AMD64)
    assert image.reference == "docker.io/library/app:1"
    assert image.diff_ids == PLAIN.diff_ids
    assert [layer.digest for layer in image.layers] == list(PLAIN.diff_ids)
    assert image.config_digest == PLAIN.config.digest
    assert is_there(blobs, *PLAIN.blobs)
    spread(tmp_path / "directory", members)
    assert await load(tmp_path / "directory", blobs, platform=AMD64) == image


async def test_a_layer_that_is_a_link_to_another_member(blobs: BlobStore, tmp_path: Path) -> None:
    members = saved(PLAIN)
    name, content = members[2]
    link = entry(name.name, type=tarfile.SYMTYPE, linkname="../shared/layer.tar")
    archive = pack(tmp_path / "x.tar", *members[:2], link, *members[3:], entry("shared/layer.tar", content))
    assert (await load(archive, blobs, platform=AMD64)).diff_ids == PLAIN.diff_ids


async def test_saved_layers_may_be_compressed(blobs: BlobStore, tmp_path: Path) -> None:
    image = await load(pack(tmp_path / "x.tar", *saved(MADE)), blobs, platform=AMD64)
    assert [layer.digest for layer in image.layers] == [layer.digest for layer in MADE.layers]
    assert image.layers[0].media_type == f"{OCI_LAYER}+gzip"


async def test_saved_content_is_verified(blobs: BlobStore, tmp_path: Path) -> None:
    members = saved(PLAIN)
    member, content = members[1]
    members[1] = member, content[:-1] + b"x"
    with pytest.raises(ImageRefused, match="other content"):
        await load(pack(tmp_path / "x.tar", *members), blobs, platform=AMD64)
    assert blobs.find(PLAIN.diff_ids[0]) is None


# Root file systems.


def make_root(place: Path) -> Path:
    (place / "usr" / "bin").mkdir(parents=True)
    (place / "bin").symlink_to("usr/bin")
    (place / "evil").symlink_to("/etc/shadow")
    program = place / "usr" / "bin" / "tool"
    program.write_bytes(b"tool" * 1000)
    program.chmod(0o4755)
    os.link(program, place / "usr" / "bin" / "same")
    os.mkfifo(place / "fifo")
    (place / os.fsdecode(b"caf\xe9")).write_bytes(b"1")
    (place / ("long" * 60)).write_bytes(b"2")
    os.setxattr(place / "usr", "user.note", b"\xff\0x")
    os.setxattr(place / "usr", "user.overlay.opaque", b"y")
    return place


async def unpacked(image: Image, blobs: BlobStore, tmp_path: Path) -> Path:
    wanted: list[tuple[Path, Descriptor, str]] = []
    for layer, diff_id in zip(image.layers, image.diff_ids, strict=True):
        place = blobs.find(layer.digest)
        assert place is not None
        wanted.append((place, layer, diff_id))
    paths = await unpack_layers(LayerStore(tmp_path / "layers"), wanted, None)
    return paths[0]


async def test_a_directory_becomes_an_image(blobs: BlobStore, tmp_path: Path) -> None:
    root = make_root(tmp_path / "root")
    image = await load(root, blobs, reference="mine", platform=AMD64)
    assert image.reference == "mine"
    assert len(image.layers) == 1
    assert image.layers[0].media_type == OCI_LAYER
    assert image.diff_ids == (image.layers[0].digest,)
    tree = await unpacked(image, blobs, tmp_path)
    assert sorted(os.listdir(tree)) == sorted(os.listdir(root))
    assert os.readlink(tree / "evil") == "/etc/shadow"
    assert (tree / "usr/bin/tool").read_bytes() == b"tool" * 1000
    assert (tree / "usr/bin/tool").stat().st_mode & 0o7777 == 0o4755
    assert (tree / "usr/bin/tool").stat().st_ino == (tree / "usr/bin/same").stat().st_ino
    assert stat.S_ISFIFO((tree / "fifo").stat().st_mode)
    assert os.getxattr(tree / "usr", "user.note") == b"\xff\0x"
    assert os.listxattr(tree / "usr") == ["user.note"]
    # Equal trees are equal images.
    again = await load(root, BlobStore(tmp_path / "other"), reference="mine", platform=AMD64)
    assert again == image


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "plain": bytes,
    "gzip": gzip.compress,
    "two gzip members": lambda data: gzip.compress(data[:700]) + gzip.compress(data[700:]),
    "xz": lzma.compress,
    "bzip2": bz2.compress,
    "zstd": zstandard.compress,
    "two bzip2 streams": lambda data: bz2.compress(data[:700]) + bz2.compress(data[700:]),
}


@pytest.mark.parametrize("how", COMPRESSORS)
async def test_an_archive_becomes_an_image(blobs: BlobStore, tmp_path: Path, how: str) -> None:
    content = tar_of({"./usr/bin/x": b"x" * 100_000, "./etc/passwd": b"root:x:0:0\n"})
    (tmp_path / "root.tar").write_bytes(COMPRESSORS[how](content))
    image = await load(tmp_path / "root.tar", blobs, platform=AMD64)
    assert image.diff_ids == (sha256(content),)
    assert is_there(blobs, Blob(OCI_LAYER, content))
    assert left_behind(tmp_path / "blobs") == []
    tree = await unpacked(image, blobs, tmp_path)
    assert (tree / "etc/passwd").read_bytes() == b"root:x:0:0\n"


@pytest.mark.needs("root")
async def test_devices_and_other_file_systems_are_left_out(blobs: BlobStore, tmp_path: Path) -> None:
    root = make_root(tmp_path / "root")
    os.mknod(root / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    (root / "proc").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", str(root / "proc")], check=True)
    try:
        (root / "proc" / "secret").write_bytes(b"x")
        image = await load(root, blobs, platform=AMD64)
    finally:
        subprocess.run(["umount", str(root / "proc")], check=True)
    tree = await unpacked(image, blobs, tmp_path)
    assert list((tree / "proc").iterdir()) == []
    assert not (tree / "null").exists()


async def test_a_name_that_means_a_deletion_is_refused(blobs: BlobStore, tmp_path: Path) -> None:
    (make_root(tmp_path / "root") / "usr" / ".wh.bin").touch()
    with pytest.raises(ImageRefused, match="marks a deletion"):
        await load(tmp_path / "root", blobs, platform=AMD64)


async def test_a_directory_over_the_limits_is_refused(blobs: BlobStore, tmp_path: Path) -> None:
    root = make_root(tmp_path / "root")
    with open(root / "huge", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(ImageRefused, match="more than 10000000 bytes"):
        await load(root, blobs, platform=AMD64, max_bytes=10_000_000)
    (root / "huge").unlink()
    place = root
    for _ in range(250):
        place /= "d"
        place.mkdir()
    with pytest.raises(ImageRefused, match="nested deeper"):
        await load(root, blobs, platform=AMD64)
    assert left_behind(tmp_path / "blobs") == []


# Anything else.


NO_IMAGES: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "found in it: nothing"),
    "a word": (b"hello", "cut off"),
    "noise": (b"x" * 1024, "the archive was refused"),
    "zip": (b"PK\3\4" + bytes(1000), "a zip archive"),
    "program": (b"\x7fELF" + bytes(1000), "a program"),
    "squashfs": (b"hsqs" + bytes(1000), "a squashfs image"),
    "qcow2": (b"QFI\xfb" + bytes(1000), "a qcow2"),
    "another archive": (tar_of({"readme.txt": b"x", "src/main.c": b"y"}), "found in it: readme.txt, src"),
    "a word in gzip": (gzip.compress(b"hello"), "cut off"),
    "another archive in gzip": (gzip.compress(tar_of({"a": b"1"})), "found in it: a"),
    "cut off gzip": (gzip.compress(tar_of({"usr/a": b"1" * 5000}))[:-12], "cut off"),
    "damaged gzip": (b"\x1f\x8b" + b"x" * 100, "damaged"),
    "damaged zstd": (b"\x28\xb5\x2f\xfd" + b"x" * 100, "damaged"),
    "damaged xz": (b"\xfd7zXZ\0" + b"x" * 100, "damaged"),
    "cut off xz": (lzma.compress(tar_of({"usr/a": b"1" * 5000}))[:-20], "cut off"),
    "bzip2 and more": (bz2.compress(tar_of({"a": b"1"})) + b"junk", "damaged"),
}


@pytest.mark.parametrize("kind", NO_IMAGES)
async def test_what_it_is_instead_is_said(blobs: BlobStore, tmp_path: Path, kind: str) -> None:
    content, reason = NO_IMAGES[kind]
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ImageRefused, match=reason):
        await load(tmp_path / "x", blobs, platform=AMD64)
    assert left_behind(tmp_path / "blobs") == []
    assert list((tmp_path / "blobs" / "sha256").iterdir()) == []


async def test_a_root_file_system_that_is_cut_off_is_refused_when_it_is_unpacked(
    blobs: BlobStore, tmp_path: Path
) -> None:
    (tmp_path / "x").write_bytes(tar_of({"usr/a": b"x" * 5000})[:3000])
    image = await load(tmp_path / "x", blobs, platform=AMD64)
    with pytest.raises(ImageRefused, match="cut off"):
        await unpacked(image, blobs, tmp_path)


async def test_what_is_no_file_is_refused(blobs: BlobStore, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "empty").mkdir()
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "Dockerfile").touch()
    with pytest.raises(InvalidRequest, match="neither a file nor a directory"):
        await load(tmp_path / "fifo", blobs)
    with pytest.raises(InvalidRequest, match="can't read"):
        await load(tmp_path / "none", blobs)
    with pytest.raises(ImageRefused, match="found in it: nothing"):
        await load(tmp_path / "empty", blobs)
    with pytest.raises(ImageRefused, match="found in it: Dockerfile"):
        await load(tmp_path / "project", blobs)


async def test_a_bomb_is_cut_off(blobs: BlobStore, tmp_path: Path) -> None:
    content = tar_of({"usr/zeros": b""}) + bytes(30_000_000)
    for name, compress in (("gz", gzip.compress), ("xz", lzma.compress), ("bz2", bz2.compress)):
        (tmp_path / name).write_bytes(compress(content))
        with pytest.raises(ImageRefused, match="too large"):
            await load(tmp_path / name, blobs, platform=AMD64, max_bytes=20_000_000)
    assert left_behind(tmp_path / "blobs") == []


# Hostile archives and layouts.

SECRET = b"the host's secret"


def hostile_members(made: MadeImage, secret: Path) -> dict[str, list[tuple[tarfile.TarInfo, bytes]]]:
    """By what they try."""
    members = saved(made)
    layer = members[1][0].name
    inside = [members[0], *members[2:]]

    def instead(linkname: str, kind: bytes) -> list[tuple[tarfile.TarInfo, bytes]]:
        return [entry(layer, type=kind, linkname=linkname), *inside]

    return {
        "symbolic link outside": instead(str(secret), tarfile.SYMTYPE),
        "symbolic link up": instead("../../../../../../../../../.." + str(secret), tarfile.SYMTYPE),
        "hard link outside": instead(str(secret), tarfile.LNKTYPE),
        "link to a link": [entry("l2", type=tarfile.SYMTYPE, linkname="l3"), *instead("../l2", tarfile.SYMTYPE)],
        "link to itself": instead("layer.tar", tarfile.SYMTYPE),
        "a device": instead("", tarfile.CHRTYPE),
        "a directory": instead("", tarfile.DIRTYPE),
        "layer by absolute path": saved(made, Layers=[str(secret)] * len(made.layers)),
        "layer by upward path": saved(made, Layers=["../" * 20 + str(secret)] * len(made.layers)),
        "configuration outside": saved(made, Config=str(secret)),
        "configuration up": saved(made, Config="../" * 20 + str(secret)),
        "absolute member": [entry("/manifest.json", b"[]"), *members],
        "upward member": [entry("../evil", b"x"), *members],
        "a member twice": [*members, members[1]],
        "manifest twice": [*members, members[-1]],
        "a layer missing": saved(made, Layers=["none/layer.tar"] * len(made.layers)),
        "a layer too few": saved(made, Layers=[layer]),
        "no image": [entry("manifest.json", b"[]")],
        "not a list": [entry("manifest.json", b"{}")],
        "deep JSON": [entry("manifest.json", b"[" * 200_000)],
        "names that are numbers": [entry("manifest.json", b'[{"Config": 1}]')],
        "huge JSON": [entry("manifest.json", b" " * (5 * 1024**2))],
        "too many members": [entry(f"f{number}") for number in range(20_002)],
        "huge extended header": [entry("x" * 80_000, b""), *members],
    }


@pytest.mark.parametrize("attack", hostile_members(PLAIN, Path("/secret")))
@pytest.mark.parametrize("form", ["tar", "directory"])
async def test_hostile_archives_are_refused(blobs: BlobStore, tmp_path: Path, attack: str, form: str) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(SECRET)
    members = hostile_members(PLAIN, secret)[attack]
    place = pack(tmp_path / "x.tar", *members)
    if form == "directory":
        if attack in {"absolute member", "upward member", "too many members", "huge extended header", "a member twice",
                      "manifest twice"}:  # fmt: skip
            # Only an archive can have that.
            return
        place = tmp_path / "directory"
        spread(place, members)
    before = sorted(path for path in tmp_path.rglob("*") if "blobs" not in path.parts)
    with pytest.raises(TartarusError) as refused:
        await load(place, blobs, platform=AMD64)
    assert isinstance(refused.value, (ImageRefused, InvalidRequest)) or refused.value.code == "image_not_found"
    assert "\x1b" not in str(refused.value)
    assert blobs.find(sha256(SECRET)) is None
    assert secret.read_bytes() == SECRET
    assert sorted(path for path in tmp_path.rglob("*") if "blobs" not in path.parts) == before
    assert left_behind(tmp_path / "blobs") == []


def spread(place: Path, members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    """The members as files of a directory."""
    for member, content in members:
        path = place / member.name
        path.parent.mkdir(parents=True, exist_ok=True)
        if member.issym():
            path.symlink_to(member.linkname)
        elif member.islnk():
            os.link(member.linkname, path)
        elif member.isdir():
            path.mkdir()
        elif member.ischr():
            os.mkfifo(path)
        else:
            path.write_bytes(content)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2**20), st.binary(min_size=1, max_size=12)), min_size=1, max_size=4))
def test_no_archive_is_more_than_refused(changes: list[tuple[int, bytes]]) -> None:
    """Bytes of headers overwritten at random; whatever is listed lies inside the archive."""
    content = bytearray(SMALL_ARCHIVE)
    for place, change in changes:
        start = place % (len(content) - len(change))
        content[start : start + len(change)] = change
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.flush()
        try:
            bundle = TarBundle(file.fileno())
        except ImageRefused:
            return
        for name in [*bundle.names(), "manifest.json", "x/layer.tar"]:
            size = bundle.size(name)
            if size is not None:
                read(bundle, name, 2**20)


def spoilt_layout(place: Path, spoil: Callable[[Path], object]) -> Path:
    write_layout(place, MADE)
    spoil(place)
    return place


def blob_at(place: Path, blob: Blob) -> Path:
    return place / "blobs" / "sha256" / blob.digest.removeprefix("sha256:")


def relink(path: Path, target: str) -> None:
    path.unlink()
    path.symlink_to(target)


def nest(place: Path) -> None:
    """index.json → index → index."""
    inner = index_of((MADE, {"os": "linux", "architecture": "amd64"}))
    outer = {"schemaVersion": 2, "manifests": [inner.descriptor(platform={"os": "linux", "architecture": "amd64"})]}
    made = Blob(OCI_INDEX, json.dumps(outer).encode())
    for blob in (inner, made):
        blob_at(place, blob).write_bytes(blob.content)
    (place / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [made.descriptor()]}))


LAYOUTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "layer is a link": (lambda place: relink(blob_at(place, MADE.layers[0]), "/etc/shadow"), "can't be used"),
    "blobs is a link": (
        lambda place: ((place / "blobs").rename(place / "b"), (place / "blobs").symlink_to("b")),
        "can't be used",
    ),
    "index is a link": (lambda place: relink(place / "index.json", "/etc/shadow"), "can't be used"),
    "layer is a fifo": (
        lambda place: (blob_at(place, MADE.layers[0]).unlink(), os.mkfifo(blob_at(place, MADE.layers[0]))),
        "not a file",
    ),
    "layer is spoilt": (
        lambda place: blob_at(place, MADE.layers[0]).write_bytes(b"x" * len(MADE.layers[0].content)),
        "other content",
    ),
    "layer is cut off": (lambda place: os.truncate(blob_at(place, MADE.layers[0]), 10), "shorter"),
    "layer is longer": (lambda place: os.truncate(blob_at(place, MADE.layers[0]), 10**9), "longer"),
    "layer is missing": (lambda place: blob_at(place, MADE.layers[0]).unlink(), "lacks"),
    "manifest is spoilt": (
        lambda place: blob_at(place, MADE.manifest).write_bytes(MADE.manifest.content + b" "),
        "not what its digest",
    ),
    "configuration is spoilt": (lambda place: blob_at(place, MADE.config).write_bytes(b"{}"), "shorter|other content"),
    "no index": (lambda place: (place / "index.json").unlink(), "can't be read: it is missing"),
    "index is a manifest": (lambda place: (place / "index.json").write_bytes(MADE.manifest.content), "not an index"),
    "index is empty": (
        lambda place: (place / "index.json").write_text('{"schemaVersion": 2, "manifests": []}'),
        "no image",
    ),
    "unknown version": (
        lambda place: (place / "oci-layout").write_text('{"imageLayoutVersion": "9"}'),
        "unknown version",
    ),
    "index in index in index": (nest, "another index"),
}


@pytest.mark.parametrize("attack", LAYOUTS)
async def test_hostile_layouts_are_refused(blobs: BlobStore, tmp_path: Path, attack: str) -> None:
    spoil, reason = LAYOUTS[attack]
    place = spoilt_layout(tmp_path / "layout", spoil)
    with pytest.raises(TartarusError, match=reason):
        await load(place, blobs, platform=AMD64)
    assert left_behind(tmp_path / "blobs") == []
    assert blobs.find(MADE.manifest.digest) is None or attack.startswith(("layer", "configuration"))


async def test_another_platform_s_image_is_refused(blobs: BlobStore, tmp_path: Path) -> None:
    place = write_layout(tmp_path / "layout", MADE)
    with pytest.raises(ImageRefused, match="for linux/amd64, not for linux/arm64"):
        await load(place, blobs, platform=Platform("linux", "arm64"))
