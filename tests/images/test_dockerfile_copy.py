"""COPY, ADD and WORKDIR make layers: where files land, whose they are, and what hostile stacks and archives can't do."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import shutil
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.images.dockerfiles import UID_BASE, Bench, accounts, entry_of, files_of, tree_of

from tartarus.images.dockerfile import CopyLimits
from tartarus.model.errors import BuildFailed, NoSpace

pytestmark = pytest.mark.anyio


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    yield Bench(tmp_path)
    for folder, folders, _ in os.walk(tmp_path):
        for name in folders:
            if not (Path(folder) / name).is_symlink():
                (Path(folder) / name).chmod(0o755)


async def refused(bench: Bench, dockerfile: str, **options) -> str:
    with pytest.raises(BuildFailed) as caught:
        await bench.build(dockerfile, **options)
    assert [path.name for path in bench.place.joinpath("layers").iterdir() if path.name.startswith(".")] == []
    return str(caught.value)


# Where files land: the sentences of Docker's reference on COPY.


@pytest.mark.parametrize(
    ("copy", "expected"),
    [
        ("COPY a /x", {"/x": "a"}),
        ("COPY a /x/", {"/x/a": "a"}),
        ("COPY a x", {"/x": "a"}),
        ("COPY a b /x/", {"/x/a": "a", "/x/b": "b"}),
        ("COPY d /x", {"/x/e": "d/e", "/x/f/g": "d/f/g"}),
        ("COPY d/ /x/", {"/x/e": "d/e", "/x/f/g": "d/f/g"}),
        ("COPY d /", {"/e": "d/e", "/f/g": "d/f/g"}),
        ("COPY d b /x/", {"/x/e": "d/e", "/x/f/g": "d/f/g", "/x/b": "b"}),
        ("COPY * /x/", {"/x/a": "a", "/x/b": "b", "/x/e": "d/e", "/x/f/g": "d/f/g"}),
        ("COPY d/* /x/", {"/x/e": "d/e", "/x/g": "d/f/g"}),
        ("COPY a .", {"/a": "a"}),
        ("WORKDIR /w\nCOPY a .", {"/w/a": "a"}),
        ("WORKDIR /w\nCOPY a sub/", {"/w/sub/a": "a"}),
        ("WORKDIR /w\nCOPY a ../x", {"/x": "a"}),
        ("WORKDIR /w\nWORKDIR v\nCOPY a ./", {"/w/v/a": "a"}),
        ("WORKDIR /w\nCOPY a /w", {"/w/a": "a"}),
        ("COPY a /../../x", {"/x": "a"}),
        ("ARG N=a\nENV T=/t\nCOPY ${N} $T/", {"/t/a": "a"}),
        ("COPY a /x\nCOPY b /x", {"/x": "b"}),
        ("COPY <<EOF /x\n1 $HOME\nEOF\n", {"/x": "1 \n"}),
        ("ENV A=2\nCOPY <<one <<'two' b /d/\n'$A'\none\n$A\ntwo\n", {"/d/one": "'2'\n", "/d/two": "$A\n", "/d/b": "b"}),
        ('COPY ["a", "/with space"]', {"/with space": "a"}),
    ],
)
async def test_where_files_land(bench: Bench, copy, expected):
    bench.write("a", "b", "d/e", "d/f/g")
    built = await bench.build(f"FROM scratch\n{copy}\n")
    assert files_of(built.layers) == expected


@pytest.mark.parametrize(
    ("copy", "message"),
    [
        ("COPY a b /x", "end it with a slash"),
        ("COPY none /x", "'none' is not in the build context"),
        ("COPY n* /x/", "'n\\*' is not in the build context"),
        ("COPY a /x\nCOPY a /x/y", "'/x' is no directory"),
        ("COPY a /x\nCOPY d /x", "'/x' is no directory"),
        ("COPY a /x/e\nCOPY <<e /x/\ne\nCOPY d /x/e", "is no directory"),
        ("COPY a /x/f\nCOPY d /x", "a directory can't take the place of '/x/f'"),
        ("COPY d /x/e\nCOPY d /x", "a file can't take the place of the directory '/x/e'"),
        ("COPY --chmod=u+x a /x", "octal"),
        ("COPY --chown=app a /x", "use numbers"),
        ("COPY --chown=65536 a /x", "0 to 65535"),
        ("COPY a /" + "x" * 300, "too long"),
        ("COPY a $NONE", "the destination is empty"),
        ("WORKDIR /w\nCOPY a /w/y\nWORKDIR y", "'/w/y' is no directory"),
    ],
)
async def test_what_is_refused(bench: Bench, copy, message):
    bench.write("a", "b", "d/e", "d/f/g")
    with pytest.raises(BuildFailed, match=message):
        await bench.build(f"FROM scratch\n{copy}\n")


async def test_without_a_context_only_files_in_the_dockerfile(bench: Bench):
    built = await bench.build("FROM scratch\nCOPY <<EOF /x\n1\nEOF\n", context=None)
    assert files_of(built.layers) == {"/x": "1\n"}
    assert "no context" in await refused(bench, "FROM scratch\nCOPY a /\n", context=None)


async def test_modes_times_and_links_are_kept(bench: Bench):
    bench.write("d/run", "d/plain")
    (bench.context / "d/run").chmod(0o4751)
    (bench.context / "d/plain").chmod(0o600)
    (bench.context / "d/sub").mkdir(mode=0o750)
    (bench.context / "d/sub").chmod(0o2750)
    (bench.context / "d/link").symlink_to("/etc/anywhere")
    for name in ("run", "sub"):
        os.utime(bench.context / "d" / name, (10**9, 10**9))
    built = await bench.build("FROM scratch\nCOPY d /x\nCOPY --chmod=1644 d/run /y\n")
    # No sandbox honours set-id bits of files: they are dropped. A directory's says who its files belong to.
    assert [oct(entry_of(built.layers, f"/x/{name}").mode) for name in ("run", "plain", "sub")] == [
        "0o751",
        "0o600",
        "0o2750",
    ]
    assert oct(entry_of(built.layers, "/y").mode) == "0o1644"
    assert entry_of(built.layers, "/x/link").target == "/etc/anywhere"
    assert [entry_of(built.layers, f"/x/{name}").mtime_ns for name in ("run", "sub")] == [10**18, 10**18]
    # A new directory has its source's mode only below the destination, which is 0755.
    assert oct(entry_of(built.layers, "/x").mode) == "0o755"


@pytest.mark.needs("root")
async def test_owners(bench: Bench):
    bench.write("a", "d/e")
    os.chown(bench.context / "a", 4321, 4321)
    bench.base("base", accounts)
    built = await bench.build(
        "FROM base\n"
        "COPY a /root/a\n"
        "COPY --chown=app a d /new/dir/\n"
        "COPY --chown=app:wheel a /wheel\n"
        "COPY --chown=33 a /number\n"
        "COPY --chown=33:staff a /mixed\n"
        "COPY --chown=7:8 a /root/seven\n"
        "ADD --chown=app d /new/\n"
    )
    owners = {path: entry_of(built.layers, path)[3:5] for path in tree_of(built.layers)}
    assert owners["/root"] == owners["/root/a"] == (0, 0)
    # As BuildKit has it: the directories that it makes on the way belong to the same user.
    assert owners["/new"] == owners["/new/dir"] == owners["/new/dir/a"] == owners["/new/dir/e"] == (1000, 50)
    assert owners["/wheel"] == (1000, 10)
    assert owners["/number"] == (33, 33)
    assert owners["/mixed"] == (33, 50)
    assert owners["/root/seven"] == (7, 8)
    assert owners["/etc"] == (0, 0)
    assert UID_BASE is not None
    assert os.stat(built.layers[0]).st_uid == UID_BASE


async def test_owners_that_the_image_does_not_have(bench: Bench):
    bench.write("a")
    bench.base("base", accounts)
    for spec, message in {
        "nobody": "no user 'nobody'",
        "app:none": "no group 'none'",
        "app:": "incomplete",
        ":staff": "incomplete",
        "70000": "0 to 65535",
        "0:70000": "0 to 65535",
    }.items():
        assert message in await refused(bench, f"FROM base\nCOPY --chown={spec} a /x\n")


async def test_account_files_that_are_no_account_files(bench: Bench, tmp_path: Path):
    bench.write("a")
    secret = tmp_path / "secret"
    secret.write_text("app:x:1:1::/:/bin/sh\n")

    def link(tree: Path) -> None:
        (tree / "etc").mkdir()
        (tree / "etc/passwd").symlink_to(secret)

    def pipe(tree: Path) -> None:
        (tree / "etc").mkdir()
        os.mkfifo(tree / "etc/passwd")

    bench.base("link", link)
    bench.base("pipe", pipe)
    assert "no user 'app'" in await refused(bench, "FROM link\nCOPY --chown=app a /x\n")
    assert "no account file" in await refused(bench, "FROM pipe\nCOPY --chown=app a /x\n")


# Through the stack's links.


def merged_usr(tree: Path) -> None:
    (tree / "usr/lib").mkdir(parents=True)
    (tree / "usr/lib").chmod(0o711)
    (tree / "usr/lib/old").write_text("old")
    (tree / "lib").symlink_to("usr/lib")
    (tree / "absolute").symlink_to("/usr/lib")
    (tree / "up").symlink_to("../../../../usr")
    (tree / "dangling").symlink_to("/nowhere")
    (tree / "loop").symlink_to("loop")
    (tree / "tofile").symlink_to("usr/lib/old")


@pytest.mark.parametrize(
    ("copy", "lands"),
    [
        ("COPY a /lib/a", "/usr/lib/a"),
        ("COPY a /lib", "/usr/lib/a"),
        ("COPY a /lib/", "/usr/lib/a"),
        ("COPY a /absolute/a", "/usr/lib/a"),
        ("COPY a /up/lib/sub/a", "/usr/lib/sub/a"),
        ("COPY rootfs /", "/usr/lib/inside"),
        ("WORKDIR /lib/work\nCOPY a .", "/usr/lib/work/a"),
        ("ADD one.tar /", "/usr/lib/packed"),
        ("COPY a /tofile", "/usr/lib/old"),
        ("COPY a /dangling", "/dangling"),
        ("COPY a /nowhere/x", "/nowhere/x"),
    ],
)
async def test_links_of_lower_layers_are_followed(bench: Bench, copy, lands):
    bench.write("a", "rootfs/lib/inside")
    pack(bench.context / "one.tar", [file("lib/", kind=tarfile.DIRTYPE), file("lib/packed", b"x")])
    bench.base("base", merged_usr)
    built = await bench.build(f"FROM base\n{copy}\n")
    assert lands in files_of(built.layers)
    assert entry_of(built.layers, lands).layer == 0
    # In the new layer there is what is new, and the directories that lead to it, as they were.
    assert entry_of(built.layers, "/lib").kind == "symlink"
    if lands.startswith("/usr/lib") and "rootfs" not in copy and "ADD" not in copy:
        assert oct(entry_of(built.layers, "/usr/lib").mode) == "0o711"
    assert files_of(built.layers)["/usr/lib/old"] == ("a" if lands == "/usr/lib/old" else "old")


async def test_a_link_in_a_circle_leads_nowhere(bench: Bench):
    bench.write("a")
    bench.base("base", merged_usr)
    for target in ("/loop", "/loop/x", "/loop/"):
        assert "leads nowhere" in await refused(bench, f"FROM base\nCOPY a {target}\n")


async def test_whiteouts_and_opaque_directories_of_the_stack(bench: Bench):
    bench.write("a")
    bench.base("low", merged_usr)

    def hide(tree: Path) -> None:
        (tree / "usr").mkdir()
        os.setxattr(tree / "usr", "user.overlay.opaque", b"y")

    bench.base("base on low", hide)
    built = await bench.build("FROM base\nCOPY a /lib/x\n")
    assert files_of(built.layers)["/usr/lib/x"] == "a"
    # The directory that is hidden below is not the one that was made.
    assert oct(entry_of(built.layers, "/usr/lib").mode) == "0o755"
    assert "/usr/lib/old" not in files_of(built.layers)


@pytest.mark.needs("root")
async def test_a_link_that_was_removed_is_not_followed(bench: Bench):
    bench.write("a")
    bench.base("low", merged_usr)
    bench.base("base on low", lambda tree: os.mknod(tree / "lib", stat.S_IFCHR, os.makedev(0, 0)))
    built = await bench.build("FROM base\nCOPY a /lib/x\n")
    assert files_of(built.layers)["/lib/x"] == "a"


async def test_links_of_the_stack_do_not_lead_out(bench: Bench, tmp_path: Path):
    """Each way out of a root file system, taken by COPY, ADD, WORKDIR and files in the Dockerfile."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "victim").write_text("untouched")
    before = sorted(path.name for path in outside.iterdir())

    def traps(tree: Path) -> None:
        (tree / str(outside).lstrip("/")).mkdir(parents=True)
        (tree / "d").symlink_to(outside)
        (tree / "up").symlink_to("../" * 30 + str(outside).lstrip("/"))
        (tree / "victim").symlink_to(outside / "victim")
        (tree / "p").symlink_to("/proc/self/root")

    bench.base("base", traps)
    bench.write("victim", "s/d/victim", "s/victim", content="overwritten")
    (bench.context / "s/up").symlink_to(outside)
    pack(bench.context / "t.tar", [file("d/victim", b"overwritten"), file("victim", b"overwritten")])
    for copy in (
        "COPY victim /d/victim",
        "COPY victim /d",
        "COPY victim /d/",
        "COPY victim /up/victim",
        "COPY victim /victim",
        f"COPY victim /p{outside}/victim",
        "COPY s /",
        "ADD t.tar /",
        "WORKDIR /d\nCOPY victim .",
        "WORKDIR /d/made\nWORKDIR ../../..\nCOPY victim ./victim",
        "COPY <<victim /d/\noverwritten\nvictim",
        "COPY victim /../../../../../../../../d/victim",
    ):
        built = await bench.build(f"FROM base\n{copy}\n")
        assert "overwritten" in "".join(files_of(built.layers).values())
        assert (outside / "victim").read_text() == "untouched"
        assert sorted(path.name for path in outside.iterdir()) == before


