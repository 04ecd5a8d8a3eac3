"""What COPY picks out of a build context: patterns, .dockerignore, digests, and what a hostile tree can't do."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tartarus.images.dockerfile.context import FileTree, Picked, Watch, read_dockerfile
from tartarus.images.dockerfile.limits import CopyLimits
from tartarus.images.dockerfile.patterns import Ignore, component, has_wildcards
from tartarus.model.errors import InvalidRequest


def write(root: Path, *paths: str) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(path)


def pick(root: Path, *patterns: str, limits: CopyLimits | None = None) -> list[Picked]:
    with FileTree([root], None, is_context=True, what="the build context") as tree:
        watch = Watch(limits or CopyLimits())
        return [found for pattern in patterns for found in tree.pick(pattern, watch)]


def names(root: Path, *patterns: str) -> list[str]:
    return [item.entry.path for found in pick(root, *patterns) for item in found.items if item.entry.kind != "dir"]


def digest(root: Path, *patterns: str) -> str:
    with FileTree([root], None, is_context=True, what="the build context") as tree:
        watch = Watch(CopyLimits())
        return tree.digest([found for pattern in patterns for found in tree.pick(pattern, watch)], watch)


def refused(root: Path, *patterns: str, limits: CopyLimits | None = None) -> str:
    with pytest.raises(InvalidRequest) as caught:
        pick(root, *patterns, limits=limits)
    return str(caught.value)


# Patterns.


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        # The table of Go's own tests of filepath.Match, for one component.
        ("abc", "abc", True),
        ("*", "abc", True),
        ("*c", "abc", True),
        ("a*", "a", True),
        ("a*", "abc", True),
        ("a*b*c*d*e*", "axbxcxdxe", True),
        ("a*b*c*d*e*", "axbxcxdxexxx", True),
        ("a*b?c*x", "abxbbxdbxebxczzx", True),
        ("a*b?c*x", "abxbbxdbxebxczzy", False),
        ("ab[c]", "abc", True),
        ("ab[b-d]", "abc", True),
        ("ab[e-g]", "abc", False),
        ("ab[^c]", "abc", False),
        ("ab[^b-d]", "abc", False),
        ("ab[^e-g]", "abc", True),
        ("a\\*b", "a*b", True),
        ("a\\*b", "ab", False),
        ("a?b", "a☺b", True),
        ("a[^a]b", "a☺b", True),
        ("a???b", "a☺b", False),
        ("[a-ζ]*", "α", True),
        ("*[a-ζ]", "A", False),
        ("[\\]a]", "]", True),
        ("[\\-]", "-", True),
        ("[x\\-]", "x", True),
        ("[x\\-]", "z", False),
        ("[\\-x]", "-", True),
        ("*x", "xxx", True),
        ("a*a", "a", False),
        ("a*a", "aa", True),
        ("*ab", "aab", True),
        ("*aab*", "aaab", True),
        ("arr[[]0].txt", "arr[0].txt", True),
        ("a*", "a\nb", True),
        ("*", "\udcff", True),
    ],
)
def test_components_match_as_in_go(pattern, name, matches):
    assert bool(component(pattern).fullmatch(name)) == matches


@pytest.mark.parametrize(
    "pattern", ["[]a]", "[-]", "[x-]", "[-x]", "[", "[^", "[^bc", "a[", "a[b", "[a-", "\\", "[a-b-c]"]
)
def test_patterns_that_go_calls_bad_are_refused(pattern):
    with pytest.raises(InvalidRequest):
        component(pattern)


def test_no_pattern_takes_its_choices_back():
    # What does takes longer than the limit of every test.
    for pattern in ("*a" * 100 + "b", "*" * 200 + "b", "*?" * 100 + "b", "*[^b]" * 100 + "b"):
        assert not component(pattern).fullmatch("a" * 255)
    deep = "/".join("a" * 2_000)
    assert not Ignore("/".join(["**/a"] * 100) + "/b").ignores(deep[:400])


def test_wildcards_are_told_from_escaped_ones():
    assert has_wildcards("a*")
    assert has_wildcards("a[b]")
    assert not has_wildcards("a\\*")
    assert has_wildcards("a\\\\*")


# .dockerignore: the examples of Docker's reference, then the corners.


@pytest.mark.parametrize(
    ("text", "ignored", "kept"),
    [
        ("# comment\n*/temp*\n*/*/temp*\ntemp?\n", ["a/temporary.txt", "a/b/temporary", "tempa", "a/temp/x"], ["temp", "a/b/c/temp"]),
        ("**/*.go", ["x.go", "a/b/c/x.go"], ["x.gone"]),
        ("*.md\n!README.md", ["x.md"], ["README.md", "a/x.md"]),
        ("*.md\n!README*.md\nREADME-secret.md", ["x.md", "README-secret.md"], ["README.md"]),
        ("*.md\nREADME-secret.md\n!README*.md", ["x.md"], ["README-secret.md"]),
        ("*\n!a/keep", ["b", "a/x"], ["a/keep", "a/keep/below"]),
        ("/top", ["top", "top/x"], ["a/top"]),
        ("a/../b/", ["b", "b/c"], ["a"]),
        ("  spaced  \n", ["spaced"], ["  spaced  "]),
        (".", [], ["a", "b/c"]),
        ("", [], ["a"]),
        ("**", ["a", "a/b"], []),
        ("a/**", ["a/b", "a/b/c"], ["a"]),
        ("**/a/**", ["a/x", "b/a/x/y"], ["a", "b/a"]),
        ("a/**/b", ["a/b", "a/x/y/b"], ["a/x", "xa/b"]),
        ("a**b", ["ab", "a/b", "axx/y/b"], ["axb", "axx/y/zb"]),
        ("a**", ["a", "ab", "ab/c"], ["ba"]),
        ("**b", ["b", "x/b", "x/y/b"], ["xb"]),
        ("#x\n\\#y", ["#y"], ["#x"]),
        ("d\n!d/keep*\nd*", ["d/keep1"], []),
        ("../x\n..", [], ["x"]),
        ("!a\na", ["a"], []),
        ("[ab]", ["a"], ["c"]),
    ],
)  # fmt: skip
def test_dockerignore(text, ignored, kept):
    rules = Ignore(text)
    assert [path for path in ignored if not rules.ignores(path)] == []
    assert [path for path in kept if rules.ignores(path)] == []


@pytest.mark.parametrize("text", ["[", "a\n!", "x" * 2_000, "\n" * 300_000, "x\n" * 2_000, "a**b" * 20])
def test_a_hostile_dockerignore_is_refused(text):
    with pytest.raises(InvalidRequest, match="dockerignore"):
        Ignore(text)


def test_ignored_files_are_not_there(tmp_path):
    write(tmp_path, "a", "secret/key", "keep/x", "keep/y.log", "deep/er/keep.txt", "deep/er/not")
    (tmp_path / ".dockerignore").write_text("secret\n*.log\n**/*.log\n.dockerignore\ndeep\n!deep/er/keep.txt\n")
    (tmp_path / "link").symlink_to("secret/key")
    (tmp_path / "dirlink").symlink_to("secret")
    assert names(tmp_path, ".") == ["/a", "/deep/er/keep.txt", "/dirlink", "/keep/x", "/link"]
    shown = [item.below for found in pick(tmp_path, "deep") for item in found.items]
    assert shown == ["", "er", "er/keep.txt"]
    for pattern in ("secret", "secret/key", "link", "dirlink", "dirlink/key", "dirlink/*", "keep/*.log", "deep/er/not"):
        assert "is not in the build context" in refused(tmp_path, pattern)


# Picking.


def test_picking_by_name_and_by_wildcard(tmp_path):
    write(tmp_path, "a.txt", "b.txt", "c.md", "sub/d.txt", "sub/deep/e.txt", "other/f.txt", "we[i]rd*")
    assert names(tmp_path, "a.txt") == ["/a.txt"]
    assert names(tmp_path, "/a.txt", "./sub/../c.md", "../../c.md") == ["/a.txt", "/c.md", "/c.md"]
    assert names(tmp_path, "*.txt") == ["/a.txt", "/b.txt"]
    assert names(tmp_path, "*/*.txt") == ["/other/f.txt", "/sub/d.txt"]
    assert names(tmp_path, "s*/deep/?.txt") == ["/sub/deep/e.txt"]
    assert names(tmp_path, "we[[]i]rd\\*") == ["/we[i]rd*"]
    assert names(tmp_path, "sub") == ["/sub/d.txt", "/sub/deep/e.txt"]
    assert [found.name for found in pick(tmp_path, "*")] == ["a.txt", "b.txt", "c.md", "other", "sub", "we[i]rd*"]
    for pattern in ("none", "none*", "a.txt/x", "sub/*/none", "a.txt/*"):
        assert "is not in the build context" in refused(tmp_path, pattern)


def test_names_that_are_no_text(tmp_path):
    odd = [b"new\nline", b"\xff\xfe", b" ", b"-rf", b"$X", b"\x1b[31m"]
    for name in odd:
        (tmp_path / os.fsdecode(name)).write_bytes(name)
    assert sorted(os.fsencode(name[1:]) for name in names(tmp_path, ".")) == sorted(odd)
    first = digest(tmp_path, ".")
    (tmp_path / os.fsdecode(b"\xff\xfe")).rename(tmp_path / os.fsdecode(b"\xff\xfd"))
    assert digest(tmp_path, ".") != first


# Digests.

Change = Callable[[Path], object]


@pytest.mark.parametrize(
    "change",
    [
        lambda root: (root / "d/f").write_text("other"),
        lambda root: (root / "d/f").rename(root / "d/g"),
        lambda root: (root / "d/f").chmod(0o755),
        lambda root: (root / "d").chmod(0o700),
        lambda root: (root / "d/new").mkdir(),
        lambda root: (root / "l").unlink() or (root / "l").symlink_to("other"),
        lambda root: (root / "l").unlink() or (root / "l").write_text("d/f"),
        lambda root: (root / "e").rmdir(),
    ],
    ids=["content", "name", "mode", "folder mode", "empty folder", "target", "kind", "removal"],
)
def test_the_digest_sees_every_change(tmp_path, change: Change):
    write(tmp_path, "d/f", "d/x")
    (tmp_path / "e").mkdir()
    (tmp_path / "l").symlink_to("d/f")
    first = digest(tmp_path, ".")
    change(tmp_path)
    assert digest(tmp_path, ".") != first


def test_the_digest_does_not_see_times_or_what_is_ignored(tmp_path):
    write(tmp_path, "a", "b.log")
    (tmp_path / ".dockerignore").write_text("*.log\n")
    first = digest(tmp_path, ".")
    os.utime(tmp_path / "a", (1, 1))
    write(tmp_path, "c.log")
    (tmp_path / "b.log").write_text("changed")
    assert digest(tmp_path, ".") == first


def test_two_trees_never_look_like_one(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    write(one, "a", "b")
    write(two, "ab")
    (one / "a").write_text("")
    (one / "b").write_text("")
    (two / "ab").write_text("")
    assert digest(one, ".") != digest(two, ".")
    assert digest(one, "a", "b") != digest(one, "b", "a")


# Hostile trees.


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A directory beside the context that nothing of may be seen."""
    place = tmp_path / "outside"
    write(place, "secret")
    return place


