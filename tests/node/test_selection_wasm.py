"""When a request is for the WASM level, as pure decisions."""

from __future__ import annotations

import pytest

from tartarus.model.errors import InvalidRequest, IsolationUnavailable, Unsupported
from tartarus.model.sandbox import ExecSpec, Isolation, ResourceRequest, SandboxSpec, Wasm
from tartarus.node.selection import choose

MODULE = Wasm(module="0" * 64)
FILE = ExecSpec(argv=("prog.wasm", "arg"))
OTHER = ExecSpec(argv=("cat", "prog.wasm"))


@pytest.mark.parametrize("spec", [
    SandboxSpec(isolation=Isolation.WASM), SandboxSpec(command=FILE), SandboxSpec(wasm=MODULE),
    SandboxSpec(wasm=Wasm(fuel=1), command=OTHER), SandboxSpec(isolation=Isolation.WASM, command=OTHER),
])  # fmt: skip
def test_it_is_given_to_modules_and_to_who_asks(spec: SandboxSpec) -> None:
    assert choose(spec, {})[0] is Isolation.WASM


@pytest.mark.parametrize("spec", [
    SandboxSpec(command=OTHER), SandboxSpec(), SandboxSpec(command=FILE, isolation=Isolation.CONTAINER),
])  # fmt: skip
def test_nothing_else_is_given_it(spec: SandboxSpec) -> None:
    assert choose(spec, {})[0] is not Isolation.WASM


def test_where_it_can_t_be_given_nothing_takes_its_place() -> None:
    with pytest.raises(IsolationUnavailable, match="no wasmtime"):
        choose(SandboxSpec(command=FILE), {Isolation.WASM: "no wasmtime"})


@pytest.mark.parametrize("level", [Isolation.GVISOR, Isolation.MICROVM])
def test_it_is_below_the_levels_with_a_kernel_of_their_own(level: Isolation) -> None:
    with pytest.raises(Unsupported, match="author"):
        choose(SandboxSpec(command=FILE), {}, level)
    with pytest.raises(Unsupported, match="administrator"):
        choose(SandboxSpec(command=FILE), {}, Isolation.AUTO, level)
    assert choose(SandboxSpec(command=FILE), {}, Isolation.CONTAINER)[0] is Isolation.WASM


def test_a_module_is_run_at_no_other_level() -> None:
    with pytest.raises(Unsupported, match="not at gvisor"):
        choose(SandboxSpec(wasm=MODULE, isolation=Isolation.GVISOR), {})


def test_it_takes_tasks_of_our_own() -> None:
    with pytest.raises(InvalidRequest, match="pids"):
        choose(SandboxSpec(wasm=MODULE, resources=ResourceRequest(pids=11)), {})


@pytest.mark.parametrize("fields", [{"module": "0" * 63}, {"module": "G" * 64}, {"module": "../x"}, {"fuel": 0},
                                    {"fuel": -1}, {"fuel": 2**63}])  # fmt: skip
def test_what_no_module_is_named_by_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest):
        Wasm(**fields)  # type: ignore[arg-type]
