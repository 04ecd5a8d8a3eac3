"""What becomes of each setting: decided whole, before anything is done."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tartarus.cli.options import RUN
from tartarus.cli.saved_request import over
from tartarus.compat import request_file
from tartarus.compat.copying import opened
from tartarus.compat.engines import ContainerLimits, ContainerMount, ContainerState
from tartarus.compat.places import refusal
from tartarus.compat.plan import Effect, MigrationPlan, Mounts, Secrets, Wishes, make_plan
from tartarus.compat.secrets import looks_secret, secret_arguments
from tartarus.model.errors import FileFailed, InvalidRequest, MigrationRefused
from tartarus.model.sandbox import ExecSpec, Isolation, ResourceRequest, SandboxSpec

STATE = ContainerState(engine="docker", id="abc", name="app", image="box", status="exited", argv=("/bin/true",))


def planned(wishes: Wishes | None = None, **changes: Any) -> MigrationPlan:
    return make_plan(msgspec.structs.replace(STATE, **changes), wishes or Wishes(name="app"))


def effects(plan: MigrationPlan, what: str) -> list[Effect]:
    return [finding.effect for finding in plan.findings if finding.what == what]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PASSWORD", "x"), ("DB_PASS", "x"), ("GITHUB_TOKEN", "x"), ("AWS_SECRET_ACCESS_KEY", "x"), ("MYPASSWORD", "x"),
        ("api_key", "x"), ("DATABASE_URL", "postgres://u:p@host/db"), ("KEY_FILE", "-----BEGIN RSA PRIVATE KEY-----\n"),
        ("X", "ghp_0123456789abcdefghij"), ("Y", "AKIAABCDEFGHIJKLMNOP"), ("REDIS", "redis://:pw@host"),
        ("SESSION", "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.x"), ("STRIPE", "sk-live_0123456789abcdef"),
    ],
)  # fmt: skip
def test_secrets(name: str, value: str) -> None:
    assert looks_secret(name, value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PATH", "/usr/bin"), ("COMPASS", "north"), ("KEYBOARD", "us"), ("PWD", "/srv"), ("TOKENIZERS_PARALLELISM", "true"),
        ("PASSWORD", ""), ("URL", "https://example.org/a@b"), ("MONKEY", "x"), ("AUTHOR", "me"), ("LANG", "C"),
    ],
)  # fmt: skip
def test_no_secrets(name: str, value: str) -> None:
    assert not looks_secret(name, value)


def test_secrets_in_a_command() -> None:
    argv = ("app", "--token=abc", "--password", "pw", "--verbose", "yes", "postgres://u:p@h/d", "plain")
    assert secret_arguments(argv) == [1, 3, 6]


def test_limits_are_carried_and_their_absence_is_told() -> None:
    plan = planned(limits=ContainerLimits(memory_bytes=6 << 20, cpu_milli=1500, pids=2))
    assert plan.request.resources == ResourceRequest(memory_bytes=8 << 20, cpu_milli=1500, pids=4, disk_bytes=1 << 30)
    assert (effects(plan, "memory"), effects(plan, "cpus")) == ([Effect.CHANGED], [Effect.CARRIED])
    plan = planned(Wishes(name="app", memory_bytes=1 << 30, isolation=Isolation.MICROVM))
    assert plan.request.resources.memory_bytes == 1 << 30
    assert plan.request.isolation is Isolation.MICROVM
    assert plan.definition.resources.default_memory == 1024
    with pytest.raises(InvalidRequest):
        planned(limits=ContainerLimits(memory_bytes=1 << 62))


@pytest.mark.parametrize("secrets", list(Secrets))
def test_secrets_are_only_where_they_are_wanted(secrets: Secrets) -> None:
    plan = planned(Wishes(name="app", secrets=secrets), env=("A=1", "API_TOKEN=s3cret", "HOSTNAME=x", "BARE"))
    assert plan.secrets == ("API_TOKEN",)
    assert plan.definition.env == {"A": "1"} | ({"API_TOKEN": "s3cret"} if secrets is Secrets.TEMPLATE else {})
    assert plan.request.env == ({"API_TOKEN": "s3cret"} if secrets is Secrets.REQUEST else {})
    assert "s3cret" not in str(plan.findings)


@pytest.mark.parametrize(
    "changes",
    [
        {"argv": ()}, {"argv": ("a\0b",)}, {"env": ("A=\0",)}, {"env": ("=x",)}, {"workdir": "a\0b"}, {"user": "\0"},
        {"argv": ("x" * 200_000,)}, {"user": "u" * 5000}, {"env": ("A=" + "x" * (1 << 21),)}, {"argv": ("",)},
        {"env": tuple(f"V{number}=" for number in range(5000))},
    ],
)  # fmt: skip
def test_what_no_process_could_be_given(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        planned(**changes)
    assert len(str(caught.value)) < 1000
    assert "\0" not in str(caught.value)


def test_mounts(tmp_path: Path) -> None:
    def mounted(kind: str, source: str, target: str) -> MigrationPlan:
        return planned(mounts=(ContainerMount(kind=kind, source=source, target=target),))

    data = str(tmp_path)
    assert [mount.target for mount in mounted("bind", data, "/data").request.mounts] == ["/data"]
    assert mounted("tmpfs", "", "/tmp").request.mounts == ()
    assert effects(mounted("npipe", data, "/x"), "mount /x") == [Effect.DROPPED]
    for source, target in (
        (data, "/proc/x"), (data, "relative"), (data, "/a/../b"), (data + "/missing", "/x"), ("relative", "/x"),
        (data + "\0", "/x"), ("/dev/null", "/x"), ("/", "/x"), ("/etc/shadow", "/x"), ("/run", "/x"),
    ):  # fmt: skip
        plan = mounted("bind", source, target)
        assert plan.request.mounts == ()
        assert len(plan.refused) == 1
    assert mounted("volume", data, "/x").refused  # no volume's place


def test_links_lead_no_further(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/etc")
    assert "what the host stands on" in refusal(str(tmp_path / "link"))
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "x.sock").write_text("")
    assert refusal(str(tmp_path), engine_socket=str(tmp_path / "engine" / "x.sock"))


def test_a_directory_that_became_a_link_is_not_copied(tmp_path: Path) -> None:
    """Who can write beside it might put a link to the host's files in its place, once it has been judged."""
    (tmp_path / "a" / "data").mkdir(parents=True)
    plan = make_plan(
        msgspec.structs.replace(STATE, mounts=(ContainerMount(kind="bind", source=f"{tmp_path}/a/data", target="/d"),)),
        Wishes(name="app", mounts=Mounts.COPY),
    )
    (copy,) = plan.copies
    os.close(opened(copy.source))
    for place in (tmp_path / "a" / "data", tmp_path / "a"):
        place.rename(f"{place}-away")
        place.symlink_to("/etc")
        with pytest.raises(OSError):
            opened(copy.source)
        place.unlink()