async def test_a_link_that_this_copy_made_leads_inside_too(bench: Bench, tmp_path: Path):
    outside = tmp_path / "outside"
    outside.mkdir()
    bench.write("two/way/victim")
    (bench.context / "one").mkdir()
    (bench.context / "one/way").symlink_to(outside)
    assert "it is a symlink" in await refused(bench, "FROM scratch\nCOPY one two /\n")
    built = await bench.build(f"FROM scratch\nWORKDIR {outside}\nCOPY one two /\n")
    assert list(outside.iterdir()) == []
    assert files_of(built.layers) == {"/way": f"-> {outside}", f"{outside}/victim": "two/way/victim"}


# From stages.


async def test_from_a_stage_and_an_image(bench: Bench):
    bench.write("a", "d/e")
    bench.base("tools", lambda tree: (tree / "tool").write_text("tool"))
    built = await bench.build(
        "FROM scratch AS one\nCOPY a d /made/\nCOPY a /gone\n"
        "FROM scratch\nCOPY --from=one /made /x\nCOPY --from=0 made/a /y\nCOPY --from=tools tool /\n"
        "COPY --from=one /ma* /z/\n"
    )
    assert files_of(built.layers) == {
        "/x/a": "a", "/x/e": "d/e", "/y": "a", "/tool": "tool", "/z/a": "a", "/z/e": "d/e",
    }  # fmt: skip