@pytest.fixture
def context(tmp_path: Path) -> Path:
    place = tmp_path / "context"
    write(place, "ordinary")
    return place


def test_links_do_not_lead_out(context, outside):
    for number, target in enumerate(
        [outside / "secret", "../outside/secret", "../../../../../../../../etc/passwd", "/proc/self/root/etc/passwd"]
    ):
        (context / f"file{number}").symlink_to(target)
        assert "is not in the build context" in refused(context, f"file{number}")
    (context / "folder").symlink_to(outside)
    (context / "up").symlink_to("..")
    for pattern in ("folder/secret", "folder/*", "up/outside/secret", "up/*/secret", "../outside/secret"):
        assert "is not in the build context" in refused(context, pattern)
    # ".." at the top stays there, as in a root directory.
    assert "/ordinary" in names(context, "up")


def test_links_are_copied_as_they_are_below_a_directory(context, outside):
    (context / "d").mkdir()
    (context / "d/out").symlink_to(outside / "secret")
    (found,) = pick(context, "d")
    assert [(item.entry.kind, item.entry.target) for item in found.items[1:]] == [("symlink", f"{outside}/secret")]


def test_a_link_that_a_source_names_is_followed_inside(context):
    write(context, "real/x")
    (context / "absolute").symlink_to("/real/x")
    (context / "folder").symlink_to("real")
    assert names(context, "absolute", "folder", "folder/x") == ["/real/x"] * 3
    assert pick(context, "absolute")[0].name == "absolute"


