"""What must hold for all rules and acts, tried on generated ones; and the tricks that must not change a decision."""

from __future__ import annotations

import concurrent.futures
import os
import re
import string
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.policy.test_cases import EMPTY, rule, rules

from tartarus.model.errors import InvalidRequest
from tartarus.policy import patterns
from tartarus.policy.acts import STRENGTH, Act, Effect
from tartarus.policy.document import Loaded, Match, Rule, RuleFile, read_rules
from tartarus.policy.gate import Gate
from tartarus.policy.paths import canonical
from tartarus.policy.rules import RuleSet
from tartarus.policy.shelf import Shelf, folded
from tartarus.policy.tokens import TokenLedger

PATHS = ["a", "a/b", "src/x.py", "src/deep/y.py", ".github/ci.yml", "/etc/passwd"]
GLOBS = ["**", "a/**", "src/*.py", "src/**", "**/*.py", ".github/**", "!src/deep/**", "/etc/*"]
ACTIONS = ["fs.write", "fs.read", "exec", "net.connect"]
TAGS = ["core", "plugin"]

matches = st.builds(
    Match,
    action=st.none() | st.sampled_from([*ACTIONS, "fs.*"]),
    path=st.none() | st.lists(st.sampled_from(GLOBS), max_size=3).map(tuple),
    caller_tag=st.none() | st.sampled_from(TAGS),
)
one_rule = st.builds(
    Rule,
    id=st.uuids().map(str),
    match=matches,
    effect=st.sampled_from(Effect),
    excepts=st.lists(matches, max_size=2).map(tuple),
)
acts = st.builds(
    Act,
    action=st.sampled_from(ACTIONS),
    paths=st.lists(st.sampled_from(PATHS), max_size=3).map(tuple),
    facts=st.dictionaries(st.just("caller_tag"), st.sampled_from(TAGS)),
)


def made(found: list[Rule]) -> Gate:
    loaded = Loaded(RuleFile(1, tuple(found)), "generated", tuple(range(len(found))), "0", {})
    return Gate(EMPTY, RuleSet([loaded]))


PIECES = [
    "a",
    "B",
    "ab",
    "x.py",
    ".py",
    "*",
    "?",
    "**",
    "*.py",
    "id_*",
    "*_key",
    "[ab]",
    "[!a]c",
    "\\*",
    "\\a",
    "i",
    "\u0131",
    "K",
    "ss",
    "\xdf",
]
spelled = st.lists(st.lists(st.sampled_from(PIECES), min_size=1, max_size=2).map("".join), min_size=1, max_size=4)
PARTS = [
    "a",
    "A",
    "b",
    "ab",
    "Ab",
    "x.py",
    ".PY",
    "y.py",
    "id_x",
    "ID_",
    "my_key",
    "c",
    "bc",
    "*",
    "\u0130",
    "\u0131",
    "I",
    "\u212a",
    "\u017fs",
    "\xdf",
    "\u1e9e",
]
reached = st.lists(st.lists(st.sampled_from(PARTS), min_size=1, max_size=2).map("".join), min_size=1, max_size=4)


@settings(max_examples=500)
@given(st.lists(spelled.map("/".join), min_size=1, max_size=4), reached.map("/".join), st.booleans(), st.booleans())
def test_the_index_leaves_no_rule_out(globs: list[str], path: str, absolute: bool, strict: bool) -> None:
    shelf: Shelf[str] = Shelf()
    for glob in globs:
        shelf.put(glob, [f"/{glob}" if absolute else glob])
    shelf.put("all", globs)
    tests = {glob: patterns.paths([f"/{glob}" if absolute else glob], strict=strict) for glob in globs}
    path = f"/{path}" if absolute else path
    found = list(shelf.fitting(path))
    assert len(set(found)) == len({*globs} & {*found}) + ("all" in found)
    assert {glob for glob in globs if tests[glob](path)} <= {*found}
    if not absolute and patterns.paths(globs, strict=strict)(path):
        assert "all" in found


def test_what_matches_a_letter_regardless_of_case_is_folded_to_it() -> None:
    everything = "".join(chr(code) for code in range(128, 0x110000) if not 0xD800 <= code < 0xE000)
    for letter in string.ascii_lowercase:
        for found in re.findall(letter, everything, re.IGNORECASE):
            assert folded(found) == letter, hex(ord(found))


@settings(max_examples=150)
@given(st.lists(one_rule, max_size=8), acts, st.randoms(use_true_random=False))
def test_order_never_matters(found: list[Rule], act: Act, random: object) -> None:
    shuffled = list(found)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    first, second = made(found).decide(act), made(shuffled).decide(act)
    assert (first.effect, first.phase, first.error) == (second.effect, second.phase, second.error)
    assert {one.id for one in first.matched} == {one.id for one in second.matched}


