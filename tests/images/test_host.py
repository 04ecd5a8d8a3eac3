"""The `host` template: common programs work under it, and nothing private of the host's is in it."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from tests.images.conftest import run_inside

from tartarus.images import LayerStore, PreparedTemplate, catalogue, prepare
from tartarus.images.catalogue import templates_for
from tartarus.images.entries import Entry, directory, text, with_parents, write_tree
from tartarus.images.hostfiles import host_etc, public_content
from tartarus.images.interpreter import examine, find_interpreter, own_interpreter
from tartarus.images.skeleton import skeleton
from tartarus.model.errors import TemplateFailed
from tartarus.model.settings import Settings

pytestmark = pytest.mark.anyio

COMPILE = 'echo "int main(void) { return 0; }" > /tmp/a.c && gcc -o /tmp/a /tmp/a.c && /tmp/a'
CERTIFICATES = "import ssl; print(len(ssl.create_default_context().get_ca_certs()))"


@pytest.mark.needs("bwrap")
@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (("sh", "-c", "echo $((6 * 7))"), "42\n"),
        (("bash", "-c", "set -o pipefail; echo {a,b} | cat"), "a b\n"),
        (("sort", "--version-sort", "/dev/null"), ""),
        (("python3", "-c", "print(6 * 7)"), "42\n"),
        pytest.param(("perl", "-MPOSIX", "-e", "print 6 * 7"), "42", marks=pytest.mark.needs("perl")),
        pytest.param(("sh", "-c", "git init -q /tmp/r && git -C /tmp/r status -s"), "", marks=pytest.mark.needs("git")),
        pytest.param(("bash", "-c", COMPILE), "", marks=pytest.mark.needs("cc")),
        (("getent", "passwd", "root"), "root:x:0:0:root:/root:/bin/bash\n"),
        (("sh", "-c", "getent hosts localhost | grep -c ."), "1\n"),
        (("id", "-un", "1000"), "user\n"),
        (("python3", "-c", "import locale; locale.setlocale(0, ''); print(locale.getlocale()[1])"), "UTF-8\n"),
        (("sh", "-c", "cc --version >/dev/null 2>&1; awk 'BEGIN { print 42 }'"), "42\n"),
        (("readlink", "-f", "/etc/localtime"), None),
        (("date", "-d", "@0", "-u", "+%Y"), "1970\n"),
    ],
)
def test_common_programs_work(host: PreparedTemplate, argv: tuple[str, ...], expected: str | None) -> None:
    done = run_inside(host, *argv)
    assert (done.returncode, done.stderr) == (0, "")
    assert expected is None or done.stdout == expected


@pytest.mark.needs("bwrap")
def test_certificate_authorities_are_there(host: PreparedTemplate) -> None:
    # Those that the host's own Python trusts, when it goes by nothing but its defaults.
    here = subprocess.run(
        [find_interpreter().path, "-I", "-c", CERTIFICATES], capture_output=True, text=True, check=True, env={}
    )
    assert run_inside(host, "python3", "-c", CERTIFICATES).stdout == here.stdout


async def test_preparing_again_gives_the_same_place(settings: Settings) -> None:
    steps: list[str] = []
    first = await prepare(catalogue()["host"], settings, None, steps.append)
    assert steps == ["making the root file system of host"]
    again = await prepare(catalogue()["host"], settings, None, steps.append)
    assert again == first
    assert len(steps) == 1


@pytest.mark.needs("root")
async def test_with_mapped_ids_every_file_is_the_sandbox_users(settings: Settings) -> None:
    prepared = await prepare(catalogue()["host"], settings, 100000, lambda _line: None)
    owners = {path.lstat().st_uid for path in prepared.layers[0].rglob("*")}
    assert owners == {100000, 101000}
    assert prepared.layers[0].stat().st_uid == 100000
    assert (prepared.layers[0] / "home/user").stat().st_uid == 101000


def test_the_layer_has_what_a_mount_needs(host: PreparedTemplate) -> None:
    layer = host.layers[0]
    for name in ("proc", "sys", "dev", "tmp", "usr", "run", "work", "root", "var/tmp"):
        assert (layer / name).is_dir()
    assert stat.S_IMODE((layer / "tmp").stat().st_mode) == 0o1777
    for _, target in host.binds:
        assert (layer / target.lstrip("/")).is_dir()
    assert list((layer / "usr").iterdir()) == []
    assert (layer / "opt/tartarus/runner.py").is_file()


def test_no_private_file_of_the_host_is_copied(host: PreparedTemplate) -> None:
    etc = host.layers[0] / "etc"
    for name in ("shadow", "gshadow", "gitconfig", "pip.conf", "npmrc", "wgetrc", "environment", "ssh", "ssl/private"):
        assert not os.path.lexists(etc / name)
    assert (etc / "resolv.conf").read_text() == ""
    assert (etc / "machine-id").read_text() == ""
    for path in etc.rglob("*"):
        if path.is_file() and not path.is_symlink():
            assert b"PRIVATE KEY" not in path.read_bytes()


@pytest.fixture
def etc(tmp_path: Path) -> Path:
    """A made-up /etc with secrets in places from which files are taken."""
    etc = tmp_path / "etc"
    certs = etc / "ssl/certs"
    certs.mkdir(parents=True)
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents:
        if parent.owner() == tmp_path.owner() and parent != Path("/tmp"):
            parent.chmod(parent.stat().st_mode | stat.S_IXOTH)
    (etc / "shadow").write_text("root:secret")
    (certs / "good.pem").write_text("-----BEGIN CERTIFICATE-----")
    (certs / "both.pem").write_text("-----BEGIN CERTIFICATE-----\n-----BEGIN RSA PRIVATE KEY-----")
    (certs / "mine.key").write_text("looks harmless")
    (certs / "api-token.txt").write_text("t0k3n")
    (certs / "closed.pem").write_text("only for me")
    (certs / "closed.pem").chmod(0o600)
    (certs / "vault").mkdir(mode=0o700)
    (certs / "vault/inner.pem").write_text("in a closed directory")
    (certs / "link-beside.0").symlink_to("good.pem")
    (certs / "link-usr.pem").symlink_to("/usr/share/ca.pem")
    (certs / "link-shadow.pem").symlink_to("../../shadow")
    (certs / "link-climb.pem").symlink_to("/usr/../etc/shadow")
    (certs / "link-private.pem").symlink_to("closed.pem")
    (certs / "dangling.pem").symlink_to("nowhere.pem")
    (certs / "loop.pem").symlink_to("loop.pem")
    os.mkfifo(certs / "pipe.pem")
    (etc / "os-release").symlink_to("../usr/lib/os-release")
    (etc / "timezone").write_text("Etc/UTC")
    return etc


def test_only_public_files_of_a_listed_name_are_taken(etc: Path) -> None:
    found = {entry.path: entry for entry in host_etc(etc)}
    assert set(found) == {
        "/etc/os-release",
        "/etc/timezone",
        "/etc/ssl/certs",
        "/etc/ssl/certs/good.pem",
        "/etc/ssl/certs/link-beside.0",
        "/etc/ssl/certs/link-usr.pem",
    }
    assert found["/etc/os-release"].target == "../usr/lib/os-release"
    assert found["/etc/ssl/certs/link-beside.0"].target == "good.pem"


def test_a_tree_that_is_a_link_is_not_followed(etc: Path) -> None:
    (etc / "alternatives").symlink_to(etc)
    assert not [entry for entry in host_etc(etc) if entry.path.startswith("/etc/alternatives")]


def test_a_file_as_big_as_a_disk_is_not_taken(tmp_path: Path) -> None:
    with (tmp_path / "big").open("wb") as big:
        big.truncate(2**40)
    assert public_content(tmp_path / "big") is None


def test_the_root_has_the_hosts_own_links(tmp_path: Path) -> None:
    (tmp_path / "usr/bin").mkdir(parents=True)
    (tmp_path / "bin").symlink_to("usr/bin")
    (tmp_path / "lib").mkdir()
    entries, binds = skeleton(find_interpreter(), tmp_path)
    found = {entry.path: entry for entry in with_parents(entries)}
    assert found["/bin"].target == "usr/bin"
    assert found["/lib"].kind == "dir"
    assert binds[:2] == (("/usr", "/usr"), ("/lib", "/lib"))
    assert "/sbin" not in found
    # No bash here, so nobody's shell is bash.
    assert b"/bin/bash" not in found["/etc/passwd"].content


def test_parents_are_added_and_the_first_entry_of_a_path_wins() -> None:
    entries = with_parents([text("/a/b/c", "ours"), text("/a/b/c", "theirs"), directory("/a", 0o700)])
    assert [(entry.path, entry.mode) for entry in entries] == [("/a", 0o700), ("/a/b", 0o755), ("/a/b/c", 0o644)]
    assert entries[-1].content == b"ours"


def test_modes_do_not_depend_on_the_umask(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    before = os.umask(0o077)
    try:
        write_tree(
            tree, [directory("/tmp", 0o1777), text("/etc/x", "x"), Entry("/bin", "symlink", target="usr/bin")], None
        )
    finally:
        os.umask(before)
    assert oct(tree.stat().st_mode & 0o7777) == "0o755"
    assert oct((tree / "tmp").stat().st_mode & 0o7777) == "0o1777"
    assert oct((tree / "etc").stat().st_mode & 0o7777) == "0o755"
    assert oct((tree / "etc/x").stat().st_mode & 0o7777) == "0o644"


class TestInterpreter:
    """Which Python a template gets."""

    def test_the_hosts_comes_first(self) -> None:
        found = find_interpreter()
        assert found.version >= (3, 9, 0)
        assert found.path.startswith("/usr/") != bool(found.bind)

    def test_without_one_in_usr_ours_is_shown_at_its_own_place(self) -> None:
        found = find_interpreter(("/nonexistent/python3",))
        assert found.version == sys.version_info[:3]
        assert found.path.startswith(found.bind or "/usr")

    def test_one_that_does_not_run_is_passed_over(self, tmp_path: Path) -> None:
        broken = tmp_path / "python3"
        broken.write_text("#!/bin/sh\necho '{\"version\": [3]}'\n")
        broken.chmod(0o755)
        assert examine(str(broken)) is None
        assert examine("/bin/false") is None

    def test_one_that_is_too_old_is_passed_over(self, tmp_path: Path) -> None:
        old = tmp_path / "python3"
        old.write_text('#!/bin/sh\necho \'{"version": [3, 6, 9], "prefix": "/usr", "abi": ["cpython-36"]}\'\n')
        old.chmod(0o755)
        assert examine(str(old)) is None

    @pytest.mark.needs("bwrap")
    async def test_our_own_runs_in_the_sandbox(self, settings: Settings) -> None:
        ours = own_interpreter()
        template = templates_for(ours)["host"]
        prepared = await prepare(template, settings, None, lambda _line: None, interpreter=ours)
        done = run_inside(prepared, "python3", "-c", "import sys; print(sys.base_prefix)")
        assert done.stdout.strip() == (ours.bind or "/usr")
        assert template.warm_up is not None
        assert template.warm_up.interpreter == ours.path


async def test_a_change_of_the_hosts_libraries_gives_a_new_root(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = await prepare(catalogue()["host"], settings, None, lambda _line: None)
    ours = skeleton(find_interpreter())
    changed = ([*ours[0], text("/etc/new-library", "x")], ours[1])
    monkeypatch.setattr("tartarus.images.preparing.skeleton", lambda _interpreter: changed)
    second = await prepare(catalogue()["host"], settings, None, lambda _line: None)
    assert second.digest != first.digest
    assert first.layers[0].is_dir()


def test_a_template_travels_as_data() -> None:
    built_in = templates_for(find_interpreter())
    for template in built_in.values():
        assert msgspec.json.decode(msgspec.json.encode(template), type=type(template)) == template
    assert set(built_in) == {"host", "python-ds"}


def test_no_permission_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(TemplateFailed, match="can't prepare"):
        LayerStore(tmp_path / "file" / "templates")
