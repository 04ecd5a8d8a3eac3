"""What may be asked for, and what a configuration may grant: refused whole at the edge, and never climbing."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tartarus.model.configuration import configured
from tartarus.model.errors import InvalidRequest, TartarusError
from tartarus.model.sandbox import ExecSpec, SandboxSpec
from tartarus.model.secrets import Reference, SecretUse, variable_of
from tartarus.model.settings import Settings
from tartarus.sdk.specs import parse_secret


@pytest.mark.parametrize(
    "text",
    [
        "env:../TOKEN", "vault:kv/../other#x", "vault:kv//x#y", "vault:/kv/x", "vault:kv/.", "vault:kv/%2e%2e/x", "a:b#c#d",
        "vault:kv/app#", "env:", ":x", "env:a b", "env:a\n", "env:a\0", "vault:kv/app?version=1", "x" * 600, "é:x", "env:x\\..\\y",
    ],
)  # fmt: skip
def test_references_that_climb_or_can_be_read_in_two_ways_are_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        Reference.parse(text)
    with pytest.raises(InvalidRequest):
        SecretUse(text)


@settings(max_examples=50)
@given(st.text(max_size=40))
def test_no_reference_ever_climbs(text: str) -> None:
    try:
        found = Reference.parse(f"p:{text}")
    except InvalidRequest:
        return
    assert not {"", ".", ".."} & set(found.path.split("/"))
    assert found.path.isascii()


@pytest.mark.parametrize(
    "use",
    [
        {"target": "/etc/passwd"}, {"target": "/run/secrets/../x"}, {"target": "/run/secrets/"}, {"target": "/run/secrets/a/b"},
        {"target": "/run/secrets/.x"}, {"as": "env", "target": "A=B"}, {"as": "env", "target": "/run/secrets/x"}, {"as": "argv"},
        {"value": "x"},
    ],
)  # fmt: skip
def test_targets_elsewhere_are_refused(use: dict[str, str]) -> None:
    with pytest.raises((InvalidRequest, msgspec.ValidationError)):
        msgspec.convert({"ref": "token"} | use, SecretUse)


def test_the_short_form_says_all() -> None:
    assert parse_secret("token") == SecretUse("token")
    assert parse_secret("vault:kv/app#t,as=env,target=T") == SecretUse("vault:kv/app#t", "env", "T")
    for text in ("token,as=argv", "token,mode=1", "token,as", "token,as=env,as=file", ""):
        with pytest.raises(TartarusError):
            parse_secret(text)
    assert variable_of("db-token.v2") == "DB_TOKEN_V2"
    assert variable_of("2nd") == "_2ND"


def test_a_spec_has_names_and_never_too_many() -> None:
    command = ExecSpec(argv=("true",))
    with pytest.raises(InvalidRequest, match="needs the command"):
        SandboxSpec(secrets=(SecretUse("a", "env"),))
    with pytest.raises(InvalidRequest, match="same target"):
        SandboxSpec(command=command, secrets=(SecretUse("a", "env", "X"), SecretUse("b", "env", "X")))
    with pytest.raises(InvalidRequest, match="at most 32"):
        SandboxSpec(command=command, secrets=tuple(SecretUse(f"s{n}") for n in range(33)))
    spec = SandboxSpec(command=command, secrets=(SecretUse("a", "env", "X"),))
    assert msgspec.json.decode(msgspec.json.encode(spec), type=SandboxSpec) == spec
    assert b'{"ref":"a","as":"env","target":"X"}' in msgspec.json.encode(spec)


PROVIDERS = "secrets:\n  providers:\n    - {name: env, kind: env-file, options: {path: /s}}\n  allow:\n"


@pytest.mark.parametrize(
    ("allow", "says"),
    [
        ('    - {name: a, ref: "vault:x"}', "line 5: secrets.allow[0].ref: there is no provider 'vault'"),
        ('    - {name: a, ref: "env:../x"}', "line 5: secrets.allow[0].ref: a reference's path has"),
        ('    - {name: "a b", ref: "env:x"}', "line 5: secrets.allow[0].name: it is no name"),
        ('    - {name: a, ref: "env:x"}\n    - {name: a, ref: "env:y", tenants: [t]}', "line 6: secrets.allow[1]: a sandbox could"),
        ('    - {name: a, ref: "env:x", deliver: []}', "secrets.allow[0].deliver: it is empty"),
        ('    - {name: a, ref: "env:x", tenant: t}', "line 5: unknown key 'tenant' in secrets.allow[0] (did you mean 'tenants'?)"),
        ('    - {name: a, ref: "env:x", deliver: [argv]}', "'argv' is none of the values"),
    ],
)  # fmt: skip
def test_a_grant_that_is_wrong_stops_the_daemon(allow: str, says: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        configured(Settings.at(Path("/s")), PROVIDERS + allow)
    assert says in str(caught.value)


def test_one_name_may_be_two_tenants_own() -> None:
    allow = '    - {name: a, ref: "env:x", tenants: [t]}\n    - {name: a, ref: "env:y", tenants: [u]}'
    found = configured(Settings.at(Path("/s")), PROVIDERS + allow)
    assert [grant.ref for grant in found.secret_grants] == ["env:x", "env:y"]
