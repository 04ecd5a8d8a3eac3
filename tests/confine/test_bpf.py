"""The assembler: what a filter does is what its rules say, for every number and any arguments."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tartarus.guest.syscalls import TABLES, table
from tartarus.model.sandbox import Isolation
from tartarus.runtimes.confine.bpf import (
    ALLOW,
    AUDIT_ARCH,
    FULL,
    KILL,
    MAX_INSTRUCTIONS,
    Branch,
    Match,
    Rule,
    Verdict,
    assemble,
    evaluate,
    refuse,
)
from tartarus.runtimes.confine.seccomp import rules_by_name, seccomp_filter

NO_ARGS = (0, 0, 0, 0, 0, 0)
DEFAULT = refuse(38)


def interpret(code: bytes, arch: int, nr: int, args: tuple[int, ...]) -> Verdict:
    """The kernel's side, in a few lines: the classic BPF that filters may use."""
    data = struct.pack("<IIQ6Q", nr, arch, 0, *args)
    instructions = list(struct.iter_unpack("<HBBI", code))
    accumulator, at = 0, 0
    while True:
        op, jump_true, jump_false, k = instructions[at]
        at += 1
        match op:
            case 0x20:
                assert k % 4 == 0
                accumulator = struct.unpack_from("<I", data, k)[0]
            case 0x54:
                accumulator &= k
            case 0x05:
                at += k
            case 0x15:
                at += jump_true if accumulator == k else jump_false
            case 0x35:
                at += jump_true if accumulator >= k else jump_false
            case 0x06:
                return Verdict(k)
            case _:
                raise AssertionError(f"unknown instruction {op:#x}")


words = st.sampled_from([0, 1, 2, 3, 0o6000, 0o100, 0x7E020000, 0x5412, FULL, 16]) | st.integers(0, FULL)
arguments = st.tuples(*[st.one_of(words, st.tuples(words, words).map(lambda p: p[0] << 32 | p[1]))] * 6)
verdicts = st.sampled_from([ALLOW, KILL, refuse(0), refuse(1), refuse(38)])
tests = st.builds(
    Match,
    st.integers(0, 5),
    st.lists(words, min_size=1, max_size=6).map(tuple),
    st.sampled_from([FULL, 0xF, 0o6000]) | words,
    st.booleans(),
)
rules: st.SearchStrategy[Rule] = st.recursive(
    verdicts, lambda inner: st.builds(Branch, tests, inner, inner), max_leaves=8
)


@pytest.mark.parametrize("level", [Isolation.CONTAINER, Isolation.PROCESS])
@pytest.mark.parametrize("arch", TABLES)
def test_every_number_gets_its_rule(arch: str, level: Isolation) -> None:
    named, numbers = rules_by_name(level), table(arch)
    by_number = {numbers[name]: rule for name, rule in named.items() if name in numbers}
    code = seccomp_filter(level, arch=arch)
    for nr in [*range(1024), 0x3FFF_FFFF, 0x4000_0000, 0x4000_0001, 0x4000_0208, 0xFFFF_FFFF]:
        expected = evaluate(by_number.get(nr, DEFAULT), NO_ARGS)
        assert interpret(code, AUDIT_ARCH[arch], nr, NO_ARGS) == expected, nr


@settings(max_examples=300, deadline=None)
@given(
    arch=st.sampled_from(sorted(TABLES)),
    level=st.sampled_from([Isolation.CONTAINER, Isolation.PROCESS]),
    own_uid=st.booleans(),
    brokered=st.booleans(),
    landlock_abi=st.sampled_from([1, 7]),
    name=st.data(),
    args=arguments,
)
def test_any_arguments_get_what_the_rules_say(arch, level, own_uid, brokered, landlock_abi, name, args) -> None:
    named, numbers = rules_by_name(level, own_uid=own_uid, brokered=brokered, landlock_abi=landlock_abi), table(arch)
    judged = sorted(call for call, rule in named.items() if isinstance(rule, Branch) and call in numbers)
    call = name.draw(st.sampled_from(judged))
    code = seccomp_filter(level, arch=arch, own_uid=own_uid, brokered=brokered, landlock_abi=landlock_abi)
    assert interpret(code, AUDIT_ARCH[arch], numbers[call], args) == evaluate(named[call], args)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.integers(0, 1023), rules, max_size=60), st.integers(0, 1100), arguments)
def test_the_tree_finds_every_rule(by_number, nr, args) -> None:
    code = assemble("x86_64", by_number, DEFAULT)
    assert interpret(code, AUDIT_ARCH["x86_64"], nr, args) == evaluate(by_number.get(nr, DEFAULT), args)


def test_a_large_filter_needs_long_jumps_and_still_finds_every_rule() -> None:
    by_number: dict[int, Rule] = {nr: Branch(Match(0, (nr,)), ALLOW, refuse(nr % 100)) for nr in range(0, 1000, 2)}
    code = assemble("x86_64", by_number, DEFAULT)
    for nr in range(1024):
        for first in (nr, nr + 1):
            args = (first, 0, 0, 0, 0, 0)
            expected = evaluate(by_number.get(nr, DEFAULT), args)
            assert interpret(code, AUDIT_ARCH["x86_64"], nr, args) == expected


def test_too_large_a_filter_is_refused() -> None:
    with pytest.raises(ValueError, match=f"over {MAX_INSTRUCTIONS}"):
        assemble("x86_64", {nr: Branch(Match(0, (nr,)), ALLOW, KILL) for nr in range(0, 4000, 2)}, DEFAULT)


def test_a_rule_too_large_for_its_jumps_is_refused() -> None:
    with pytest.raises(ValueError, match="split the rule"):
        assemble("x86_64", {0: Branch(Match(0, tuple(range(300))), ALLOW, KILL)}, DEFAULT)


@pytest.mark.parametrize("foreign", [0x4000_0003, 0xC000_00B7, 0x4000_0028, 0])
def test_another_architecture_is_killed(foreign: int) -> None:
    code = seccomp_filter(Isolation.CONTAINER, arch="x86_64")
    assert interpret(code, foreign, 39, NO_ARGS) == KILL


@pytest.mark.parametrize("level", [Isolation.CONTAINER, Isolation.PROCESS])
@pytest.mark.parametrize("arch", TABLES)
def test_filters_are_small_and_shallow(arch: str, level: Isolation) -> None:
    code = seccomp_filter(level, arch=arch)
    assert len(code) // 8 < 600
    assert max(_comparisons(code, arch, nr) for nr in range(512)) <= 24


def _comparisons(code: bytes, arch: str, nr: int) -> int:
    """How many instructions run for a call with no arguments set."""
    data = struct.pack("<IIQ6Q", nr, AUDIT_ARCH[arch], 0, *NO_ARGS)
    instructions, at, steps, accumulator = list(struct.iter_unpack("<HBBI", code)), 0, 0, 0
    while (op := instructions[at])[0] != 0x06:
        at, steps = at + 1, steps + 1
        if op[0] == 0x20:
            accumulator = struct.unpack_from("<I", data, op[3])[0]
        elif op[0] == 0x54:
            accumulator &= op[3]
        elif op[0] == 0x05:
            at += op[3]
        else:
            at += op[1] if (accumulator == op[3] if op[0] == 0x15 else accumulator >= op[3]) else op[2]
    return steps