def test_links_in_a_circle(context):
    (context / "a").symlink_to("b")
    (context / "b").symlink_to("a")
    (context / "self").symlink_to("self/x")
    for pattern in ("a", "self", "a/x"):
        assert "is not in" in refused(context, pattern)
    # A wildcard does not pass over it in silence.
    assert "'/a' in the build context is a link that leads nowhere" in refused(context, "*")


def test_pipes_and_sockets_are_refused_unless_ignored(context):
    os.mkfifo(context / "pipe")
    message = refused(context, ".")
    assert "'/pipe' in the build context is a named pipe" in message
    assert ".dockerignore" in message
    assert "named pipe" in refused(context, "pipe")
    (context / ".dockerignore").write_text("pipe\n.dockerignore\n")
    assert names(context, ".") == ["/ordinary"]
    held = os.getcwd()
    with socket.socket(socket.AF_UNIX) as listener:
        os.chdir(context)  # a socket's path has 108 bytes at most
        try:
            listener.bind("socket")
        finally:
            os.chdir(held)
        assert "socket" in refused(context, ".")


@pytest.mark.needs("root")
def test_devices_are_refused(context):
    os.mknod(context / "null", 0o666 | 0o020000, os.makedev(1, 3))
    assert "device" in refused(context, ".")


def test_a_dockerignore_or_dockerfile_that_is_a_link_or_a_pipe(context, outside):
    (context / "Dockerfile").symlink_to(outside / "secret")
    with pytest.raises(InvalidRequest, match="has no 'Dockerfile'"):
        read_dockerfile(context)
    (context / "Dockerfile").unlink()
    os.mkfifo(context / "Dockerfile")
    with pytest.raises(InvalidRequest, match="can't be read"):
        read_dockerfile(context)
    (context / "Dockerfile").unlink()
    (context / "Dockerfile").write_bytes(b"FROM \xff")
    with pytest.raises(InvalidRequest, match="UTF-8"):
        read_dockerfile(context)
    (context / "Dockerfile").write_bytes(b"#" * 2_000_000)
    with pytest.raises(InvalidRequest, match="can't be read"):
        read_dockerfile(context)
    (context / "Dockerfile").write_text("FROM scratch\n")
    assert read_dockerfile(context) == "FROM scratch\n"
    os.mkfifo(context / ".dockerignore")
    assert "can't be read" in refused(context, "ordinary")
    (context / ".dockerignore").unlink()
    (context / ".dockerignore").symlink_to(outside / "secret")
    assert names(context, "ordinary") == ["/ordinary"]