@pytest.mark.needs("root")
async def test_a_stage_s_files_keep_their_owner(bench: Bench):
    bench.write("a")
    built = await bench.build(
        "FROM scratch AS one\nCOPY --chown=5:6 a /o/a\n"
        "FROM scratch\nCOPY --from=one /o /x/\nCOPY --from=one --chown=9 /o/a /y\n"
    )
    assert entry_of(built.layers, "/x/a")[3:5] == (5, 6)
    assert entry_of(built.layers, "/y")[3:5] == (9, 9)


async def test_a_stage_is_read_through_its_own_links_only(bench: Bench, tmp_path: Path):
    secret = tmp_path / "secret"
    secret.write_text("secret")

    def traps(tree: Path) -> None:
        (tree / "out").symlink_to(secret)
        (tree / "up").symlink_to("../" * 30 + str(secret).lstrip("/"))
        os.mkfifo(tree / "pipe")

    bench.base("trap", traps)
    for source, message in {"out": "is not in the image 'trap'", "up": "is not in", "pipe": "named pipe"}.items():
        assert message in await refused(bench, f"FROM scratch\nCOPY --from=trap {source} /x\n")
    assert "has no files" in await refused(bench, "FROM scratch AS none\nFROM scratch\nCOPY --from=none / /\n")


