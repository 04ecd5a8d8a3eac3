"""Names of images are read by Docker's rules, and refused with the reason."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tartarus.images.reference import Reference
from tartarus.model.errors import InvalidRequest

DIGEST = "sha256:" + "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("python", "docker.io/library/python:latest"),
        ("python:3.11", "docker.io/library/python:3.11"),
        ("library/python", "docker.io/library/python:latest"),
        ("docker.io/python", "docker.io/library/python:latest"),
        ("index.docker.io/python", "docker.io/library/python:latest"),
        ("owner/app", "docker.io/owner/app:latest"),
        ("ghcr.io/owner/app:1.0", "ghcr.io/owner/app:1.0"),
        ("localhost/x", "localhost/x:latest"),
        ("localhost:5000/x", "localhost:5000/x:latest"),
        ("localhost:5000/a/b__c/d-e.f:V_1", "localhost:5000/a/b__c/d-e.f:V_1"),
        ("host:5000/x:tag", "host:5000/x:tag"),
        ("Host.Example.COM/x", "host.example.com/x:latest"),
        ("MyHost/x", "MyHost/x:latest"),
        ("[::1]:5000/x", "[::1]:5000/x:latest"),
        (f"python@{DIGEST}", f"docker.io/library/python@{DIGEST}"),
        (f"python:3.11@{DIGEST}", f"docker.io/library/python:3.11@{DIGEST}"),
        ("a/" * 100 + "b", "docker.io/" + "a/" * 100 + "b:latest"),
    ],
)
def test_it_has_one_canonical_form(text: str, canonical: str) -> None:
    found = Reference.parse(text)
    assert str(found) == canonical
    assert Reference.parse(canonical) == found


def test_a_digest_decides() -> None:
    assert Reference.parse(f"x:1@{DIGEST}").target == DIGEST
    assert Reference.parse("x:1").target == "1"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        ("https://ghcr.io/x", "URL"),
        ("Python", "lower case"),
        ("docker.io/Owner/App", "lower case"),
        ("python:", "not a tag"),
        ("python:-x", "not a tag"),
        ("python:" + "t" * 129, "not a tag"),
        ("python:tag\n", "not a tag"),
        ("python\n", "not a repository"),
        ("python@sha256:abc", "digest"),
        ("python@sha512:" + "a" * 128, "digest"),
        (f"python@{DIGEST.upper()}", "digest"),
        (f"python@{DIGEST}@{DIGEST}", "digest"),
        ("a" * 64, "id"),
        ("a..b", "not a repository"),
        ("-a", "not a repository"),
        ("a//b", "not a repository"),
        ("a/", "not a repository"),
        ("/a", "not a repository"),
        ("../../etc", "registry"),
        ("host:99999/x", "registry"),
        ("host:0/x", "registry"),
        ("ho_st.com/x", "registry"),
        ("user@host.com/x", "digest"),
        ("pyth\u00f6n", "not a repository"),
        ("a/" * 130 + "b", "longer than 255"),
        ("x" * 2000, "longer than 1024"),
    ],
)
def test_anything_else_is_refused_with_the_reason(text: str, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason) as refused:
        Reference.parse(text)
    assert refused.value.fix


@given(st.text(alphabet="aZ0.:/@-_[]\n\0é", max_size=40) | st.text(max_size=80))
def test_no_text_is_more_than_refused(text: str) -> None:
    with contextlib.suppress(InvalidRequest):
        found = Reference.parse(text)
        assert Reference.parse(str(found)) == found
        assert ".." not in found.repository
