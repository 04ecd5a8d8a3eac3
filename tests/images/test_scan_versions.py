"""Version order: Debian's held against dpkg, the others against their specifications' examples."""

from __future__ import annotations

import itertools
import subprocess
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tartarus.images.scan.versions import Incomparable, sort_key

DEB_PART = st.text(alphabet="0019aZ.+~", min_size=1, max_size=6)
DEB = st.builds(
    lambda epoch, digit, upstream, revision: f"{epoch}{digit}{upstream}{revision}",
    st.sampled_from(["", "", "0:", "1:", "10:"]),
    st.sampled_from(["0", "1", "00", "12"]),
    st.one_of(DEB_PART, DEB_PART.map(lambda part: f"{part}-{part}")),
    st.one_of(st.just(""), st.just("-0"), DEB_PART.map(lambda part: f"-{part}")),
)


def order(kind: str, left: str, right: str) -> int:
    key: Any = sort_key(kind)
    return int(key(left) > key(right)) - int(key(left) < key(right))


@settings(max_examples=8, deadline=None)
@given(pairs=st.lists(st.tuples(DEB, DEB), min_size=20, max_size=20))
def test_debian_as_dpkg(pairs: list[tuple[str, str]]) -> None:
    script = 'while read -r a b; do if dpkg --compare-versions "$a" lt "$b"; then echo -1; elif dpkg --compare-versions "$a" gt "$b"; then echo 1; else echo 0; fi; done'
    done = subprocess.run(
        ["sh", "-c", script], input="".join(f"{a} {b}\n" for a, b in pairs), capture_output=True, text=True, timeout=60, check=True
    )  # fmt: skip
    assert not done.stderr
    assert [order("deb", a, b) for a, b in pairs] == [int(word) for word in done.stdout.split()]


RPM = st.text(alphabet="0019aZb.+~^_", min_size=1, max_size=8)


@pytest.mark.needs("rpm")
@settings(max_examples=10, deadline=None)
@given(pairs=st.lists(st.tuples(RPM, RPM), min_size=100, max_size=100))
def test_rpm_as_rpm(pairs: list[tuple[str, str]]) -> None:
    script = "".join(f'print(rpm.vercmp("{a}", "{b}"), "")' for a, b in pairs)
    done = subprocess.run(
        ["rpm", "--eval", f"%{{lua:{script}}}"], capture_output=True, text=True, timeout=60, check=True
    )
    told = [int(word) for word in done.stdout.split()]
    key: Any = sort_key("rpm")
    assert [int(key(a) > key(b)) - int(key(a) < key(b)) for a, b in pairs] == told


@pytest.mark.parametrize(
    ("kind", "ascending"),
    [
        ("deb", ["1.0~~", "1.0~~a", "1.0~", "1.0", "1.0-1~bpo1", "1.0-1", "1.0-1+b1", "1.0-1+deb12u1", "1.0a", "1.0+dfsg-1", "1.9", "1.10", "1:0.1"]),
        ("semver", ["1.0.0-alpha", "1.0.0-alpha.1", "1.0.0-alpha.beta", "1.0.0-beta", "1.0.0-beta.2", "1.0.0-beta.11", "1.0.0-rc.1", "1.0.0"]),
        ("npm", ["0.9.9", "1.2", "1.2.1-0", "1.2.1", "1.10.0", "v2.0.0"]),
        ("pypi", ["1.0.dev1", "1.0a1", "1.0rc1", "1.0", "1.0+local", "1.0.post1", "1.0.1", "1!0.1"]),
        ("cran", ["0.9", "1.0", "1.0-1", "1.0.2", "1.0-10", "2"]),
        ("rpm", ["1.0~rc1-1", "1.0-1~1", "1.0-1", "1.0-1.el9", "1.0-2", "1.0^git1-1", "1.0a-1", "1.0.1-1", "1.2-1", "1.10-1", "1:0.1-1"]),
        ("apk", [
            "0.9_rc1", "0.9", "1.0_alpha", "1.0_alpha2", "1.0_alpha10", "1.0_beta", "1.0_pre1", "1.0_rc1-r1", "1.0", "1.0-r1",
            "1.0-r2", "1.0-r10", "1.0_git20230101", "1.0_p1", "1.0_p9-r0", "1.0_p10-r0", "1.0a", "1.0b-r2", "1.0.1", "1.02", "1.03", "1.1", "1.2", "1.10", "2",
        ]),
    ],
)  # fmt: skip
def test_ascending(kind: str, ascending: list[str]) -> None:
    for left, right in itertools.combinations(ascending, 2):
        assert order(kind, left, right) == -1, (left, right)
        assert order(kind, right, left) == 1, (left, right)
    assert all(order(kind, version, version) == 0 for version in ascending)


@pytest.mark.parametrize(
    ("kind", "left", "right"),
    [("semver", "1.0.0+a", "1.0.0+b"), ("deb", "0:1.0", "1.0-0"), ("deb", "1.00", "1.0"), ("pypi", "1.0", "1.0.0"), ("npm", "1", "1.0.0"), ("apk", "1.0~abc-r1", "1.0-r1")],
)  # fmt: skip
def test_the_same(kind: str, left: str, right: str) -> None:
    assert order(kind, left, right) == 0


@pytest.mark.parametrize("kind", ["deb", "semver", "npm", "pypi", "cran", "apk", "rpm"])
@pytest.mark.parametrize("junk", ["", " ", "x y", "\0", "١", "1" * 300, "1.0\n", "$(x)", "-", "/"])
def test_junk_is_incomparable(kind: str, junk: str) -> None:
    with pytest.raises(Incomparable):
        sort_key(kind)(junk)


def test_what_nobody_can_compare_is_said() -> None:
    with pytest.raises(Incomparable, match="gem"):
        sort_key("gem")


@given(
    kind=st.sampled_from(["deb", "semver", "npm", "pypi", "cran", "apk", "rpm"]),
    a=st.text(max_size=20),
    b=st.text(alphabet="019.-~_:rpa+", max_size=12),
    c=st.text(alphabet="019.-~_:rpa+", max_size=12),
)
def test_any_text_is_ordered_or_refused(kind: str, a: str, b: str, c: str) -> None:
    key = sort_key(kind)
    keys = []
    for version in (a, b, c):
        try:
            keys.append(key(version))
        except Incomparable:
            continue
    for one, two in itertools.permutations(keys, 2):
        assert (one < two) + (two < one) + (one == two) == 1
    if len(keys) == 3 and keys[0] <= keys[1] <= keys[2]:
        assert keys[0] <= keys[2]
