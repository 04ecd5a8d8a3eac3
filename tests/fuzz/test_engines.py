"""What other engines say, at random: read or refused, never believed further than it was checked."""

from __future__ import annotations

from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from tartarus.compat import containerd_nouns, docker_nouns
from tartarus.compat.engines import ContainerLimits, ContainerMount, ContainerState, shown
from tartarus.compat.plan import Effect, Mounts, Secrets, Wishes, make_plan
from tartarus.compat.request_file import encode
from tartarus.compat.snapshot import archive_argv
from tartarus.compat.wire import demultiplexed
from tartarus.model.errors import EngineFailed, InvalidRequest
from tartarus.model.sandbox import SandboxSpec

TEXT = st.text(max_size=40) | st.sampled_from(
    ["", "/", "/proc", "/etc/../x", "..", "a=b", "--x", "\0", "\x1b[2J", "host"]
)
WORDS = st.lists(TEXT, max_size=6).map(tuple)
AMOUNT = st.none() | st.integers(-(2**63), 2**63)
MOUNT = st.builds(
    ContainerMount, kind=st.sampled_from(["bind", "volume", "tmpfs", "x"]), source=TEXT, target=TEXT, name=TEXT
)
STATE = st.builds(
    ContainerState, engine=st.just("docker"), id=TEXT, name=TEXT, image=TEXT, status=TEXT, argv=WORDS, env=WORDS,
    workdir=TEXT, user=TEXT, tty=st.booleans(), labels=st.dictionaries(TEXT, TEXT, max_size=5),
    limits=st.builds(ContainerLimits, memory_bytes=AMOUNT, cpu_milli=AMOUNT, pids=AMOUNT),
    mounts=st.lists(MOUNT, max_size=4).map(tuple), network=TEXT, ports=WORDS, restart=TEXT, powers=WORDS, others=WORDS,
)  # fmt: skip
WISHES = st.builds(
    Wishes, name=st.just("app"), secrets=st.sampled_from(Secrets), mounts=st.sampled_from(Mounts),
    drop_refused=st.booleans(),
)  # fmt: skip
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)
FIELDS = ("Id", "Name", "Path", "Args", "State", "Config", "HostConfig", "Mounts", "ID", "Spec", "Labels", "Image")


@settings(max_examples=150, deadline=None)
@given(STATE, WISHES)
def test_a_plan_is_whole_or_refused(state: ContainerState, wishes: Wishes) -> None:
    refused = ""
    try:
        plan = make_plan(state, wishes)
    except InvalidRequest as error:
        refused = str(error)
    assert refused.isprintable()
    if refused:
        return
    assert msgspec.json.decode(encode(plan.request), type=SandboxSpec) == plan.request
    for finding in plan.findings:
        assert all(letter.isprintable() for letter in finding.what + finding.detail)
    if state.powers and not wishes.drop_refused:
        assert plan.refused
    if wishes.drop_refused:
        assert not plan.refused
    if wishes.mounts is not Mounts.KEEP:
        assert plan.request.mounts == ()
    held = {Secrets.NONE: {}, Secrets.REQUEST: plan.request.env, Secrets.TEMPLATE: plan.definition.env}
    for secret in plan.secrets:
        assert (secret in held[wishes.secrets]) == (wishes.secrets is not Secrets.NONE)
    assert {finding.effect for finding in plan.findings} <= set(Effect)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=8), JSON, max_size=8))
def test_any_json_is_a_container_or_none(document: dict[str, Any]) -> None:
    content = msgspec.json.encode(document)
    for kind, read in (
        (docker_nouns.ContainerAnswer, lambda found: docker_nouns.state(found, "docker")),
        (containerd_nouns.ContainerAnswer, lambda found: containerd_nouns.state(found, "running")),
        (docker_nouns.ListedAnswer, lambda found: docker_nouns.summary(found, "docker", "x")),
    ):
        try:
            found = msgspec.json.decode(content, type=kind)
        except msgspec.MsgspecError:
            continue
        read(found)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.binary(max_size=40), max_size=10))
def test_frames(pieces: list[bytes]) -> None:
    try:
        sent = sum(len(piece) for _, piece in demultiplexed(iter(pieces)))
    except ValueError:
        return
    assert sent <= sum(map(len, pieces))


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=80) | st.text(max_size=40).map(lambda text: f"mount -t overlay overlay /mnt -o {text}"))
def test_mounts_of_a_snapshot(text: str) -> None:
    try:
        words = archive_argv(text)
    except EngineFailed:
        return
    assert all(word.startswith("/") for word in words[5:])


@given(st.text(max_size=300), st.integers(1, 250))
def test_what_is_shown(text: str, most: int) -> None:
    assert len(shown(text, most)) <= most
    assert shown(text, most).isprintable()