@settings(max_examples=150)
@given(st.lists(one_rule, max_size=8), one_rule, acts)
def test_a_denial_more_never_widens(found: list[Rule], more: Rule, act: Act) -> None:
    denial = msgspec.structs.replace(more, effect=Effect.DENY)
    before, after = made(found).decide(act), made([*found, denial]).decide(act)
    assert STRENGTH[after.effect] >= STRENGTH[before.effect]


@settings(max_examples=100)
@given(st.lists(one_rule, max_size=8), acts, st.sampled_from(PATHS))
def test_a_path_more_never_widens(found: list[Rule], act: Act, path: str) -> None:
    if act.paths:
        gate = made(found)
        more = msgspec.structs.replace(act, paths=(*act.paths, path))
        assert STRENGTH[gate.decide(more).effect] >= STRENGTH[gate.decide(act).effect]


@settings(max_examples=60)
@given(st.lists(one_rule, max_size=8), acts, st.floats(0, 4e9))
def test_time_of_day_never_matters(found: list[Rule], act: Act, moment: float) -> None:
    loaded = Loaded(RuleFile(1, tuple(found)), "generated", tuple(range(len(found))), "0", {})
    made_now = Gate(EMPTY, RuleSet([loaded]), now=lambda: moment)
    assert made_now.decide(act) == made(found).decide(act)


def test_both_ends_of_a_move_are_judged() -> None:
    gate = Gate(EMPTY, rules(rule("src", "allow", "{action: fs.move, path: src/**}")))
    assert gate.decide(Act("fs.move", paths=("src/a", "src/b"))).allowed
    assert not gate.decide(Act("fs.move", paths=("src/a", "keep/b"))).allowed
    assert not gate.decide(Act("fs.move", paths=("keep/a", "src/b"))).allowed


@pytest.mark.parametrize(
    "spelled", ["keep/f", "./keep//f", "src/../keep/f", "link/f", "keep/./f", "keep/sub/../f", "{root}/keep/f"]
)
def test_spelling_changes_nothing(tmp_path: Path, spelled: str) -> None:
    (tmp_path / "keep" / "sub").mkdir(parents=True)
    (tmp_path / "src").mkdir()
    (tmp_path / "link").symlink_to("keep")
    path = canonical(tmp_path, spelled.replace("{root}", str(tmp_path)))
    assert path == "keep/f"


