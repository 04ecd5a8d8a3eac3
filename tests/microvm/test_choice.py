"""Which monitor runs the machines: tried in order, proved by booting, never replaced when it was set."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from tartarus.model.configuration import configured
from tartarus.model.errors import InvalidRequest, IsolationUnavailable
from tartarus.model.settings import MicrovmMonitor, Settings
from tartarus.node.doctor import check_monitors
from tartarus.runtimes.microvm import choice, versions
from tartarus.runtimes.microvm.launcher import Launcher
from tartarus.runtimes.microvm.versions import CLOUD_HYPERVISOR, FIRECRACKER, MONITORS, QEMU, version_of

LAUNCHER = cast("Launcher", None)  # making a driver starts nothing


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Puts programs that tell a version where programs are looked for, and nothing else."""
    monkeypatch.setenv("PATH", str(tmp_path))

    def put(name: str, words: str) -> None:
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\necho '{words}'\n")
        path.chmod(0o755)

    return iter([put])


@pytest.fixture
def put(programs: Any) -> Any:
    """The same, as a function."""
    return next(programs)


def test_versions(tmp_path: Path, put: Any) -> None:
    """Each monitor's own way to tell; too old, unreadable and missing ones are refused with what to do."""
    for monitor, words, wanted in (
        (QEMU, "QEMU emulator version 7.2.22 (Debian 1:7.2)", "QEMU 7.2.22"),
        (FIRECRACKER, "Firecracker v1.17.0", "Firecracker 1.17.0"),
        (CLOUD_HYPERVISOR, "cloud-hypervisor v53.0", "Cloud Hypervisor 53.0"),
    ):
        put(monitor.program, words)
        assert version_of(str(tmp_path / monitor.program), monitor) == wanted
    for monitor, words in (
        (QEMU, "QEMU emulator version 5.2.0"), (FIRECRACKER, "Firecracker v1.7.0"), (FIRECRACKER, ""),
        (CLOUD_HYPERVISOR, "cloud-hypervisor v50.2"), (CLOUD_HYPERVISOR, "no version"),
    ):  # fmt: skip
        put(monitor.program, words)
        with pytest.raises(IsolationUnavailable, match="too old"):
            version_of(str(tmp_path / monitor.program), monitor)
    with pytest.raises(IsolationUnavailable, match="can't be run"):
        version_of(str(tmp_path / "missing"), FIRECRACKER)


def test_the_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """QEMU with and without hardware virtualisation, then the others, which need it."""
    monkeypatch.setattr(choice, "KVM", tmp_path / "no-kvm")
    tried = choice.candidates(MicrovmMonitor.AUTO, LAUNCHER, tmp_path)
    assert [(one.monitor.name, one.accelerator, bool(one.no)) for one in tried] == [
        ("qemu", "kvm", True), ("qemu", "tcg", False), ("firecracker", "kvm", True), ("cloud-hypervisor", "kvm", True),
    ]  # fmt: skip
    (tmp_path / "no-kvm").touch()
    tried = choice.candidates(MicrovmMonitor.AUTO, LAUNCHER, tmp_path)
    assert all(one.probe for one in tried if one.accelerator == "kvm")
    assert not any(one.no for one in tried)


@pytest.mark.parametrize("wanted", [one for one in MicrovmMonitor if one is not MicrovmMonitor.AUTO])
def test_a_monitor_that_was_set_is_never_replaced(tmp_path: Path, put: Any, wanted: MicrovmMonitor) -> None:
    """It alone is tried, and its absence is an error even where others are installed."""
    tried = choice.candidates(wanted, LAUNCHER, tmp_path)
    assert {one.monitor.name for one in tried} == {wanted.value}
    for monitor in MONITORS:
        if monitor.name != wanted.value:
            put(monitor.program, "version 99.0")
    choice.require_some(MicrovmMonitor.AUTO)
    with pytest.raises(IsolationUnavailable, match="is missing"):
        choice.require_some(wanted)
    put(next(one.program for one in MONITORS if one.name == wanted.value), "version 99.0")
    choice.require_some(wanted)


def test_no_monitor_at_all(tmp_path: Path, put: Any) -> None:
    """The reason says what to install."""
    with pytest.raises(IsolationUnavailable, match="no virtual machine monitor") as refused:
        choice.require_some(MicrovmMonitor.AUTO)
    assert "qemu-system" in refused.value.fix


def test_the_setting(tmp_path: Path) -> None:
    """In the configuration file, checked with the line."""
    settings = Settings.at(tmp_path)
    assert settings.microvm_monitor is MicrovmMonitor.AUTO
    changed = configured(settings, "microvm:\n  monitor: firecracker\n")
    assert changed.microvm_monitor is MicrovmMonitor.FIRECRACKER
    with pytest.raises(InvalidRequest, match="monitor"):
        configured(settings, "microvm:\n  monitor: vmware\n")


def test_doctor_says_what_was_proved(put: Any) -> None:
    """A row for each monitor; a contract-tested one is never shown as proved."""
    put(FIRECRACKER.program, "Firecracker v1.9.0")
    put(QEMU.program, "QEMU emulator version 7.2.0")
    rows = {check.name: check for check in check_monitors(choice.look())}
    assert rows["monitor qemu"].ok is True
    assert rows["monitor firecracker"].ok is None
    assert "contract-tested" in rows["monitor firecracker"].detail
    assert "Firecracker 1.9.0" in rows["monitor firecracker"].detail
    assert rows["monitor cloud-hypervisor"].ok is None
    assert "missing" in rows["monitor cloud-hypervisor"].detail
    assert all(versions_row.needed_for == ("microvm",) for versions_row in rows.values())
    assert len(rows) == len(versions.MONITORS)


def test_what_a_killed_daemon_left_is_cleared(tmp_path: Path) -> None:
    """Homes of monitors that are gone; links in them are not followed."""
    victim = tmp_path / "victim"
    victim.write_text("stays")
    left = tmp_path / "homes" / "abc"
    left.mkdir(parents=True)
    (left / "link").symlink_to(victim)
    (left / "memory").write_bytes(b"x")
    choice.clear_homes(tmp_path)
    assert os.listdir(tmp_path / "homes") == []
    assert stat.S_IMODE((tmp_path / "homes").stat().st_mode) == 0o700
    assert victim.read_text() == "stays"
