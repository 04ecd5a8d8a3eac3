"""`examples/levels.py`: one numpy job, the same answer at every level, gVisor and an emulated machine really run."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.node.images import guest_images
from tests.project.test_examples import TARTARUS, environ
from tests.project.test_project import ROOT

pytestmark = pytest.mark.needs("root", "cgroups", "runsc", "microvm")
LEVELS = ["process", "container", "gvisor", "microvm"]


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    """A state directory with a guest kernel; on a disk, since machines are kept there."""
    with tempfile.TemporaryDirectory(prefix="tt-levels-", dir="/var/tmp") as place:
        Path(place).chmod(0o711)
        with guest_images(Path(place)):
            yield Path(place)
            subprocess.run([TARTARUS, "down"], env=environ(Path(place)), capture_output=True, timeout=60, check=False)


def test_every_level_gives_the_same_answer(home: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "levels.py"), *LEVELS],
        env=environ(home), capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    rows = {words[0]: words for line in done.stdout.splitlines()[3:] if (words := line.split())}
    assert sorted(rows) == sorted(LEVELS)
    assert {words[1] for words in rows.values()} == {"83332.813"}
    assert all(words[-1] == "warm" for words in rows.values())