def test_what_lies_outside_is_absolute(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to("/etc")
    assert canonical(tmp_path, "out/passwd") == "/etc/passwd"
    assert canonical(tmp_path, "../" * 40 + "etc/passwd") == "/etc/passwd"
    assert canonical(tmp_path, ".") == "."
    assert canonical(tmp_path, f"{tmp_path}-more/x") == os.path.realpath(f"{tmp_path}-more/x")
    for bad in ("", "a\0b", "a" * 5000):
        with pytest.raises(InvalidRequest):
            canonical(tmp_path, bad)


def test_case_never_helps() -> None:
    gate = Gate(EMPTY, rules(rule("all", "allow", "{path: '**'}"), rule("ci", "deny", "{path: .github/**}")))
    assert gate.decide(Act("fs.write", paths=("a",))).allowed
    for path in (".github/a", ".GitHub/a", ".github", ".GITHUB"):
        assert not gate.decide(Act("fs.write", paths=(path,))).allowed, path
    only = Gate(EMPTY, rules(rule("src", "allow", "{path: src/**}")))
    assert not only.decide(Act("fs.write", paths=("SRC/a",))).allowed


@pytest.mark.parametrize(
    ("argv", "executable", "allowed"),
    [
        (["git", "status"], "/usr/bin/git", True),
        (["git", "status", "--short"], "/usr/bin/git", True),
        (["git", "push"], "/usr/bin/git", False),
        (["git"], "/usr/bin/git", False),
        (["git", "status"], "/work/bin/git", False),
        (["git", "status"], "", False),
        (["git status"], "/usr/bin/git", False),
        ([], "/usr/bin/git", False),
        (["git", "-c", "alias.status=!sh", "status"], "/usr/bin/git", False),
    ],
)
def test_commands_are_judged_by_what_runs(argv: list[str], executable: str, allowed: bool) -> None:
    gate = Gate(EMPTY, rules(rule("git", "allow", "{action: exec, argv: [git status **]}")))
    assert gate.decide(Act("exec", argv=tuple(argv), executable=executable)).allowed is allowed


def test_no_rule_about_words_allows_a_shell_string() -> None:
    gate = Gate(EMPTY, rules(rule("any", "allow", "{argv: ['* **']}")))
    assert gate.decide(Act("exec", argv=("ls",), executable="/usr/bin/ls")).allowed
    assert not gate.decide(Act("shell.exec", argv=("ls",), executable="/usr/bin/ls")).allowed


def test_a_one_use_token_is_used_once() -> None:
    ledger = TokenLedger()
    gate = Gate(EMPTY, EMPTY, tokens=ledger)
    act = Act("fs.write", paths=("a",), sandbox="sbx-1")
    token = ledger.mint("sbx-1", "fs.write")
    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        decided = list(pool.map(lambda _: gate.decide(act, token).allowed, range(10)))
    assert decided.count(True) == 1


def test_tokens_that_were_tampered_with_or_come_from_elsewhere() -> None:
    ledger = TokenLedger()
    gate = Gate(EMPTY, EMPTY, tokens=ledger)
    act = Act("fs.write", paths=("a",), sandbox="sbx-1")
    token = ledger.mint("sbx-1", "fs.write", paths=["a"])
    replace = msgspec.structs.replace
    forged = [
        replace(token, expires_at=token.expires_at + 100), replace(token, operations=99), replace(token, nonce=99),
        replace(token, paths=("**",)), replace(token, paths=None), replace(token, signature=b""),
        TokenLedger().mint("sbx-1", "fs.write"),
    ]  # fmt: skip
    assert not any(gate.decide(act, one).allowed for one in forged)
    assert not gate.decide(replace(act, paths=("b",)), token).allowed
    assert not gate.decide(replace(act, paths=("a", "b")), token).allowed
    assert not gate.decide(replace(act, paths=()), token).allowed
    assert gate.decide(act, token).allowed
    none = ledger.mint("sbx-1", "fs.write", paths=[])
    assert not gate.decide(act, none).allowed
    gone = ledger.mint("sbx-1", "fs.write")
    ledger.revoke(gone)
    assert not gate.decide(act, gone).allowed
    older = ledger.mint("sbx-1", "fs.write")
    again = Gate(EMPTY, EMPTY, tokens=TokenLedger(key=ledger._key, last_nonce=ledger.last_nonce))
    assert not again.decide(act, older).allowed


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("version: 2", "line 1: version: 2 is not known here"),
        ("version: 1\nrulez: []", "line 2: unknown key 'rulez'"),
        ("version: 1\nrules:\n- {id: a, effect: alow, match: {}}", "line 3: rules[0].effect: 'alow' is none"),
        ("version: 1\nrules:\n- {id: a, effect: deny, match: {pth: a}}", "line 3: unknown key 'pth' in rules[0].match"),
        ("version: 1\nrules:\n- {id: a, effect: deny, match: {}}\n- {id: a, effect: deny, match: {}}", "line 4: the id 'a' is there twice"),
        ("version: 1\nconstraints: {max_file_size: 5mb}", "line 2: constraints.max_file_size: '5mb' is not a size"),
        ("version: 1\nconstraints: {max_fish: 5}", "line 2: unknown constraint 'max_fish'"),
        ("version: 1\nrules: [", "not YAML"),
        ("rules: &a [*a]", "aliases and anchors"),
        ("version: 1\nrules:\n- {id: a, effect: deny, match: {path: ['../x']}}", "matches nothing"),
        ("version: 1\nrules:\n- {id: a, effect: deny, match: {path: x}, examples: {match: [{action: b, path: y}]}}", "does not match"),
        ("version: 1\nrules:\n- {id: a, effect: deny, match: {path: x}, examples: {not_match: [{action: b, path: x}]}}", "matches"),
    ],
)  # fmt: skip
def test_bad_files_are_refused_whole(text: str, says: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        RuleSet([read_rules(text, "rules.yaml")])
    assert says in str(caught.value)
    assert "rules.yaml" in str(caught.value)


def test_constraints_deny_what_is_too_much() -> None:
    text = (
        "version: 1\nrules: [{id: a, effect: allow, match: {}}]\nconstraints: {max_file_size: 5KiB, max_duration: 2m}"
    )
    gate = Gate(EMPTY, RuleSet([read_rules(text)]))
    assert gate.decide(Act("fs.write", amounts={"file_size": 5120.0})).allowed
    decision = gate.decide(Act("fs.write", amounts={"file_size": 5121.0}))
    assert decision.reasons == ("constraints.max_file_size: at most 5120",)
