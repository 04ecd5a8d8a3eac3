"""Each field of a SecurityConfig at each level: honoured, or refused in words; and how two of them combine."""

from __future__ import annotations

import itertools

import pytest

from tartarus.model.errors import InvalidRequest
from tartarus.model.sandbox import Isolation
from tartarus.model.security import CAPABILITIES, IdMapping, Lockdown, SeccompAction, SecurityConfig, combined
from tartarus.model.template import RunAs
from tartarus.policy.documents import SecurityPolicy, stricter
from tartarus.policy.hardening import shortfalls
from tartarus.runtimes.confine.narrowing import AGENT, FALLS_BACK
from tartarus.runtimes.confine.profiles import BUILT_IN
from tartarus.runtimes.confine.seccomp import rules_by_name
from tartarus.runtimes.hardening import hardening, refused
from tartarus.runtimes.idmap import IdMap

MAP = IdMap(1000, 65536, privileged=True)
PROCESS, CONTAINER, GVISOR, MICROVM, WASM = (
    Isolation.PROCESS, Isolation.CONTAINER, Isolation.GVISOR, Isolation.MICROVM, Isolation.WASM,
)  # fmt: skip
LEVELS = (PROCESS, CONTAINER, GVISOR, MICROVM, WASM)
ONE = (IdMapping(container_id=0, size=10),)
NAMESPACED = {CONTAINER, GVISOR, WASM}
HONOURED = [
    (SecurityConfig(), {*LEVELS}),
    (SecurityConfig(hardened_kernel=True), {MICROVM}),
    (SecurityConfig(hardened_kernel=False), {*LEVELS}),
    (SecurityConfig(kernel_lockdown=Lockdown.INTEGRITY), {MICROVM}),
    (SecurityConfig(kernel_lockdown=Lockdown.NONE), {*LEVELS}),
    (SecurityConfig(seccomp_profile="ember"), {PROCESS, CONTAINER, GVISOR, MICROVM}),
    (SecurityConfig(seccomp_default=SeccompAction.ERRNO), {*LEVELS}),
    (SecurityConfig(seccomp_default=SeccompAction.KILL), {PROCESS, CONTAINER}),
    (SecurityConfig(seccomp_profile="ember", seccomp_default=SeccompAction.KILL), {PROCESS, CONTAINER, MICROVM}),
    (SecurityConfig(seccomp_profile="ember", seccomp_default=SeccompAction.TRAP),
     {PROCESS, CONTAINER, GVISOR, MICROVM}),
    (SecurityConfig(drop_capabilities=("ALL",)), {*LEVELS}),
    (SecurityConfig(drop_capabilities=("NET_RAW",)), {PROCESS, CONTAINER, GVISOR, WASM}),
    (SecurityConfig(add_capabilities=("CHOWN",)), {CONTAINER, GVISOR, MICROVM}),
    (SecurityConfig(add_capabilities=("SYS_ADMIN",)), set()),
    (SecurityConfig(user_namespace=True), NAMESPACED),
    (SecurityConfig(user_namespace=False), {PROCESS, MICROVM}),
    (SecurityConfig(uid_mapping=ONE, gid_mapping=ONE), NAMESPACED),
    (SecurityConfig(uid_mapping=ONE), set()),
    (SecurityConfig(uid_mapping=(IdMapping(0, 10, 0),), gid_mapping=(IdMapping(0, 10, 0),)), set()),
    (SecurityConfig(uid_mapping=(IdMapping(0, 70000),), gid_mapping=(IdMapping(0, 70000),)), set()),
    (SecurityConfig(uid_mapping=(IdMapping(5, 10),), gid_mapping=(IdMapping(5, 10),)), set()),
]  # fmt: skip


@pytest.mark.parametrize(("config", "levels"), HONOURED)
def test_a_field_is_honoured_or_refused(config: SecurityConfig, levels: set[Isolation]) -> None:
    for level in LEVELS:
        against = list(refused(config, level, MAP, RunAs()))
        assert bool(against) == (level not in levels), level
        assert all(what and why and fix for what, why, fix in against)


def test_a_mapping_has_room_for_the_templates_user() -> None:
    config = SecurityConfig(uid_mapping=ONE, gid_mapping=ONE)
    assert list(refused(config, CONTAINER, MAP, RunAs(uid=10)))
    assert not list(refused(config, CONTAINER, MAP, RunAs(uid=9)))


