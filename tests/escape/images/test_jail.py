"""The jail from inside: if the child that unpacks were taken over, what could it do?"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.escape.images.ground import UID_BASE
from tests.escape.images.prisoner import attempts

from tartarus.guest import syscalls
from tartarus.images.unpack.inside import calls
from tartarus.images.unpack.inside.filter import seccomp_filter

pytestmark = pytest.mark.needs("user-namespaces")

# Where the answer is not the filter's.
_ANSWERS = {
    "sees": "EACCES|['source', 'target']",
    "works: write in the target": "done",
    "works: delete something": "done",
    "works: read the source": "done",
    "read the host's shadow": "ENOENT",
    "read by dot-dot": "ENOENT",
    "read by a descriptor's dot-dot": "ENOENT",
    "read through a link": "ELOOP",
    "read through a link up": "ELOOP",
    "read /proc": "ENOENT",
    "write beside the target": "EACCES|EROFS",
    "make a directory beside it": "EACCES|EROFS",
    "write in the source": "EACCES|EROFS",
    "make in the source": "EACCES|EROFS",
    "change a mode in the source": "EROFS|EPERM",
    "remove from the source": "EACCES|EROFS|EPERM",
    "link from the source": "EXDEV|EACCES",
    "make a disk": "EPERM|EACCES",
    "make a socket": "EACCES|EPERM",
    "give to a stranger": "EINVAL",
    "give to the host's root": "EINVAL",
    "write beyond the limit": "EFBIG",
    "take memory": "MemoryError",
    "import what was unpacked": "ModuleNotFoundError",
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("jail")
    target, source = root / "target", root / "source"
    for place in (target, source):
        place.mkdir()
        if UID_BASE is not None:
            os.chown(place, UID_BASE, UID_BASE)
    (source / "file").write_text("untouched")
    if UID_BASE is not None:
        os.chown(source / "file", UID_BASE, UID_BASE)
    found = attempts(target, source)
    assert (source / "file").read_text() == "untouched"
    assert os.listdir(source) == ["file"]
    return found


def test_nothing_but_the_work_can_be_done(answers: dict[str, str]) -> None:
    wrong = {name: answer for name, answer in answers.items() if answer not in _ANSWERS.get(name, "EPERM").split("|")}
    assert wrong == {}
    assert len(answers) > 55


def test_the_numbers_are_the_kernels() -> None:
    for column, machine in enumerate(("x86_64", "aarch64")):
        known = syscalls.table(machine)
        assert {name: both[column] for name, both in calls.NUMBERS.items()} == {
            name: known[name] for name in calls.NUMBERS
        }


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_fits(machine: str) -> None:
    assert len(seccomp_filter(machine)) // 8 < 4096


def test_no_child_outlives_a_prisoner(answers: dict[str, str], tmp_path: Path) -> None:
    del answers
    from tests.escape.images.ground import holders

    assert holders(tmp_path.parent) == []