def test_too_many_settings() -> None:
    with pytest.raises(InvalidRequest):
        planned(ports=tuple(map(str, range(1000))))


def test_terminal_codes_are_not_shown() -> None:
    plan = planned(name="a\x1b[2J", image="\x1b]0;x\x07", ports=("80/\x1b",), restart="\n\nalways", others=("\x9b",))
    shown = msgspec.json.encode((plan.container, plan.image, plan.findings, plan.definition.labels)).decode()
    assert not any(mark in shown for mark in ("\\u001b", "\\u0007", "\\n", "\x9b"))


def values(**given: object) -> dict[str, object]:
    return {option.name: option.initial() for option in RUN} | given


@pytest.mark.parametrize("name", ["r.json", "r.yaml"])
def test_a_request_comes_back_as_it_was_saved(tmp_path: Path, name: str) -> None:
    path = str(tmp_path / name)
    request = SandboxSpec(
        template="app", isolation=Isolation.CONTAINER, command=ExecSpec(argv=("a", "yes", "1"), tty=True),
        env={"A": "no"}, resources=ResourceRequest(pids=40), labels={"k": "1.0"},
    )  # fmt: skip
    request_file.write(request, path)
    assert (tmp_path / name).stat().st_mode & 0o777 == 0o600
    spec = msgspec.convert(over(path, values(request=path), []), SandboxSpec)
    assert spec == request
    request_file.write(request, path)  # in the place of the first
    assert [entry.name for entry in tmp_path.iterdir()] == [name]
    changed = over(path, values(request=path, memory="64MiB", env=("B=2",), isolation="gvisor"), ["b"])
    assert changed["resources"] == {"pids": 40, "memory_bytes": 64 << 20}
    assert (changed["env"], changed["isolation"]) == ({"A": "no", "B": "2"}, "gvisor")
    assert changed["command"]["argv"] == ["b"]
    assert changed["command"]["tty"] is False


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{", b'{"privileged": true}', b"a: &a [*a]", b"\xff", b"!!python/object:os.system {}", b"{}"],
)
def test_files_that_are_no_requests(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "r").write_bytes(content)
    with pytest.raises(InvalidRequest):
        over(str(tmp_path / "r"), values(request="r"), [])


LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{c}: &{c} [*{b}, *{b}, *{b}, *{b}]\n" for b, c in itertools.pairwise("abcdefghijklm")
)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (LAUGHS, r"r, line 1: aliases and anchors"),
        ("template: host\nenv: {A: 'b'}\nlabels: &l {A: b}\n", r"r, line 3: aliases and anchors"),
        ("command: " + "[" * 100_000, r"r, line 1: nested too deeply"),
        ("template: host\n---\ntemplate: host\n", r"r, line 2: a second document"),
        ("# " + "x" * 300_000, r"r is 300002 bytes long"),
        ("envv: {}\n", r"r, line 1: unknown key 'envv' \(did you mean 'env'"),
        ("env:\n  A: 1\n", r"r, line 2: env.A: Expected `str`, got `int` \(put it in quotes"),
        ("env: {A: '1', A: '2'}\n", r"r, line 1: env.A is there twice"),
        ("template: !!python/name:os.system ''\n", r"r, line 1: template: a .* is not taken"),
    ],
)
def test_hostile_requests_are_refused_with_their_line(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "r").write_text(content)
    with pytest.raises(InvalidRequest, match=says):
        over(str(tmp_path / "r"), values(request="r"), [])


def test_places_that_are_taken(tmp_path: Path) -> None:
    (tmp_path / "there").symlink_to(tmp_path / "nowhere")
    with pytest.raises(MigrationRefused):
        request_file.check_free(str(tmp_path / "there"), replace=False)
    with pytest.raises(FileFailed):
        request_file.check_free(str(tmp_path), replace=True)
    with pytest.raises(FileFailed):
        request_file.check_free(str(tmp_path / "no" / "such"), replace=False)
