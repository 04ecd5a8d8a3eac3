"""Who a user name means in an image, by Docker's rules, whatever its account files hold."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tartarus.images.accounts import MAX_BYTES, MAX_ID, Account, find_group, find_user
from tartarus.images.stackview import StackView
from tartarus.model.errors import ImageRefused, InvalidRequest

PASSWD = """\
root:x:0:0:root:/root:/bin/bash
daemon:x:1:1:daemon:/usr/sbin:/usr/sbin/nologin
# a comment
app:x:1000:1001:App,,,:/home/app:/bin/sh
nohome:x:1002:1002::relative:/bin/sh
2000:x:77:78::/home/digits:/bin/sh
short:x:5
far:x:100000:100000::/home/far:/bin/sh
minus:x:-1:-1::/:/bin/sh
"""
GROUP = """\
root:x:0:
app:x:1001:
video:x:44:app,other
staff:x:50:other,app
staff2:x:50:app
apple:x:60:apple
huge:x:99999:app
"""


@pytest.fixture
def etc(tmp_path: Path) -> Path:
    place = tmp_path / "layer" / "etc"
    place.mkdir(parents=True)
    (place / "passwd").write_text(PASSWD)
    (place / "group").write_text(GROUP)
    return place


def find(etc: Path, spec: str) -> Account:
    with StackView([etc.parent]) as view:
        return find_user(view, spec)


@pytest.mark.parametrize(
    ("spec", "account"),
    [
        ("", Account(0, 0, (), "/root", "root")),
        ("0", Account(0, 0, (), "/root", "root")),
        ("app", Account(1000, 1001, (44, 50), "/home/app", "app")),
        ("1000", Account(1000, 1001, (44, 50), "/home/app", "app")),
        ("app:staff", Account(1000, 50, (), "/home/app", "app")),
        ("app:1234", Account(1000, 1234, (), "/home/app", "app")),
        ("1000:1000", Account(1000, 1000, (), "/home/app", "app")),
        ("4321", Account(4321, 0, (), "/", "")),
        ("4321:video", Account(4321, 44, (), "/", "")),
        ("2000", Account(77, 78, (), "/home/digits", "2000")),
        ("nohome", Account(1002, 1002, (), "/", "nohome")),
        (":staff", Account(0, 50, (), "/root", "root")),
        ("65535:65535", Account(65535, 65535, (), "/", "")),
    ],
)
def test_means_what_docker_takes_it_for(etc: Path, spec: str, account: Account) -> None:
    assert find(etc, spec) == account


@pytest.mark.parametrize(
    "spec",
    [
        "nobody-here",
        "app:none",
        "short",
        "far",
        "minus",
        "-1",
        "65536",
        "0:65536",
        "app:huge",
        "app:",
        "app:staff:x",
        "1e3",
        "٣",
        "9" * 5000,
    ],
)
def test_what_is_not_there_or_out_of_range_is_refused(etc: Path, spec: str) -> None:
    with pytest.raises(InvalidRequest):
        find(etc, spec)


def test_without_account_files_numbers_do_and_names_do_not(tmp_path: Path) -> None:
    with StackView([tmp_path]) as view:
        assert find_user(view, "") == Account(0, 0, (), "/", "")
        assert find_user(view, "12:34") == Account(12, 34, (), "/", "")
        assert find_group(view, "34") == 34
        for spec in ("root", "0:root"):
            with pytest.raises(InvalidRequest, match="there is no"):
                find_user(view, spec)


def test_the_files_of_upper_layers_count(etc: Path, tmp_path: Path) -> None:
    upper = tmp_path / "upper"
    (upper / "etc").mkdir(parents=True)
    (upper / "etc/passwd").write_text("app:x:7:8::/elsewhere:\n")
    with StackView([upper, etc.parent]) as view:
        assert find_user(view, "app") == Account(7, 8, (44, 50), "/elsewhere", "app")


class TestHostileFiles:
    def test_links_out_of_the_image_lead_nowhere(self, etc: Path, tmp_path: Path) -> None:
        (tmp_path / "passwd").write_text("app:x:1:1::/bait:\n")
        for target in (str(tmp_path / "passwd"), "../../passwd", "passwd"):
            (etc / "passwd").unlink()
            (etc / "passwd").symlink_to(target)
            with pytest.raises(InvalidRequest, match="there is no user"):
                find(etc, "app")

    def test_what_is_no_file_is_refused(self, etc: Path) -> None:
        (etc / "passwd").unlink()
        os.mkfifo(etc / "passwd")
        with pytest.raises(ImageRefused, match="no account file"):
            find(etc, "app")
        (etc / "group").unlink()
        (etc / "group").mkdir()
        with pytest.raises(ImageRefused, match="no account file"), StackView([etc.parent]) as view:
            find_group(view, "x")

    def test_huge_files_are_refused(self, etc: Path) -> None:
        with (etc / "passwd").open("wb") as file:
            file.truncate(MAX_BYTES + 1)
        with pytest.raises(ImageRefused, match="at most"):
            find(etc, "app")

    def test_membership_everywhere_is_refused(self, etc: Path) -> None:
        (etc / "group").write_text("".join(f"g{number}:x:{number}:app\n" for number in range(2000)))
        with pytest.raises(ImageRefused, match="2000 groups"):
            find(etc, "app")
        assert find(etc, "app:g5").gid == 5

    @given(passwd=st.binary(max_size=200), group=st.binary(max_size=200), spec=st.text(max_size=12))
    def test_any_bytes_give_an_account_in_range_or_a_refusal(
        self, tmp_path_factory: pytest.TempPathFactory, passwd: bytes, group: bytes, spec: str
    ) -> None:
        place = tmp_path_factory.getbasetemp() / "any" / "etc"
        place.mkdir(parents=True, exist_ok=True)
        (place / "passwd").write_bytes(b"a:x:1:2::/\xff:\n" + passwd + b"\nb:x:" + passwd)
        (place / "group").write_bytes(group + b"\ng:x:" + group)
        for asked in (spec, "a", "b", "b:g"):
            try:
                account = find(place, asked)
            except (InvalidRequest, ImageRefused):
                continue
            assert min(account.uid, account.gid, *account.groups, MAX_ID) >= 0
            assert max(account.uid, account.gid, *account.groups, 0) <= MAX_ID
            assert account.home.startswith("/")
            (account.home + account.name).encode()
