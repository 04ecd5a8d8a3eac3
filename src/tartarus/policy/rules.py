"""The evaluator: a set of rules, compiled once, and what it says of an act. Order of rules never matters."""

from __future__ import annotations

import functools
import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import msgspec

from tartarus.model.errors import InvalidRequest
from tartarus.policy import patterns
from tartarus.policy.acts import FACTS, STRENGTH, Act, Effect, Matched
from tartarus.policy.document import Example, Loaded, Match, Rule, words
from tartarus.policy.shelf import Shelf

Test = Callable[[Act, str | None], bool]
"""Whether an act, on one of its paths, is what a match describes."""


SHELL = "shell.exec"
"""A string that a shell reads. What it does is not in its words, so that no rule about words applies to it."""


class Verdict(NamedTuple):
    """What one set of rules says: nothing (None) where no rule applies."""

    effect: Effect | None
    matched: tuple[Matched, ...]


class _Compiled(NamedTuple):
    matched: Matched
    test: Test
    excepts: tuple[Test, ...]


class RuleSet:
    """Rules of one file, or of several. `warnings`: what is no error, and can't be meant."""

    def __init__(self, files: Iterable[Loaded]) -> None:
        """Compile. Raises InvalidRequest, naming the rule, for a pattern that is none and an example that fails."""
        self._exact: dict[str, Shelf[_Compiled]] = defaultdict(Shelf)
        self._other: Shelf[_Compiled] = Shelf()
        self._limits: list[tuple[str, float, Matched]] = []
        self.warnings: list[str] = []
        digest = hashlib.sha256()
        for loaded in files:
            digest.update(loaded.digest.encode())
            for rule, line in zip(loaded.file.rules, loaded.lines, strict=True):
                self._add(rule, loaded.source, line)
            for name, most in loaded.limits.items():
                reason = f"at most {most:g}"
                self._limits.append(
                    (name, most, Matched(f"constraints.max_{name}", Effect.DENY, reason, loaded.source, 0))
                )
        self.digest = digest.hexdigest()

    def judge(self, act: Act) -> Verdict:
        """What these rules say of an act: the strictest that any of them says on any of its paths.

        Every path needs a rule that allows it: one path that no rule applies to leaves the whole act without one.
        """
        found: list[Matched] = [said for name, most, said in self._limits if act.amounts.get(name, 0.0) > most]
        silent = False
        for path in act.paths or (None,):
            before = len(found)
            for compiled in self._candidates(act, path):
                if compiled.test(act, path) and not any(passes(act, path) for passes in compiled.excepts):
                    said = compiled.matched
                    found.append(said if path is None else msgspec.structs.replace(said, path=path))
            silent = silent or len(found) == before
        if not found:
            return Verdict(None, ())
        effect = max((said.effect for said in found), key=STRENGTH.__getitem__)
        if silent and effect is not Effect.DENY:
            return Verdict(None, tuple(found))
        return Verdict(effect, tuple(found))

    def _candidates(self, act: Act, path: str | None) -> Iterable[_Compiled]:
        shelf = self._exact.get(act.action)
        if shelf is not None:
            yield from shelf.fitting(path)
        yield from self._other.fitting(path)

    def _add(self, rule: Rule, source: str, line: int) -> None:
        where = f"{source}, line {line}: rule {rule.id!r}"
        matched = Matched(rule.id, rule.effect, rule.reason, source, line)
        strict = rule.effect is not Effect.ALLOW
        try:
            test = _compile(rule.match, strict=strict)
            excepts = tuple(_compile(item, strict=not strict) for item in rule.excepts)
        except InvalidRequest as error:
            raise InvalidRequest(f"{where}: {error.what}", why=error.why, fix=error.fix) from None
        compiled = _Compiled(matched, test, excepts)
        if rule.match.path == () or any(item.path == () for item in rule.excepts):
            self.warnings.append(f"{where}: an empty list of paths matches nothing")
        if rule.match in rule.excepts:
            self.warnings.append(f"{where}: it passes over all that it matches, and never acts")
        self._try(compiled, rule, where)
        actions = words(rule.match.action)
        about = None if rule.match.path is None else words(rule.match.path)
        if actions and not any(character in action for action in actions for character in "*?["):
            for action in set(actions):
                self._exact[action].put(compiled, about)
        else:
            self._other.put(compiled, about)

    def _try(self, compiled: _Compiled, rule: Rule, where: str) -> None:
        for wanted, examples in ((True, rule.examples.match), (False, rule.examples.not_match)):
            for example in examples:
                act = _act(example)
                applies = any(
                    compiled.test(act, path) and not any(passes(act, path) for passes in compiled.excepts)
                    for path in act.paths or (None,)
                )
                if applies is not wanted:
                    shown = msgspec.json.encode(example).decode()
                    raise InvalidRequest(
                        f"{where}: its example {shown} {'does not match' if wanted else 'matches'}",
                        fix="mend the rule or the example",
                    )


def _compile(match: Match, *, strict: bool) -> Test:
    """One function for all fields. `strict`: matching makes the decision stricter."""
    tests: list[Test] = []
    if match.action is not None:
        of_action = patterns.values(words(match.action))
        tests.append(lambda act, _path: of_action(act.action))
    for name in FACTS:
        wanted = getattr(match, name)
        if wanted is not None:
            tests.append(functools.partial(_fact, name, patterns.values(words(wanted))))
    if match.argv is not None:
        of_command = patterns.command([words_of(pattern) for pattern in words(match.argv)])
        tests.append(lambda act, _path: act.action != SHELL and of_command(act.argv, act.executable))
    if match.path is not None:
        of_path = patterns.paths(words(match.path), strict=strict)
        tests.append(lambda _act, path: path is not None and of_path(path))
    return lambda act, path: all(test(act, path) for test in tests)


def _fact(name: str, test: Callable[[str], bool], act: Act, _path: str | None) -> bool:
    value = act.facts.get(name)
    return value is not None and test(value)


def words_of(pattern: str) -> Sequence[str]:
    """A command's pattern, as its words: separated by spaces, since no shell reads them. Raises InvalidRequest."""
    found = pattern.split()
    if not found:
        raise InvalidRequest("an empty command pattern", fix="write it like: git status **")
    return found


def _act(example: Example) -> Act:
    argv = words(example.argv)
    if len(argv) == 1:
        argv = tuple(argv[0].split())
    program = argv[0] if argv else ""
    return Act(
        action=example.action, paths=words(example.path), argv=argv,
        executable=program if "/" in program or not program else f"/usr/bin/{program}",
        facts={name: value for name in FACTS if (value := getattr(example, name))},
    )  # fmt: skip
