"""A file of rules: what it may say, and reading it whole or not at all."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import msgspec

from tartarus.model.errors import InvalidRequest
from tartarus.model.structured_yaml import StructReader
from tartarus.model.units import parse_duration, parse_size
from tartarus.policy.acts import Effect

Words = str | tuple[str, ...]

CONSTRAINTS: dict[str, Callable[[Any], float]] = {
    "max_file_size": parse_size,
    "max_output": parse_size,
    "max_memory": parse_size,
    "max_duration": parse_duration,
    "max_files": int,
    "max_lines": int,
}
"""The limits that a file may set, and how each is written. ``max_X`` bounds the amount ``X`` of an act."""


class Match(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What an act must be: every field that is there, by any of its values. `argv`: words of a command each."""

    action: Words | None = None
    path: Words | None = None
    argv: Words | None = None
    caller_tag: Words | None = None
    host: Words | None = None
    mode: Words | None = None
    state: Words | None = None
    tenant: Words | None = None
    template: Words | None = None
    isolation: Words | None = None
    network: Words | None = None
    user: Words | None = None
    role: Words | None = None
    tool: Words | None = None


class Example(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An act that a rule is tried with when it is loaded."""

    action: str
    path: Words | None = None
    argv: Words | None = None
    caller_tag: str = ""
    host: str = ""
    mode: str = ""
    state: str = ""
    tenant: str = ""
    template: str = ""
    isolation: str = ""
    network: str = ""
    user: str = ""
    role: str = ""
    tool: str = ""


class Examples(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Acts that the rule must apply to, and acts that it must not."""

    match: tuple[Example, ...] = ()
    not_match: tuple[Example, ...] = ()


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename={"excepts": "except"}):
    """One rule; `excepts` (written ``except``) are acts that it passes over."""

    id: str
    match: Match
    effect: Effect
    excepts: tuple[Match, ...] = ()
    reason: str = ""
    examples: Examples = Examples()


class RuleFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All of a file."""

    version: int
    rules: tuple[Rule, ...] = ()
    constraints: dict[str, Any] = {}


class Loaded(msgspec.Struct, frozen=True):
    """A file that was read. `lines`: where each rule begins. `digest`: of its bytes. `limits`: amount to number."""

    file: RuleFile
    source: str
    lines: tuple[int, ...]
    digest: str
    limits: dict[str, float]


def words(value: Words | None) -> tuple[str, ...]:
    """One value or several, as several."""
    return () if value is None else (value,) if isinstance(value, str) else value


def read_rules(text: bytes | str, source: str = "the rules") -> Loaded:
    """Read a file of rules; an empty one has no rules, and allows nothing.

    Raises InvalidRequest with the line and the key: it does not parse, has an unknown key, unit, effect or version,
    or an id twice. Nothing of such a file is in force.
    """
    content = text.encode() if isinstance(text, str) else text
    digest = hashlib.sha256(content).hexdigest()
    if not content.strip():
        return Loaded(RuleFile(version=1), source, (), digest, {})
    reader = StructReader(source, RuleFile, see="see docs/rules.md for every key", holds="one file of rules")
    file: RuleFile = reader.read(content)
    if file.version != 1:
        raise reader.refused("version", f"version: {file.version} is not known here", fix="write version: 1")
    seen: dict[str, int] = {}
    lines = []
    for index, rule in enumerate(file.rules):
        place = f"rules[{index}]"
        line = reader.line(place)
        if not rule.id.strip():
            raise reader.refused(f"{place}.id", f"{place}.id is empty", fix="give each rule a name of its own")
        if rule.id in seen:
            raise reader.refused(
                f"{place}.id", f"the id {rule.id!r} is there twice",
                why=f"first on line {seen[rule.id]}", fix="give each rule a name of its own",
            )  # fmt: skip
        seen[rule.id] = line
        lines.append(line)
    return Loaded(file, source, tuple(lines), digest, _limits(reader, file.constraints))


def _limits(reader: StructReader[RuleFile], constraints: dict[str, Any]) -> dict[str, float]:
    limits = {}
    for name, value in constraints.items():
        place = f"constraints.{name}"
        parse = CONSTRAINTS.get(name)
        if parse is None:
            raise reader.refused(place, f"unknown constraint {name!r}", fix=f"known: {', '.join(sorted(CONSTRAINTS))}")
        if isinstance(value, bool) or not isinstance(value, (str, int)):
            raise reader.refused(place, f"{place}: {value!r} is no amount", fix="write it like 5MiB, 30s or 100")
        try:
            limits[name.removeprefix("max_")] = float(parse(value))
        except (InvalidRequest, ValueError) as error:
            fix = error.fix if isinstance(error, InvalidRequest) else "write a whole number"
            raise reader.refused(place, f"{place}: {error.args[0]}", fix=fix) from None
    return limits