def test_a_file_swapped_under_us_is_not_read(context, outside):
    with FileTree([context], None, is_context=True, what="the build context") as tree:
        watch = Watch(CopyLimits())
        (found,) = tree.pick("ordinary", watch)
        (context / "ordinary").unlink()
        (context / "ordinary").symlink_to(outside / "secret")
        with pytest.raises(OSError):
            tree.open(found.top)
        (context / "ordinary").unlink()
        os.link(outside / "secret", context / "ordinary")
        with pytest.raises(OSError, match="changed"):
            tree.open(found.top)


def test_a_file_that_grows_is_not_read_on(context):
    with FileTree([context], None, is_context=True, what="the build context") as tree:
        watch = Watch(CopyLimits())
        (found,) = tree.pick("ordinary", watch)
        for content in ("longer than it was", "short"):
            (context / "ordinary").write_text(content)
            with pytest.raises(OSError, match="changed"):
                b"".join(tree.chunks(found.top, watch))


def test_caps(context):
    write(context, *(f"many/{number}" for number in range(50)))
    assert "more than 20 files" in refused(context, ".", limits=CopyLimits(entries=20))
    assert "more than 20 files" in refused(context, "many/*", limits=CopyLimits(entries=20))
    with (context / "huge").open("wb") as file:
        file.truncate(1 << 40)  # holes cost nothing, and count
    assert "bytes" in refused(context, "huge")
    (context / "huge").unlink()
    (context / "/".join(["deep"] * 60)).mkdir(parents=True)
    assert "too deep" in refused(context, ".", limits=CopyLimits(depth=50))
    assert "more than 0 s" in refused(context, ".", limits=CopyLimits(seconds=0))


def test_a_tree_deeper_than_any_path(context):
    here = os.open(context, os.O_RDONLY)
    for _ in range(300):
        os.mkdir("d" * 50, dir_fd=here)
        below = os.open("d" * 50, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    assert "too deep" in refused(context, ".")