async def test_a_stage_s_dockerignore_is_a_file_like_any(bench: Bench):
    bench.write("a")
    built = await bench.build(
        "FROM scratch AS one\nCOPY <<EOF /d/.dockerignore\n*\nEOF\nCOPY a /d/\nFROM scratch\nCOPY --from=one /d /\n"
    )
    assert "/a" in files_of(built.layers)


# ADD's archives.


def file(name: str, content: bytes = b"", *, kind: bytes = tarfile.REGTYPE, **facts) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type = kind
    info.size = len(content)
    info.mode = 0o755 if kind == tarfile.DIRTYPE else 0o644
    for key, value in facts.items():
        setattr(info, key, value)
    return info, content


def packed(members: list[tuple[tarfile.TarInfo, bytes]], style: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=style) as archive:
        for info, content in members:
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def pack(path: Path, members: list[tuple[tarfile.TarInfo, bytes]], style: int = tarfile.PAX_FORMAT) -> None:
    path.write_bytes(packed(members, style))


@pytest.mark.parametrize(
    "compress",
    [
        bytes,
        gzip.compress,
        bz2.compress,
        lzma.compress,
        lambda data: gzip.compress(data[:700]) + gzip.compress(data[700:]),
    ],
    ids=["plain", "gzip", "bzip2", "xz", "two gzips"],
)
@pytest.mark.parametrize("style", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
async def test_add_takes_archives_apart(bench: Bench, compress, style):
    name = "long/" * 18 + "name"
    data = packed(
        [
            file("d/", kind=tarfile.DIRTYPE, mode=0o700),
            file("./d/x", b"content", mode=0o4750, mtime=10**9),
            file("d/link", kind=tarfile.SYMTYPE, linkname="x"),
            file("d/hard", kind=tarfile.LNKTYPE, linkname="d/x"),
            file("/absolute", b"1"),
            file(name, b"2" * 100_000),
            file("d/x", b"replaced"),
        ],
        style,
    )
    # What it is, is told by its content, whatever its name.
    (bench.context / "archive.txt").write_bytes(compress(data))
    built = await bench.build("FROM scratch\nADD archive.txt /to\nCOPY archive.txt /as-it-is\n")
    shown = files_of(built.layers)
    del shown["/as-it-is"]
    assert shown == {
        "/to/d/x": "replaced",
        "/to/d/link": "-> x",
        "/to/d/hard": "content",
        "/to/absolute": "1",
        f"/to/{name}": "2" * 100_000,
    }
    assert oct(entry_of(built.layers, "/to/d/hard").mode) == "0o750"
    assert entry_of(built.layers, "/to/d/hard").mtime_ns == 10**18
    assert oct(entry_of(built.layers, "/to/d").mode) == "0o700"


async def test_what_is_no_archive_is_copied(bench: Bench):
    contents = {
        "empty": b"",
        "text": b"x" * 2_000,
        "text.gz": gzip.compress(b"x" * 2_000),
        "bad.gz": b"\x1f\x8b\x08bad",
    }
    contents |= {"zeros": bytes(10_240), "bad.xz": b"\xfd7zXZ\x00bad", "bad.bz2": b"BZhbad"}
    for name, content in contents.items():
        (bench.context / name).write_bytes(content)
    built = await bench.build("FROM scratch\nADD * /x/\n")
    assert {path.name: path.read_bytes() for path in (built.layers[0] / "x").iterdir()} == contents


@pytest.mark.needs("root")
async def test_an_archive_s_owners(bench: Bench):
    pack(bench.context / "a.tar", [file("mine", uid=5, gid=6), file("root")])
    built = await bench.build("FROM scratch\nADD a.tar /x\nADD --chown=7 a.tar /y\n")
    assert [entry_of(built.layers, path)[3:5] for path in ("/x/mine", "/x/root", "/y/mine")] == [(5, 6), (0, 0), (7, 7)]


def headers(count: int) -> bytes:
    """So many extended headers, each for the one that follows."""
    info = tarfile.TarInfo("././@PaxHeader")
    info.type = tarfile.XHDTYPE
    record = b"11 path=ab\n"
    info.size = len(record)
    return (info.tobuf(tarfile.USTAR_FORMAT) + record.ljust(512, b"\0")) * count


def huge_header(kind: bytes) -> bytes:
    info = tarfile.TarInfo("x")
    info.type = kind
    info.size = 1 << 31
    return info.tobuf(tarfile.GNU_FORMAT)


def overwritten(data: bytes, at: int, new: bytes) -> bytes:
    """A header with a field changed, and its checksum made right again."""
    block = bytearray(data)
    block[at : at + len(new)] = new
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block[:512])
    return bytes(block)


