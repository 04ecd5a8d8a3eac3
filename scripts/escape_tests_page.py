"""Write docs/escape-tests.md from the catalogue of attacks in tests/escape.

python3 scripts/escape_tests_page.py          write it
python3 scripts/escape_tests_page.py --check  exit with 1 when it is out of date
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

if TYPE_CHECKING:
    from tests.escape.attack import Attack

    from tartarus.model.sandbox import Isolation

PAGE = ROOT / "docs" / "escape-tests.md"
_NOTICE = "<!-- Written by scripts/escape_tests_page.py; change tests/escape instead. -->\n"
_HEAD = """\
# Escape tests

`tests/escape/` attacks real sandboxes: {container} attacks at the container level, {process} at the process level,
{gvisor} at the gVisor level and {microvm} at the microVM level, beside another tenant's sandbox, on a host that is full
of bait (files, sockets, ports, shared memory, keys and a process of the sandbox's own user, all open to everybody). An
attack names the one answer that means it was held. An attack that fails by itself does not count as held. After each
one the host is looked at: settings, mounts, devices, templates, bait and the neighbour must be what they were, and
nothing may be left over; the guest agent must still serve. Each has a sandbox of its own; at the gVisor and microVM
levels most programs of a door run in one, one after another.

The tables say what is tried and the answer that each level must give: an error that the kernel returns, or a word.
Several answers stand beside each other where one is as good as another, or where kernels differ. The answers are those
of a daemon that root runs. `visible`, `own`, `written` and their like are limits that a level has by design; the notes
say so, and the [threat model](threat-model.md) lists them. Rows marked **open** are attacks that get through today:
their tests are expected to fail, and fail the build when they no longer do.

Modules attack the WASM level in `tests/escape/test_wasm.py`: paths and links out of their directories, memory, tables,
stacks, descriptors and waits without end, mutated code, compiled code of their own. What would be native there is
held as in a container, and can start nothing.

Run them with `make test PYTEST_ARGS=tests/escape`; as root all of them, as another user those that need no privilege.

gVisor and machines have kernels of their own: what such a kernel gives from its own means (namespaces, its own
network's sockets, its own settings) says nothing about the host. Where "as it likes" stands, the attack is made all the
same, and held when nothing outside was changed; "does not apply" stands for attacks that are not made. The reasons are
below each table. `tests/escape/test_machine.py` has more attacks on machines, their disks and devices.
"""
_DOORS = {
    "clones": "What clones of one warmed interpreter share",
    "devices": "Devices and terminals",
    "files": "Files outside",
    "files-api": "The host's file operations",
    "guest": "The guest agent and what a command finds",
    "hostile-agent": "A guest agent that was replaced",
    "ipc": "Shared memory, messages, semaphores",
    "kernel": "Sharp interfaces of the kernel, and the filter before them",
    "leftovers": "Outliving the sandbox",
    "mounts": "Mounts",
    "namespaces": "Namespaces and control groups",
    "network": "Network and sockets",
    "privilege": "Privilege",
    "proc": "Kernel settings and secrets in /proc",
    "processes": "Processes outside",
    "resources": "Using up what there is",
    "sharing": "What is shared with the host and other sandboxes",
    "sys": "/sys",
    "user-mounts": "What a user mounts",
}


def page() -> str:
    """The whole page."""
    from tests.escape.attack import LEVELS, every

    attacks = list(every().values())
    counts = {level.value: sum(attack.made_at(level) for attack in attacks) for level in LEVELS}
    sections = [_section(door, list(found)) for door, found in groupby(attacks, key=lambda attack: attack.door)]
    return _NOTICE + _HEAD.format(**counts) + "".join(sections)


def _section(door: str, attacks: list[Attack]) -> str:
    from tests.escape.attack import LEVELS

    rows = [
        f"| `{attack.id}` | {_text(attack.tries)} | " + " | ".join(_answer(attack, level) for level in LEVELS) + " |"
        for attack in attacks
    ]
    notes = [f"- `{attack.id}`: {attack.note}" for attack in attacks if attack.note]
    for attack in attacks:
        notes += [f"- `{attack.id}`, {level.value}: **open**, {why}." for level, why in attack.holes.items()]
    notes += list(_reasons(attacks))
    head = f"| attack | tries to | {' | '.join(level.value for level in LEVELS)} |\n|---|---{'|---' * len(LEVELS)}|\n"
    table = head + "\n".join(rows) + "\n"
    return f"\n## {_DOORS[door]}\n\n{table}" + ("\n" + "\n".join(notes) + "\n" if notes else "")


def _reasons(attacks: list[Attack]) -> Iterator[str]:
    """Why attacks are not judged by their answers where kernels are the guests' own."""
    from tests.escape.attack import OWN_KERNELS

    for level in OWN_KERNELS:
        for words, given in (
            ("as it likes", [a.own for a in attacks]),
            ("does not apply", [a.absent for a in attacks]),
        ):
            found: dict[str, list[str]] = {}
            for attack, reasons in zip(attacks, given, strict=True):
                if level in reasons:
                    found.setdefault(reasons[level], []).append(f"`{attack.id}`")
            for why, names in found.items():
                whose = "" if len(names) == len(attacks) else f" ({', '.join(names)})"
                yield f"- {level.value}, {words}: {why}{whose}."


def _answer(attack: Attack, level: Isolation) -> str:
    if level in attack.own:
        return "as it likes"
    if level not in attack.expected:
        return "does not apply"
    answers = " or ".join(sorted(attack.expected[level]))
    return f"{answers} (**open**)" if level in attack.holes else answers


def _text(words: str) -> str:
    return words.replace("|", "\\|")


def main() -> int:
    """Write or check; the exit status."""
    text = page()
    same = PAGE.exists() and PAGE.read_text(encoding="utf-8") == text
    if "--check" in sys.argv[1:]:
        if not same:
            print(f"docs/{PAGE.name} is out of date: run scripts/escape_tests_page.py")
        return 0 if same else 1
    if not same:
        PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
