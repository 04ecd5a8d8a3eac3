"""What is decided about saved sandboxes before anything starts."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from tartarus.images.memory import Facts
from tartarus.model.errors import InvalidRequest, SnapshotRefused, Unsupported
from tartarus.model.sandbox import ExecSpec, Isolation, Mount, ResourceRequest, Resources, SandboxSpec
from tartarus.model.template import Template
from tartarus.node.memory import Source, check_foreign, check_needs, continued
from tartarus.node.offers import Offer

COMMAND = ExecSpec(argv=("sleep", "1"))
SAVED = SandboxSpec(
    isolation=Isolation.GVISOR, command=COMMAND, env={"A": "1", "B": "2"}, workdir="/srv", timeout_s=5.0, name="old",
    labels={"old": "1"}, stop_signal="INT",
)  # fmt: skip


def source(spec: SandboxSpec = SAVED, **changes: Any) -> Source:
    offer = Offer(template=Template(id="host", name="Host", base="host"), key="built-in:host")
    facts = Facts(
        isolation="gvisor", needs={"monitor": "x"}, offer=msgspec.to_builtins(offer), resources=Resources(),
        details={"spec": msgspec.to_builtins(spec)},
    )  # fmt: skip
    return Source(msgspec.structs.replace(facts, **changes))


def test_it_goes_on_as_it_was_and_as_it_is_asked_to():
    plain = continued(SandboxSpec(snapshot="s", name="new"), source())
    assert (plain.command, plain.env, plain.workdir) == (COMMAND, {"A": "1", "B": "2"}, "/srv")
    assert (plain.timeout_s, plain.name, plain.labels, plain.stop_signal) == (None, "new", {}, "INT")
    assert plain.resources.over(Resources(pids=9)) == Resources()
    assert plain.snapshot == "s"
    other = ExecSpec(argv=("true",))
    asked = continued(
        SandboxSpec(snapshot="s", command=other, env={"B": "3"}, stop_signal="HUP", timeout_s=9.0), source()
    )
    assert (asked.command, asked.env, asked.stop_signal, asked.timeout_s) == (other, {"A": "1", "B": "3"}, "HUP", 9.0)
    assert asked.isolation is Isolation.GVISOR


@pytest.mark.parametrize(
    ("spec", "error"),
    [
        (SandboxSpec(isolation=Isolation.MICROVM), Unsupported),
        (SandboxSpec(resources=ResourceRequest(disk_bytes=2**20)), InvalidRequest),
        (SandboxSpec(mounts=(Mount("/a", "/b"),)), InvalidRequest),
    ],
)
def test_what_memory_can_not_become_is_refused(spec, error):
    with pytest.raises(error):
        continued(spec, source())


def test_same_limits_said_aloud_are_fine():
    assert continued(SandboxSpec(resources=ResourceRequest(memory_bytes=512 * 1024**2)), source()).command == COMMAND


def test_every_difference_is_named():
    check_needs({"a": "1"}, {"a": "1"})
    with pytest.raises(
        SnapshotRefused, match=r"a was '1' and is '2'; b was 'nothing' and is '3'; c was '4' and is 'nothing'"
    ):
        check_needs({"a": "1", "c": "4"}, {"a": "2", "b": "3"})


@pytest.mark.parametrize(
    "changes",
    [
        {"details": {}},
        {"details": {"spec": {"command": 5}}},
        {"details": {"spec": {"name": "-"}}},
        {"isolation": "none"},
        {"offer": {}},
        {"session": {"channel": {"version": 99}}},
        {"details": {"spec": {"mounts": [{"source": "/root", "target": "/mnt"}]}}},
    ],
)
def test_sets_from_elsewhere_that_make_no_sense_are_refused(changes):
    check_foreign(source())
    with pytest.raises(SnapshotRefused):
        check_foreign(source(**changes))
