"""Advice about a host: what is good stays quiet, what is not says why and what to set; nothing is changed."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from tartarus.cli.app import main
from tartarus.node import hosthardening as host
from tartarus.node.doctor import Check


def test_the_report_is_advice_and_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    monkeypatch.setenv("TARTARUS_HOME", str(tmp_path / "home"))
    assert main(["doctor", "--security", "--json"]) == 0
    found = msgspec.convert(msgspec.json.decode(capfdbinary.readouterr().out)["checks"], list[Check])
    assert len({check.name for check in found}) == len(found) > 10
    for check in found:
        assert check.detail, check
        assert bool(check.fix) == (check.ok is not True) or check.name == "Landlock", check
    assert not (tmp_path / "home").exists()


def test_a_setting_is_good_bad_or_not_there(tmp_path: Path) -> None:
    wish = host.WISHES[0]
    assert host.check_sysctl(tmp_path, wish) is None
    place = tmp_path / "kernel" / "kptr_restrict"
    place.parent.mkdir()
    for value, good in (("0", None), ("1", True), ("2", True)):
        place.write_text(f"{value}\n")
        check = host.check_sysctl(tmp_path, wish)
        assert check is not None
        assert check.ok is good
    place.write_text("0\n")
    bad = host.check_sysctl(tmp_path, wish)
    assert bad is not None
    assert bad.fix == "sudo sysctl -w kernel.kptr_restrict=1"


def test_open_faults_of_the_processor_are_named(tmp_path: Path) -> None:
    (tmp_path / "meltdown").write_text("Not affected\n")
    (tmp_path / "retbleed").write_text("Vulnerable\n")
    (tmp_path / "mds").write_text("Mitigation: Clear CPU buffers\n")
    first, *rest = host.check_vulnerabilities(tmp_path)
    assert first.detail.startswith("2 of 3")
    assert [check.name for check in rest] == ["processor fault retbleed"]


@pytest.mark.parametrize(
    ("check", "text", "good"),
    [
        (host.check_same_page_merging, "1", None),
        (host.check_same_page_merging, "0", True),
        (host.check_huge_pages, "[always] madvise never", None),
        (host.check_huge_pages, "always [madvise] never", True),
        (host.check_lockdown, "[none] integrity confidentiality", None),
        (host.check_lockdown, "none [integrity] confidentiality", True),
        (host.check_core_pattern, "|/usr/lib/helper %p", None),
        (host.check_core_pattern, "core", True),
        (host.check_swap, "Filename Type\n/dev/sda2 partition 1", None),
        (host.check_swap, "Filename Type\n/dev/zram0 partition 1", True),
        (host.check_smt, "1", None),
    ],
)
def test_each_reads_what_the_kernel_says(tmp_path: Path, check: object, text: str, good: bool | None) -> None:
    place = tmp_path / "file"
    place.write_text(text)
    found = check(place)  # type: ignore[operator]
    assert found.ok is good
