"""A stack of layers without a mount: what overlayfs shows is what the view shows, whatever lies in the layers."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tartarus.images.stackview import Entry, StackView
from tartarus.model.errors import ImageRefused

needs_root = pytest.mark.needs("root")

# Lists a mounted overlay, and resolves paths in it with the kernel's own walk (openat2, RESOLVE_IN_ROOT).
ORACLE = """
import ctypes, errno, json, os, stat, sys
class How(ctypes.Structure):
    _fields_ = [("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64)]
libc = ctypes.CDLL(None, use_errno=True)
def resolve(root, path, flags):
    how = How(os.O_PATH | flags, 0, 0x10)
    fd = libc.syscall(437, root, path.encode(), ctypes.byref(how), ctypes.c_size_t(24))
    return None if fd < 0 else fd
def told(fd):
    status = os.fstat(fd)
    kind = {stat.S_IFDIR: "dir", stat.S_IFREG: "file", stat.S_IFLNK: "symlink", stat.S_IFIFO: "fifo"}[stat.S_IFMT(status.st_mode)]
    text = ""
    if kind == "symlink": text = os.readlink("", dir_fd=fd)
    if kind == "file": text = open(f"/proc/self/fd/{fd}").read()
    return [kind, stat.S_IMODE(status.st_mode), text]
job = json.load(sys.stdin)
options = "userxattr,lowerdir=" + ":".join(job["layers"])
if libc.mount(b"overlay", job["at"].encode(), b"overlay", 0, options.encode()): sys.exit(os.strerror(ctypes.get_errno()))
root = os.open(job["at"], os.O_PATH)
tree = {}
for top, dirs, files in os.walk(job["at"]):
    for name in dirs + files:
        path = os.path.join(top, name)[len(job["at"]):]
        fd = resolve(root, path, os.O_NOFOLLOW)
        # overlayfs lists a whiteout in a directory that only one layer has, and then says it isn't there.
        if fd is not None: tree[path] = told(fd); os.close(fd)
found = {}
for path in job["paths"]:
    for follow in (True, False):
        fd = resolve(root, path, 0 if follow else os.O_NOFOLLOW)
        found[f"{path} {follow}"] = None if fd is None else told(fd)
        if fd is not None: os.close(fd)
json.dump([tree, found], sys.stdout)
"""

NAMES = st.sampled_from(["a", "b", "c"])
TARGETS = st.sampled_from(
    [
        "a",
        "b",
        "c",
        "/a",
        "/b/c",
        "../a",
        "../../b",
        "/",
        ".",
        "..",
        "a/b",
        "/c/../a",
        "../../../../../etc",
        "/a/",
        "b/.",
    ]
)
LEAF = st.one_of(
    st.tuples(st.just("file"), st.sampled_from(["", "one", "two"])),
    st.tuples(st.just("symlink"), TARGETS),
    st.tuples(st.just("whiteout"), st.just("")),
    st.tuples(st.just("fifo"), st.just("")),
)
TREE = st.recursive(
    LEAF,
    lambda inner: st.tuples(st.sampled_from(["dir", "dir", "opaque"]), st.dictionaries(NAMES, inner, max_size=3)),
    max_leaves=8,
)
LAYER = st.dictionaries(NAMES, TREE, max_size=3)
PATHS = st.lists(st.lists(st.sampled_from(["a", "b", "c", "..", ".", ""]), max_size=5).map("/".join), max_size=12)


def write(place: Path, tree: dict[str, Any]) -> None:
    for name, (kind, what) in tree.items():
        path = place / name
        if kind == "file":
            path.write_text(what)
        elif kind == "symlink":
            path.symlink_to(what)
        elif kind == "whiteout":
            os.mknod(path, 0o020000, 0)
        elif kind == "fifo":
            os.mkfifo(path)
        else:
            path.mkdir()
            if kind == "opaque":
                os.setxattr(path, "user.overlay.opaque", b"y")
            write(path, what)


def told(view: StackView, entry: Entry | None) -> list[Any] | None:
    if entry is None:
        return None
    text = entry.target if entry.kind == "symlink" else ""
    if entry.kind == "file":
        text = view.read(entry.path, 100).decode()
    return [entry.kind, entry.mode, text]


@pytest.fixture(scope="module")
def ground() -> Iterator[Path]:
    # tmpfs may not keep user.* attributes, so these live where the daemon's layers do.
    place = Path(tempfile.mkdtemp(prefix="stackview-", dir="/var/tmp"))
    yield place
    shutil.rmtree(place)


@needs_root
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(layers=st.lists(LAYER, min_size=1, max_size=4), paths=PATHS)
def test_shows_what_a_real_overlay_shows(ground: Path, layers: list[dict[str, Any]], paths: list[str]) -> None:
    with tempfile.TemporaryDirectory(dir=ground) as folder:
        stack = []
        for number, tree in enumerate([*layers, {}]):  # overlayfs wants two at least
            stack.append(Path(folder, f"l{number}"))
            stack[-1].mkdir()
            write(stack[-1], tree)
        merged = Path(folder, "merged")
        merged.mkdir()
        job = {"layers": [str(layer) for layer in stack], "at": str(merged), "paths": [path or "/" for path in paths]}
        done = subprocess.run(
            ["unshare", "--mount", sys.executable, "-I", "-S", "-c", ORACLE],
            input=json.dumps(job), capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        tree, found = json.loads(done.stdout)

        with StackView(stack) as view:
            seen: dict[str, list[Any] | None] = {}
            for step in view.walk():
                listed = view.listdir(step.path)
                for name in listed:
                    path = f"{step.path.rstrip('/')}/{name}"
                    seen[path] = told(view, view.resolve(path, follow=False))
                assert [*step.dirs, *step.files, *step.links] == [
                    name
                    for kind in ("dir", "file", "symlink")
                    for name in listed
                    if (seen[f"{step.path.rstrip('/')}/{name}"] or [None])[0] == kind
                ]
            assert seen == tree
            for path in job["paths"]:
                for follow in (True, False):
                    assert told(view, view.resolve(path, follow=follow)) == found[f"{path} {follow}"], (path, follow)


@pytest.fixture
def layer(tmp_path: Path) -> Path:
    place = tmp_path / "layer"
    place.mkdir()
    return place


class TestNeverLeavesTheRoot:
    def test_links_of_every_kind_stay_inside(self, tmp_path: Path, layer: Path) -> None:
        (tmp_path / "secret").write_text("bait")
        (layer / "etc").mkdir()
        for name, target in {
            "absolute": str(tmp_path / "secret"), "climbing": "../../../secret", "chain": "climbing",
            "up": "..", "proc": "/proc/self/root/etc/shadow",
        }.items():  # fmt: skip
            (layer / "etc" / name).symlink_to(target)
        with StackView([layer]) as view:
            for path in (
                "/etc/absolute", "etc/climbing", "/etc/chain", "/etc/up/../secret", "/../secret", "../../secret", "/etc/proc",
            ):  # fmt: skip
                assert view.resolve(path) is None, path
                with pytest.raises(FileNotFoundError):
                    view.read(path, 100)
            up = view.resolve("/etc/up")
            assert up is not None
            assert up.path == "/"

    def test_a_layer_that_is_a_link_or_missing_is_refused(self, tmp_path: Path) -> None:
        for layers in ([tmp_path / "missing"], []):
            with pytest.raises(FileNotFoundError):
                StackView(layers)

    @needs_root
    def test_a_mount_inside_a_layer_is_not_entered(self, layer: Path) -> None:
        (layer / "proc").mkdir()
        program = (
            "import sys; from pathlib import Path; from tartarus.images.stackview import StackView\n"
            "view = StackView([Path(sys.argv[1])])\n"
            "try: print(view.read('/proc/version', 1000))\n"
            "except OSError as error: print(error.errno)\n"
        )
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-c", 'mount -t proc proc "$1/proc" && exec "$2" -c "$3" "$1"', "sh", layer, sys.executable, program],
            capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
        assert done.stdout.strip() == "18"  # EXDEV


class TestHostileLayers:
    def test_loops_and_long_chains_end(self, layer: Path) -> None:
        (layer / "self").symlink_to("self")
        (layer / "a").symlink_to("b")
        (layer / "b").symlink_to("a")
        (layer / "deep").symlink_to("/".join(["."] * 2000) + "/deep")
        (layer / "c0").write_text("end")
        for number in range(41):
            (layer / f"c{number + 1}").symlink_to(f"c{number}")
        with StackView([layer]) as view:
            assert [view.resolve(path) for path in ("/self", "/a", "/a/x", "/deep", "/c41")] == [None] * 5
            assert view.read("/c40", 10) == b"end"

    def test_names_no_file_can_have_are_not_there(self, layer: Path) -> None:
        (layer / "a").write_text("x")
        with StackView([layer]) as view:
            for path in ("a\0b", "\ud800", "x" * 5000, "/".join(["x"] * 5000), "a/", "a/.", "a/..", "a/../a"):
                assert view.resolve(path) is None, path[:20]

    def test_nothing_but_files_is_opened(self, layer: Path) -> None:
        os.mkfifo(layer / "fifo")
        (layer / "to-fifo").symlink_to("fifo")
        (layer / "dir").mkdir()
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(layer / "socket"))
        with StackView([layer]) as view:
            for path in ("fifo", "to-fifo", "socket"):
                with pytest.raises(OSError, match="not a regular file"):
                    view.read(path, 10)
            with pytest.raises(IsADirectoryError):
                view.read("dir", 10)

    @needs_root
    def test_devices_are_not_opened(self, layer: Path) -> None:
        os.mknod(layer / "zero", 0o020666, os.makedev(1, 5))
        with StackView([layer]) as view:
            with pytest.raises(OSError, match="a char"):
                view.read("zero", 10)
            assert view.listdir("/") == ["zero"]
            assert [step.files for step in view.walk()] == [[]]

    def test_sizes_are_capped(self, layer: Path) -> None:
        (layer / "five").write_text("12345")
        with (layer / "sparse").open("wb") as file:
            file.truncate(1 << 40)
        with StackView([layer]) as view:
            assert view.read("five", 5) == b"12345"
            for path in ("five", "sparse"):
                with pytest.raises(OSError, match="at most 4"):
                    view.read(path, 4)

    def test_counts_and_depths_are_capped(self, layer: Path) -> None:
        for number in range(30):
            (layer / f"f{number}").touch()
        place = layer
        for _ in range(20):
            place /= "d"
            place.mkdir()
        with StackView([layer]) as view:
            with pytest.raises(OSError, match="more than 30"):
                view.listdir("/", limit=30)
            with pytest.raises(ImageRefused, match="more than 40"):
                list(view.walk(max_entries=40))
            with pytest.raises(ImageRefused, match="too deep"):
                list(view.walk(max_depth=19))
            assert len(list(view.walk(max_entries=51, max_depth=20))) == 21

    def test_names_that_are_no_text_come_back_as_they_are(self, layer: Path) -> None:
        (Path(os.fsdecode(bytes(layer) + b"/\xff\n"))).write_text("odd")
        with StackView([layer]) as view:
            (name,) = view.listdir("/")
            assert os.fsencode(name) == b"\xff\n"
            assert view.read(name, 10) == b"odd"

    def test_hardly_any_descriptors_are_held(self, layer: Path) -> None:
        place = layer
        for _ in range(100):
            place /= "d"
            place.mkdir()
        before = len(os.listdir("/proc/self/fd"))
        with StackView([layer, layer]) as view:
            for step in view.walk():
                view.resolve(f"{step.path}/d/../nothing")
            assert len(os.listdir("/proc/self/fd")) == before + 2
        assert len(os.listdir("/proc/self/fd")) == before


class TestUsing:
    def test_a_walk_can_be_pruned(self, layer: Path) -> None:
        for path in ("a/x", "b/y", "c/z"):
            (layer / path).mkdir(parents=True)
        with StackView([layer]) as view:
            paths = []
            for step in view.walk():
                paths.append(step.path)
                if "b" in step.dirs:
                    step.dirs.remove("b")
        assert paths == ["/", "/a", "/a/x", "/c", "/c/z"]
        with StackView([layer]) as view:
            assert [step.path for step in view.walk("/b")] == ["/b", "/b/y"]
            assert list(view.walk("/nothing")) == []

    def test_directories_closed_to_us_are_said(self, layer: Path) -> None:
        for path in ("a", "b/x", "c"):
            (layer / path).mkdir(parents=True)

        class Closed(StackView):
            def _list(self, path: str, layers: Sequence[int], limit: int) -> Any:
                if path == "/b":
                    raise PermissionError(errno.EACCES, "closed")  # as for a daemon that is not root
                return super()._list(path, layers, limit)

        with Closed([layer]) as view:
            said: list[str] = []
            assert [step.path for step in view.walk(closed=said.append)] == ["/", "/a", "/c"]
            assert said == ["/b"]
            with pytest.raises(PermissionError):
                list(view.walk())

    def test_finds_programs_as_exec_would(self, layer: Path) -> None:
        for path, mode in (("usr/bin/tool", 0o755), ("opt/tool", 0o755), ("opt/data", 0o644), ("usr/bin/data", 0o755)):
            (layer / path).parent.mkdir(parents=True, exist_ok=True)
            (layer / path).write_text("#!")
            (layer / path).chmod(mode)
        (layer / "bin").symlink_to("usr/bin")
        (layer / "usr/bin/dir").mkdir()
        with StackView([layer]) as view:
            assert view.which("tool", "/nothing:/bin:/opt") == "/bin/tool"
            assert view.which("data", "/opt:/usr/bin/") == "/usr/bin/data"
            assert view.which("/opt/tool", "") == "/opt/tool"
            for program in ("dir", "", "opt/tool", "none", "../opt/tool", "/opt/data"):
                assert view.which(program, "opt:/bin:.:") is None, program

    @needs_root
    def test_owners_are_the_sandboxs(self, layer: Path) -> None:
        for name, owner in (("inside", 0x70000000 + 1000), ("outside", 5)):
            (layer / name).touch()
            os.chown(layer / name, owner, owner)
        with StackView([layer], uid_base=0x70000000) as view:
            inside, outside = view.resolve("inside"), view.resolve("outside")
        assert inside is not None
        assert outside is not None
        assert [(entry.uid, entry.gid) for entry in (inside, outside)] == [(1000, 1000), (65534, 65534)]