HOSTILE = {
    "dots": packed([file("../x", b"1")]),
    "inner dots": packed([file("a/../../x", b"1")]),
    "hard link out": packed([file("x", kind=tarfile.LNKTYPE, linkname="../../../etc/passwd")]),
    "hard link to nothing": packed([file("x", kind=tarfile.LNKTYPE, linkname="/etc/passwd")]),
    "hard link to a link": packed(
        [file("l", kind=tarfile.SYMTYPE, linkname="/etc/passwd"), file("x", kind=tarfile.LNKTYPE, linkname="l")]
    ),
    "device": packed([file("x", kind=tarfile.CHRTYPE, devmajor=1, devminor=3)]),
    "block device": packed([file("x", kind=tarfile.BLKTYPE, devmajor=8)]),
    "whiteout": packed([file("x", kind=tarfile.CHRTYPE)]),
    "pipe": packed([file("x", kind=tarfile.FIFOTYPE)]),
    "unknown kind": overwritten(packed([file("x")]), 156, b"\x01"),
    "owner": packed([file("x", uid=70_000)]),
    "negative owner": packed([file("x", uid=-1)], tarfile.GNU_FORMAT),
    "negative size": overwritten(packed([file("x")]), 124, b"\xff" * 12),
    "huge size": overwritten(packed([file("x")]), 124, b"77777777777\0"),
    "truncated": packed([file("x", b"1" * 5_000)])[:2_000],
    "damaged in the middle": packed([file("x"), file("y")])[:512] + b"garbage" * 200,
    "headers for headers": headers(3_000) + packed([file("x")]),
    "huge long name": gzip.compress(huge_header(tarfile.GNUTYPE_LONGNAME) + bytes(2 << 20)),
    "huge extended header": gzip.compress(huge_header(tarfile.XHDTYPE) + bytes(2 << 20)),
    "huge global header": gzip.compress(huge_header(tarfile.XGLTYPE) + bytes(2 << 20)),
    "odd extended header": packed([file("x", pax_headers={"size": "9" * 30})]),
    "not a number": packed([file("x", pax_headers={"mtime": "nan"})]),
    "NUL in a name": packed([file("x", pax_headers={"path": "a\0b"})]),
    "sparse": packed([file("x", b"1", pax_headers={"GNU.sparse.map": "0,1", "GNU.sparse.size": "10"})]),
    "file for a directory": packed([file("a/b", b"1"), file("a", b"1")]),
    "directory for a file": packed([file("a", b"1"), file("a/", kind=tarfile.DIRTYPE)]),
    "below a file": packed([file("a", b"1"), file("a/b", b"1")]),
    "loop": packed([file("a", kind=tarfile.SYMTYPE, linkname="a"), file("a/b", b"1")]),
    "long name": packed([file("x" * 300, b"1")]),
    "bomb": gzip.compress(packed([file("x", bytes(3 << 20))])),
    "many": gzip.compress(packed([file(f"x{number}") for number in range(2_000)])),
    "gzip with an endless name": b"\x1f\x8b\x08\x08" + bytes(6) + b"n" * (2 << 20),
    "gzip of nothing, many times": gzip.compress(b"") * 50_000,
    "truncated gzip": gzip.compress(packed([file("x", os.urandom(50_000))]))[:20_000],
    "truncated xz": lzma.compress(packed([file("x", os.urandom(50_000))]))[:20_000],
    "xz that wants memory": lzma.compress(
        packed([file("x", b"1")]), filters=[{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 1 << 29}]
    ),
}


