"""`tartarus seccomp` and `--security`: a profile from its recording to its end, by the command line."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from tests.cli.kit import refused, tartarus, text

pytestmark = [pytest.mark.needs("root", "cgroups"), pytest.mark.usefixtures("home")]
LISTING = ("sh", "-c", "mkdir /tmp/d; ls -a /tmp/d")
SIGSYS = 128 + signal.SIGSYS


def test_a_profile_from_its_recording_to_its_end() -> None:
    made = tartarus("seccomp", "record", "--save", "listing", *LISTING)
    assert (made.returncode, made.stderr) == (0, b".\n..\n")
    assert made.stdout.startswith(b"Profile listing allows ")
    assert "mkdir" in text("seccomp", "show", "listing").split()
    assert any(line.startswith("listing") and "yours" in line for line in text("seccomp", "list").splitlines())
    held = tartarus("seccomp", "test", "listing", *LISTING)
    assert (held.returncode, held.stdout) == (0, b"listing holds: the command ended well under it\n")
    broken = tartarus("seccomp", "test", "listing", "sh", "-c", "mkdir /tmp/e; ln -s a /tmp/b")
    assert broken.returncode == 1
    assert b"symlinkat" in broken.stdout
    assert tartarus("seccomp", "diff", "listing", "inferno").returncode == 1
    assert tartarus("seccomp", "diff", "ember", "ember").returncode == 0
    hard = ("--security", "seccomp_profile=listing", "--security", "seccomp_default=kill")
    assert tartarus("run", *hard, "--", *LISTING).returncode == 0
    assert tartarus("run", *hard, "--", "sh", "-c", "ln -s a /tmp/b; exit $?").returncode == SIGSYS
    assert text("seccomp", "rm", "listing") == "Profile listing removed\n"
    assert "profile_not_found" in refused("seccomp", "show", "listing")


def test_a_recording_is_printed_where_it_is_not_kept() -> None:
    done = tartarus("seccomp", "record", "true")
    assert done.returncode == 0
    assert {"execve", "exit_group"} <= set(json.loads(done.stdout)["calls"])


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("seccomp_profile", "seccomp_profile"),
        ("walls=high", "no security setting"),
        ("add_capabilities=ALL", "no capability"),
        ("uid_mapping=a:b", "no range of ids"),
        ("kernel_lockdown=integrity", "kernel"),
        ("seccomp_default=shrug", "shrug"),
    ],
)
def test_what_is_no_setting_is_refused_in_words(setting: str, says: str) -> None:
    assert says in refused("run", "--isolation", "container", "--security", setting, "--", "true")


def test_a_template_says_how_its_sandboxes_are_hardened(tmp_path: Path) -> None:
    file = tmp_path / "hard.yaml"
    file.write_text("id: hard\nsecurity:\n  seccomp_profile: ember\n  seccomp_default: kill\n")
    assert tartarus("template", "build", "-f", str(file)).returncode == 0
    assert tartarus("run", "--template", "hard", "--", "mount", "-t", "tmpfs", "x", "/tmp").returncode == SIGSYS
    looser = ("--security", "seccomp_default=errno")
    assert "the template demands" in refused("run", "--template", "hard", *looser, "--", "true")
    assert tartarus("template", "rm", "hard").returncode == 0
