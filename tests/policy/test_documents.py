"""Policy documents: the roadmap's own loads, overrides go the right way, mistakes are named."""

from __future__ import annotations

import pytest

from tartarus.model.errors import InvalidRequest
from tartarus.model.sandbox import Isolation
from tartarus.policy.documents import Limits, OnViolation, limits_of, read_policy

ROADMAP = """\
id: production-default
name: Production Default Policy
version: 1
network:
  deny_private: true
  deny_metadata: true
  allowed_egress_ports: [80, 443]
resources:
  max_cpu_cores: 4
  max_memory_mb: 8192
  max_duration: 5m
enforcement:
  on_timeout: kill
  on_resource_violation: throttle
  on_network_violation: quarantine
"""


def test_the_roadmaps_document_loads_as_it_stands() -> None:
    limits = limits_of([read_policy(ROADMAP)], "anyone", "python-ds")
    assert (limits.cpu_milli, limits.memory_bytes, limits.duration_s) == (4000, 8 * 2**30, 300.0)
    assert limits.network.allowed_egress_ports == (80, 443)
    assert (limits.network.deny_private, limits.network.deny_dns) == (True, None)
    assert (limits.on_timeout, limits.on_resources, limits.on_network) == (
        OnViolation.KILL, OnViolation.THROTTLE, OnViolation.QUARANTINE,
    )  # fmt: skip
    assert limits.documents == ("production-default",)


def test_templates_below_tenants_and_nothing_for_others() -> None:
    general = read_policy(
        "id: z\nresources: {max_pids: 10, default_timeout: 1m}\ntemplates:\n"
        "- {id: t, default_timeout: 2m, max_instances: 3, isolation: gvisor, allowed_callers: [ada, bob]}"
    )
    tenant = read_policy(
        "id: a\ntenants: [acme]\nresources: {max_pids: 20}\nisolation: container\n"
        "templates: [{id: t, max_instances: 5, allowed_callers: [bob, eve]}]"
    )
    both = [tenant, general]
    limits = limits_of(both, "acme", "t")
    assert (limits.pids, limits.default_timeout_s, limits.instances) == (20, 120.0, 5)
    assert (limits.floor, limits.callers, limits.documents) == (Isolation.GVISOR, ("bob",), ("z", "a"))
    other = limits_of(both, "zeta", "t")
    assert (other.pids, other.instances, other.callers) == (10, 3, ("ada", "bob"))
    assert limits_of(both, "zeta", "u") == Limits(pids=10, default_timeout_s=60.0, documents=("z",))
    assert limits_of([], "zeta", "u") == Limits()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("id: ' '", "line 1: id: it is empty"),
        ("id: a\nresources: {max_cpus: 4}", "line 2: unknown key 'max_cpus' in resources"),
        ("id: a\nresources: {max_cpu_cores: 0}", "line 2: resources.max_cpu_cores: it is not above 0"),
        ("id: a\nresources:\n  max_duration: soon", "line 3: resources.max_duration: 'soon' is not a duration"),
        ("id: a\nenforcement: {on_timeout: explode}", "'explode' is none of the values"),
        ("id: a\nnetwork: {allowed_egress_ports: [0]}", "0 is no port"),
        ("id: a\nnetwork: {denied_cidrs: [10.0.0.1/8]}", "has host bits set"),
        ("id: a\ntemplates: [{id: t}, {id: t}]", "the template 't' is there twice"),
        ("id: a\ntemplates: [{id: t, default_timeout: x}]", "templates[0].default_timeout"),
        ("name: a", "id"),
        ("id: a\nresources: {max_cpu_cores: .inf}", "line 2: resources.max_cpu_cores: it is out of range"),
        ("id: a\nresources: {max_cpu_cores: .nan}", "line 2: resources.max_cpu_cores: it is not above 0"),
        ("id: a\nresources: {max_total_cpu_cores: 1.0e+308}", "max_total_cpu_cores: it is out of range"),
        ("id: a\nresources: {max_memory_mb: 1" + "0" * 30 + "}", "max_memory_mb: it is out of range"),
        ("id: a\nresources: {max_duration: .inf}", "out of range"),
        ("id: a\ntenants: &t [x, *t]", "aliases and anchors"),
        ("a: &a [x]\nb: &b [*a, *a]\nid: [*b, *b]", "line 1: aliases and anchors"),
        ("id: a\nname: " + "[" * 5000, "nested too deeply"),
        ("id: a\n" + "#" * 300_000, "300006 bytes long"),
        ("id: a\nname: !!python/name:os.system x", "is not taken"),
        ("id: a\nenforcement: {quarantine_when: [" + "{violation: pids, count: 1}," * 33 + "]}", "too many rules"),
        (
            "id: a\ntemplates: [" + "".join(f"{{id: t{number}}}," for number in range(14000)) + "{id: t0}]",
            "is there twice",
        ),
    ],
    ids=lambda value: value[:60],
)
def test_mistakes_are_named_with_their_line(text: str, says: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_policy(text, "p.yaml")
    assert says in str(caught.value)