NO_ARCHIVE = {"xz that wants memory", "gzip with an endless name", "gzip of nothing, many times"}


@pytest.mark.parametrize("name", HOSTILE)
async def test_a_hostile_archive_is_refused_or_contained(bench: Bench, tmp_path: Path, name):
    (bench.context / "archive").write_bytes(HOSTILE[name])
    limits = CopyLimits(entries=1_000, bytes=3 << 20)
    try:
        built = await bench.build("FROM scratch\nADD archive /to/\n", limits=limits)
    except BuildFailed as error:
        message = str(error)
    else:
        # What is no archive at its first header is a file like any other.
        message = ""
        assert tree_of(built.layers).keys() == {"/to", "/to/archive"}
    assert bool(message) == (name not in NO_ARCHIVE)
    assert not message or "the archive 'archive'" in message or name == "long name"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["context", "layers"]


async def test_an_archive_s_links_lead_inside(bench: Bench, tmp_path: Path):
    outside = tmp_path / "outside"
    outside.mkdir()
    for number, target in enumerate(
        [str(outside), "../" * 30 + str(outside).lstrip("/"), "/proc/self/root" + str(outside)]
    ):
        pack(
            bench.context / f"{number}.tar",
            [file("way", kind=tarfile.SYMTYPE, linkname=target), file("way/victim", b"1")],
        )
        built = await bench.build(f"FROM scratch\nADD {number}.tar /\n")
        assert "1" in files_of(built.layers).values()
    assert list(outside.iterdir()) == []


