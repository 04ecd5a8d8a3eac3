"""The catalogue of attacks, as data: what each tries, and the one answer that each level must give.

An attack is a function under one of two decorators. `inside`: its source is shipped into a real sandbox and
runs there, alone. `staged`: it runs on the host and directs real sandboxes, for what one program alone can't
show. Both return an answer or several by name; an answer is an errno's name or a word.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import pkgutil
import platform
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from tests.escape import kit
from tests.escape.own_kernel import GVISOR, OwnKernel
from tests.escape.own_machine import MICROVM

from tartarus.model.sandbox import Isolation

if TYPE_CHECKING:
    from tests.escape.arena import Arena

Answers = str | dict[str, str]
Inside = Callable[[], Answers]
Staged = Callable[["Arena", Isolation], Awaitable[Answers]]
LEVELS = (Isolation.CONTAINER, Isolation.PROCESS, Isolation.GVISOR, Isolation.MICROVM)
OWN_KERNELS: dict[Isolation, OwnKernel] = {Isolation.GVISOR: GVISOR, Isolation.MICROVM: MICROVM}


class Attack(msgspec.Struct, frozen=True):
    """One attack. `expected`: for each level it applies to, the answers that mean it was held.

    `own`: for levels where it is made and any answer is right, because a kernel of the guest's own gives it: why.
    `absent`: for levels with such a kernel where it is not made: why.
    `note`: what to know about the answer, such as a limit that the level is documented to have. `holes`: for a
    level where the answer is not yet the expected one, why. `twin`: it needs a process outside, of the sandbox's
    own user.
    """

    id: str
    tries: str
    expected: dict[Isolation, frozenset[str]]
    own: dict[Isolation, str] = {}
    absent: dict[Isolation, str] = {}
    program: str | None = None
    stage: Any = None
    note: str = ""
    holes: dict[Isolation, str] = {}
    needs: tuple[str, ...] = ()
    twin: bool = False
    machine: str = ""

    @property
    def door(self) -> str:
        """The kind of thing attacked."""
        return self.id.split("/", maxsplit=1)[0]

    def made_at(self, level: Isolation) -> bool:
        """Whether it is made there."""
        return level in self.expected or level in self.own


CATALOGUE: dict[str, Attack] = {}


def _register(attack: Attack) -> None:
    if attack.id in CATALOGUE:
        raise ValueError(f"two attacks are called {attack.id}")
    CATALOGUE[attack.id] = attack


def _judged(name: str, container: str, process: str) -> dict[str, Any]:
    """What makes an attack held, level for level."""
    given = {Isolation.CONTAINER: container, Isolation.PROCESS: process}
    given |= {level: kernel.expected(name, container) for level, kernel in OWN_KERNELS.items()}
    return {
        "expected": {level: frozenset(answers.split("|")) for level, answers in given.items() if answers},
        "own": {level: why for level, kernel in OWN_KERNELS.items() if (why := kernel.why(kernel.own, name))},
        "absent": {level: why for level, kernel in OWN_KERNELS.items() if (why := kernel.why(kernel.absent, name))},
    }


def inside(id: str, *, tries: str, container: str = "", process: str = "", **more: Any) -> Callable[[Inside], Inside]:  # noqa: A002
    """An attack whose program runs in a sandbox. Answers that are as good as another are joined by `|`."""

    def register(function: Inside) -> Inside:
        program = _program(function)
        _register(Attack(id=id, tries=tries, program=program, **_judged(id, container, process), **more))
        return function

    return register


def staged(id: str, *, tries: str, container: str = "", process: str = "", **more: Any) -> Callable[[Staged], Staged]:  # noqa: A002
    """An attack that a function on the host directs."""

    def register(function: Staged) -> Staged:
        _register(Attack(id=id, tries=tries, stage=function, **_judged(id, container, process), **more))
        return function

    return register


def every() -> dict[str, Attack]:
    """Every attack, by id."""
    package = importlib.import_module("tests.escape.attacks")
    for module in pkgutil.iter_modules(package.__path__, "tests.escape.attacks."):
        importlib.import_module(module.name)
    return dict(sorted(CATALOGUE.items()))


def load() -> dict[str, Attack]:
    """Every attack that this machine's architecture allows, by id."""
    here = platform.machine()
    return {name: attack for name, attack in every().items() if attack.machine in {"", here}}


def shipped(function: Callable[..., Any]) -> str:
    """A program that runs one function of a module by itself: the kit, and of its module only what it uses."""
    return _kit_text() + _needed(Path(inspect.getfile(function)), function.__name__)


def _program(function: Inside) -> str:
    return shipped(function) + f"\nrun({function.__name__})\n"


@functools.cache
def _kit_text() -> str:
    return Path(inspect.getfile(kit)).read_text(encoding="utf-8") + "\n"


@functools.cache
def _top_level(path: Path) -> dict[str, ast.stmt]:
    """The statements of a module by the name that each defines; decorators and imports of the tests left out."""
    found: dict[str, ast.stmt] = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        for name in _names_defined(node):
            found[name] = node
    return found


def _names_defined(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef):
        node.decorator_list = []
        yield node.name
    elif isinstance(node, ast.Import):
        yield from (alias.asname or alias.name.split(".")[0] for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] not in {
        "tests",
        "tartarus",
        "__future__",
    }:
        yield from (alias.asname or alias.name for alias in node.names)
    elif isinstance(node, ast.Assign):
        yield from (part.id for target in node.targets for part in ast.walk(target) if isinstance(part, ast.Name))


def _needed(path: Path, name: str) -> str:
    top = _top_level(path)
    order = list(dict.fromkeys(top.values()))
    wanted: set[int] = set()
    pending = [name]
    while pending:
        node = top.get(pending.pop())
        if node is not None and order.index(node) not in wanted:
            wanted.add(order.index(node))
            pending += [part.id for part in ast.walk(node) if isinstance(part, ast.Name)]
    return "\n".join(ast.unparse(order[index]) for index in sorted(wanted))
