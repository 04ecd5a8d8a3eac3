"""A small assembler for seccomp filters: rules are data, and become classic BPF here.

A rule is a verdict, or a test on one argument with a rule on either side. A filter maps system call
numbers to rules. Kept apart from the policy so that the policy reads as tables, and so that tests can
compare what the assembled program does with what `evaluate` says of the rules it was made from.

The numbers are cut into ranges of equal rules and searched as a binary tree: about eight comparisons
for any call. The kernel (5.11 and later) works out once, at installation, which numbers are always
allowed, by stepping through loads, jumps and returns, and skips the filter for those; the tree uses
nothing else before a rule looks at arguments.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

FULL: Final = 0xFFFF_FFFF
MAX_INSTRUCTIONS: Final = 4096
AUDIT_ARCH: Final = {"x86_64": 0xC000_003E, "aarch64": 0xC000_00B7}
X32_BIT: Final = 0x4000_0000

_LD_W_ABS, _AND_K, _RET_K = 0x20, 0x54, 0x06
_JA, _JEQ_K, _JGE_K = 0x05, 0x15, 0x35
_AT_NUMBER, _AT_ARCH, _AT_ARGS = 0, 4, 16
_INSTRUCTION = struct.Struct("<HBBI")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the kernel does with the call: one of SECCOMP_RET_*, with its data."""

    action: int


@dataclass(frozen=True, slots=True)
class Match:
    """Whether an argument's low 32 bits, under `mask`, are one of `values`.

    Most of the kernel's integer arguments are 32 bits wide and their upper half is ignored, so a test
    that looked at it could be fooled; `wide` is for pointers and asks that the upper half be zero too.
    """

    arg: int
    values: tuple[int, ...]
    mask: int = FULL
    wide: bool = False

    def holds(self, args: tuple[int, ...]) -> bool:
        """Whether it holds for these six 64-bit arguments."""
        low, high = args[self.arg] & FULL, args[self.arg] >> 32
        return (low & self.mask) in self.values and not (self.wide and high)


@dataclass(frozen=True, slots=True)
class Branch:
    """`then` where the test holds, `otherwise` elsewhere."""

    test: Match
    then: Rule
    otherwise: Rule


Rule = Verdict | Branch
_Code = list[tuple[int, int, int, int]]

ALLOW: Final = Verdict(0x7FFF_0000)
KILL: Final = Verdict(0x8000_0000)
ASK: Final = Verdict(0x7FC0_0000)
"""SECCOMP_RET_USER_NOTIF: the call waits until whoever holds the filter's listener has answered it."""


def refuse(error: int) -> Verdict:
    """The call is not made and fails with `error`; 0 makes it appear to succeed."""
    return Verdict(0x0005_0000 | error)


def evaluate(rule: Rule, args: tuple[int, ...]) -> Verdict:
    """What a rule means, said in Python: the reference that the assembled code is tested against."""
    while isinstance(rule, Branch):
        rule = rule.then if rule.test.holds(args) else rule.otherwise
    return rule


def assemble(arch: str, rules: dict[int, Rule], default: Rule, *, foreign: Verdict = KILL) -> bytes:
    """The filter for `arch` as an array of struct sock_filter; numbers without a rule get `default`.

    Calls through another architecture's entry (32-bit code) get `foreign`; x32 numbers get `default`.
    """
    code: _Code = [
        (_LD_W_ABS, 0, 0, _AT_ARCH),
        (_JEQ_K, 1, 0, AUDIT_ARCH[arch]),
        (_RET_K, 0, 0, foreign.action),
        (_LD_W_ABS, 0, 0, _AT_NUMBER),
    ]
    code += _search(_ranges({nr: rule for nr, rule in rules.items() if nr < X32_BIT}, default))
    if len(code) > MAX_INSTRUCTIONS:
        raise ValueError(f"filter of {len(code)} instructions is over {MAX_INSTRUCTIONS}")
    return b"".join(_INSTRUCTION.pack(*instruction) for instruction in code)


def _ranges(rules: dict[int, Rule], default: Rule) -> list[tuple[int, Rule]]:
    """(first number, rule) of each stretch of equal rules, from 0 up, neighbours merged."""
    starts: list[tuple[int, Rule]] = []
    expected = 0
    for nr in sorted(rules):
        if nr > expected:
            starts.append((expected, default))
        starts.append((nr, rules[nr]))
        expected = nr + 1
    starts.append((expected, default))
    return [item for i, item in enumerate(starts) if i == 0 or starts[i - 1][1] != item[1]]


def _search(ranges: list[tuple[int, Rule]]) -> _Code:
    """A balanced tree of comparisons over the ranges, each leaf a complete rule."""
    if len(ranges) == 1:
        return _rule(ranges[0][1])
    middle = len(ranges) // 2
    below, above = _search(ranges[:middle]), _search(ranges[middle:])
    first = ranges[middle][0]
    if len(below) <= 0xFF:
        return [(_JGE_K, len(below), 0, first), *below, *above]
    # Conditional jumps reach 255 instructions; an unconditional one reaches any.
    return [(_JGE_K, 0, 1, first), (_JA, 0, 0, len(below)), *below, *above]


def _rule(rule: Rule) -> _Code:
    """Code that ends in a return on every path and uses nothing but its own loads."""
    if isinstance(rule, Verdict):
        return [(_RET_K, 0, 0, rule.action)]
    test, then, otherwise = rule.test, _rule(rule.then), _rule(rule.otherwise)
    low = _AT_ARGS + 8 * test.arg
    load: _Code = [(_LD_W_ABS, 0, 0, low)]
    if test.mask != FULL:
        load.append((_AND_K, 0, 0, test.mask))
    last = len(test.values) - 1
    compare: _Code = [(_JEQ_K, _reach(last - i + len(otherwise)), 0, value) for i, value in enumerate(test.values)]
    if test.wide:
        skip = _reach(len(load) + len(compare))
        load = [(_LD_W_ABS, 0, 0, low + 4), (_JEQ_K, 0, skip, 0), *load]
    return [*load, *compare, *otherwise, *then]


def _reach(distance: int) -> int:
    if distance > 0xFF:
        raise ValueError(f"a jump of {distance} inside one rule: split the rule")
    return distance