# The layer itself.


async def test_only_what_is_new_is_in_the_layer(bench: Bench):
    bench.write("a")
    bench.base("base", merged_usr)
    built = await bench.build("FROM base\nCOPY a /usr/lib/a\n")
    assert sorted(str(path.relative_to(built.layers[0])) for path in built.layers[0].rglob("*")) == [
        "usr", "usr/lib", "usr/lib/a",
    ]  # fmt: skip


async def test_a_directory_that_is_there_needs_no_layer(bench: Bench):
    bench.base("base", merged_usr)
    built = await bench.build("FROM base\nWORKDIR /lib\nWORKDIR /\nWORKDIR /new/dir\n")
    assert len(built.layers) == 2
    assert built.config.workdir == "/new/dir"


@pytest.mark.needs("root")
async def test_a_workdir_is_the_user_s(bench: Bench):
    bench.base("base", accounts)
    built = await bench.build("FROM base\nUSER app\nWORKDIR /home/app\n")
    assert [entry_of(built.layers, path)[3:5] for path in ("/home", "/home/app")] == [(1000, 50)] * 2


@pytest.mark.needs("not-root")
async def test_without_ids_nothing_is_made_that_could_not_be_removed(bench: Bench):
    bench.write("d/e")
    (bench.context / "d").chmod(0o500)
    built = await bench.build("FROM scratch\nCOPY . /\nCOPY --chmod=000 d/e /f\n")
    shutil.rmtree(built.layers[0])


@pytest.mark.needs("root")
async def test_a_full_disk_leaves_nothing(bench: Bench, tmp_path: Path):
    place = tmp_path / "small"
    place.mkdir()
    assert os.system(f"mount -t tmpfs -o size=1m none {place}") == 0
    try:
        bench.store = type(bench.store)(place / "layers")
        bench.write("big", content="x" * 2_000_000)
        with pytest.raises(NoSpace):
            await bench.build("FROM scratch\nCOPY big /\n")
        assert list((place / "layers").iterdir()) == []
    finally:
        os.system(f"umount {place}")