def test_capabilities_are_dropped_where_there_are_any() -> None:
    assert hardening(SecurityConfig(drop_capabilities=("ALL",)), None, CONTAINER).dropped == 0
    kept = hardening(SecurityConfig(drop_capabilities=("ALL",), add_capabilities=("CHOWN",)), None, MICROVM)
    assert (kept.dropped, kept.added) == ((1 << len(CAPABILITIES)) - 2, 1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"drop_capabilities": ("NOTHING",)},
        {"add_capabilities": ("ALL",)},
        {"add_capabilities": ("CHOWN",), "drop_capabilities": ("CAP_CHOWN",)},
        {"seccomp_profile": "../etc"},
    ],
)
def test_nonsense_is_refused_at_the_edge(wrong: dict[str, tuple[str, ...]]) -> None:
    with pytest.raises(InvalidRequest):
        SecurityConfig(**wrong)  # type: ignore[arg-type]


def test_a_request_tightens_what_its_template_says() -> None:
    template = SecurityConfig(seccomp_profile="ember", add_capabilities=("CHOWN", "KILL"), drop_capabilities=("ALL",))
    asked = SecurityConfig(seccomp_default=SeccompAction.KILL, drop_capabilities=("KILL",))
    both = combined(template, asked)
    assert both is not None
    assert (both.seccomp_profile, both.seccomp_default) == ("ember", SeccompAction.KILL)
    assert both.added == {"CHOWN"}
    assert combined(template, None) == template
    assert combined(None, asked) == asked


@pytest.mark.parametrize(
    ("template", "asked"),
    [
        (SecurityConfig(seccomp_profile="ember"), SecurityConfig(seccomp_profile="inferno")),
        (SecurityConfig(seccomp_default=SeccompAction.KILL), SecurityConfig(seccomp_default=SeccompAction.ERRNO)),
        (SecurityConfig(kernel_lockdown=Lockdown.INTEGRITY), SecurityConfig(kernel_lockdown=Lockdown.NONE)),
        (SecurityConfig(hardened_kernel=True), SecurityConfig(hardened_kernel=False)),
        (SecurityConfig(user_namespace=True), SecurityConfig(user_namespace=False)),
        (SecurityConfig(drop_capabilities=("ALL",)), SecurityConfig(add_capabilities=("CHOWN",))),
        (SecurityConfig(uid_mapping=ONE), SecurityConfig(uid_mapping=(IdMapping(0, 11),))),
    ],
)
def test_a_request_loosens_nothing(template: SecurityConfig, asked: SecurityConfig) -> None:
    with pytest.raises(InvalidRequest):
        combined(template, asked)


def test_minima_of_policies_only_rise() -> None:
    one = SecurityPolicy(seccomp_profiles=("ember", "flame"), seccomp_default=SeccompAction.TRAP, user_namespace=True)
    other = SecurityPolicy(
        seccomp_profiles=("flame", "blaze"), seccomp_default=SeccompAction.KILL, kernel_lockdown=Lockdown.INTEGRITY,
        drop_capabilities=("CHOWN",),
    )  # fmt: skip
    both = stricter(one, other)
    assert both.seccomp_profiles == ("flame",)
    assert both.seccomp_default is SeccompAction.KILL
    assert (both.kernel_lockdown, both.user_namespace) == (Lockdown.INTEGRITY, True)
    assert stricter(other, one) == both
    asked = SecurityConfig(add_capabilities=("CHOWN",))
    assert len(list(shortfalls(asked, PROCESS, both))) == 5
    enough = SecurityConfig(
        kernel_lockdown=Lockdown.CONFIDENTIALITY, seccomp_profile="flame", seccomp_default=SeccompAction.KILL,
        drop_capabilities=("ALL",),
    )  # fmt: skip
    assert list(shortfalls(enough, MICROVM, both)) == []


def test_built_in_profiles_lie_within_one_another_and_within_the_level() -> None:
    order = [BUILT_IN[name][1] for name in ("examine", "ember", "flame", "blaze")]
    named = rules_by_name(CONTAINER)
    for smaller, larger in itertools.pairwise(order):
        assert smaller is not None
        assert larger is not None
        assert smaller | AGENT < larger | AGENT
        assert larger <= named.keys()
    assert not AGENT & FALLS_BACK
    assert named.keys() >= AGENT
