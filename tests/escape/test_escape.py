"""Every attack of the catalogue at every level it applies to, in real sandboxes. docs/escape-tests.md lists them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.escape import kit
from tests.escape.arena import Arena, run
from tests.escape.attack import LEVELS, OWN_KERNELS, Attack, every, load

from tartarus.model.sandbox import Isolation

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.anyio, pytest.mark.needs("system-python")]


def cases() -> Iterator[object]:
    """One test case for each attack and level. A hole that is known and not closed is expected to fail, strictly."""
    for attack in load().values():
        for level in LEVELS:
            if not attack.made_at(level):
                continue
            marks = [pytest.mark.needs(need) for need in attack.needs]
            if level is Isolation.CONTAINER and os.geteuid() != 0:
                marks.append(pytest.mark.needs("user-namespaces"))
            if level is Isolation.GVISOR:
                marks += [pytest.mark.needs("root", "cgroups", "runsc")]
            if level is Isolation.MICROVM:
                marks += [pytest.mark.needs("root", "cgroups", "microvm")]
            hole = attack.holes.get(level)
            marks += [pytest.mark.xfail(reason=hole, strict=True)] if hole else []
            yield pytest.param(attack, level, id=f"{level.value}-{attack.id}", marks=marks)


@pytest.mark.parametrize(("attack", "level"), list(cases()))
async def test_an_attack_is_held(arena: Arena, attack: Attack, level: Isolation) -> None:
    async with arena.untouched(level):
        answers = await run(arena, attack, level)
    named = answers if isinstance(answers, dict) else {"": answers}
    assert named, "an attack must try something"
    if level in attack.own:
        return
    wrong = {what: answer for what, answer in named.items() if answer not in attack.expected[level]}
    assert not wrong, f"expected {' or '.join(sorted(attack.expected[level]))}: {wrong}"


def test_the_catalogue_is_large_and_honest() -> None:
    attacks = load().values()
    for level in LEVELS:
        assert sum(attack.made_at(level) for attack in attacks) >= 90
    for attack in attacks:
        assert attack.expected, attack.id
        for answers in attack.expected.values():
            assert kit.ESCAPED not in answers, attack.id
            assert all(answers), attack.id


@pytest.mark.parametrize("level", OWN_KERNELS)
def test_every_attack_is_made_where_kernels_are_the_guests_own_or_says_why_not(level: Isolation) -> None:
    attacks = every()
    named = [name for name in OWN_KERNELS[level].named() if not name.endswith("/*")]
    assert sorted(named) == sorted(set(named) & attacks.keys())
    for attack in attacks.values():
        assert sum(level in given for given in (attack.expected, attack.own, attack.absent)) == 1, attack.id


def test_the_page_about_them_is_current() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/escape_tests_page.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
