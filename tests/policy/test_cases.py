"""The 26 cases that the evaluator must pass, through the gate as its callers see it, with their reasons."""

from __future__ import annotations

from tartarus.policy.acts import Act, Decision, Effect
from tartarus.policy.document import read_rules
from tartarus.policy.gate import Gate
from tartarus.policy.rules import RuleSet, Verdict
from tartarus.policy.tokens import TokenLedger

ALLOW, REVIEW, DENY = Effect.ALLOW, Effect.REQUIRE_REVIEW, Effect.DENY
WRITE = Act("fs.write", paths=("src/a.py",), facts={"caller_tag": "core"}, sandbox="sbx-1")
EMPTY = RuleSet([])


def rules(*lines: str) -> RuleSet:
    """A rule set of rules in flow style, ``id effect {match} [excepts]``."""
    text = "version: 1\nrules:\n" + "".join(f"  - {line}\n" for line in lines)
    return RuleSet([read_rules(text, "rules.yaml")])


def rule(name: str, effect: str, match: str = "{action: fs.write}", excepts: str = "[]") -> str:
    return f"{{id: {name}, effect: {effect}, match: {match}, except: {excepts}, reason: because {name}}}"


class Extension:
    """Code that judges as it is told, and counts."""

    def __init__(self, effect: Effect | None, *, fails: bool = False) -> None:
        self.effect, self.fails = effect, fails
        self.asked = self.restarts = 0

    def judge(self, act: Act) -> Verdict:  # noqa: ARG002
        self.asked += 1
        if self.fails:
            raise RuntimeError("crashed")
        return Verdict(self.effect, ())

    def restart(self) -> None:
        self.restarts += 1


class Clock:
    """A time that stands, or goes on at each look."""

    def __init__(self, step: float = 0.0) -> None:
        self.time, self.step = 1000.0, step

    def __call__(self) -> float:
        self.time += self.step
        return self.time


def decide(files: RuleSet = EMPTY, act: Act = WRITE, built_in: RuleSet = EMPTY, **more: object) -> Decision:
    token = more.pop("token", None)
    return Gate(built_in, files, **more).decide(act, token)  # type: ignore[arg-type]


def ids(decision: Decision) -> set[str]:
    return {matched.id for matched in decision.matched}


def test_1_no_rule_matches() -> None:
    decision = decide(rules(rule("other", "allow", "{action: fs.read}")))
    assert (decision.effect, decision.phase, decision.error) == (DENY, "default", "")
    assert decision.reasons == ("no rule allows it",)


def test_2_every_matching_rule_passes() -> None:
    passing = rule("a", "allow", excepts="[{caller_tag: core}]")
    assert decide(rules(passing)).effect is DENY


def test_3_allow_and_deny() -> None:
    decision = decide(rules(rule("may", "allow"), rule("never", "deny")))
    assert (decision.effect, decision.reasons, ids(decision)) == (DENY, ("never: because never",), {"may", "never"})


def test_4_allow_and_review() -> None:
    decision = decide(rules(rule("may", "allow"), rule("ask", "require_review")))
    assert (decision.effect, decision.reasons) == (REVIEW, ("ask: because ask",))


def test_5_built_in_allow_does_not_end_it() -> None:
    extension = Extension(DENY)
    decision = decide(built_in=rules(rule("kernel", "allow")), extension=extension)
    assert (decision.effect, decision.phase, extension.asked) == (DENY, "extension", 1)


def test_6_review_whose_except_matches() -> None:
    passing = rule("ask", "require_review", excepts="[{caller_tag: core}]")
    assert decide(rules(passing)).effect is DENY
    assert decide(rules(passing, rule("may", "allow"))).effect is ALLOW


def test_7_token_and_built_in_deny() -> None:
    ledger = TokenLedger()
    token = ledger.mint("sbx-1", "fs.write")
    decision = decide(built_in=rules(rule("kernel", "deny")), tokens=ledger, token=token)
    assert (decision.effect, decision.phase, decision.reasons) == (DENY, "built-in", ("kernel: because kernel",))


def test_8_token_skips_files_and_extension() -> None:
    ledger, extension = TokenLedger(), Extension(DENY)
    token = ledger.mint("sbx-1", "fs.write")
    decision = decide(rules(rule("never", "deny")), tokens=ledger, token=token, extension=extension)
    assert (decision.effect, decision.phase, extension.asked, ids(decision)) == (ALLOW, "token", 0, {token.id})


def test_9_expired_token() -> None:
    clock = Clock()
    ledger = TokenLedger(now=clock)
    token = ledger.mint("sbx-1", "fs.write", lifetime_s=1)
    clock.time += 1
    decision = decide(rules(rule("ask", "require_review")), tokens=ledger, token=token, now=clock)
    assert (decision.effect, decision.phase) == (REVIEW, "rules")


def test_10_every_reason_for_review() -> None:
    decision = decide(rules(rule("a", "require_review"), rule("b", "require_review")))
    assert (decision.effect, set(decision.reasons)) == (REVIEW, {"a: because a", "b: because b"})


def test_11_file_deny_before_extension() -> None:
    extension = Extension(ALLOW)
    assert decide(rules(rule("never", "deny")), extension=extension).effect is DENY
    assert extension.asked == 0


def test_12_action_matches_path_does_not() -> None:
    assert decide(rules(rule("a", "allow", "{action: fs.write, path: docs/**}"))).effect is DENY


def test_13_review_except_does_not_match() -> None:
    assert decide(rules(rule("ask", "require_review", excepts="[{caller_tag: other}]"))).effect is REVIEW


def test_14_one_of_several_excepts() -> None:
    excepts = "[{caller_tag: other}, {path: src/**}]"
    assert decide(rules(rule("ask", "require_review", excepts=excepts))).effect is DENY


def test_15_none_of_several_excepts() -> None:
    excepts = "[{caller_tag: other}, {path: src/**, caller_tag: other}]"
    assert decide(rules(rule("ask", "require_review", excepts=excepts))).effect is REVIEW


def test_16_several_allows() -> None:
    decision = decide(rules(rule("a", "allow"), rule("b", "allow")))
    assert (decision.effect, ids(decision)) == (ALLOW, {"a", "b"})


def test_17_file_and_extension_allow() -> None:
    extension = Extension(ALLOW)
    assert decide(rules(rule("a", "allow")), extension=extension).effect is ALLOW
    assert extension.asked == 1


def test_18_no_built_in_rules() -> None:
    assert decide(rules(rule("a", "allow")), built_in=EMPTY).effect is ALLOW


def test_19_empty_file() -> None:
    empty = RuleSet([read_rules(b"", "rules.yaml")])
    assert decide(empty).effect is DENY
    decision = decide(empty, built_in=rules(rule("kernel", "deny")))
    assert decision.phase == "built-in"


def test_20_extension_crashes() -> None:
    extension = Extension(ALLOW, fails=True)
    decision = decide(rules(rule("a", "allow")), extension=extension)
    assert (decision.effect, extension.restarts) == (DENY, 1)
    assert "RuntimeError: crashed" in decision.error


def test_21_operations_used_up() -> None:
    ledger = TokenLedger()
    token = ledger.mint("sbx-1", "fs.write", operations=2)
    phases = [decide(rules(rule("never", "deny")), tokens=ledger, token=token).phase for _ in range(3)]
    assert phases == ["token", "token", "rules"]


def test_22_token_expires_meanwhile() -> None:
    clock = Clock()
    ledger = TokenLedger(now=clock)
    token = ledger.mint("sbx-1", "fs.write", lifetime_s=1.5)
    # Each look moves the clock by a second: one at the start is within the lifetime, a second one would not be.
    clock.step = 1.0
    assert decide(tokens=ledger, token=token, now=clock).phase == "token"


def test_23_token_of_another_sandbox() -> None:
    ledger = TokenLedger()
    token = ledger.mint("sbx-2", "fs.write")
    assert decide(rules(rule("ask", "require_review")), tokens=ledger, token=token).effect is REVIEW


def test_24_unknown_action() -> None:
    assert decide(rules(rule("a", "allow")), act=Act("fs.frobnicate")).effect is DENY


def test_25_no_paths() -> None:
    made = rules(rule("a", "allow", "{action: fs.write, path: []}"))
    assert decide(made).effect is DENY
    assert made.warnings == ["rules.yaml, line 3: rule 'a': an empty list of paths matches nothing"]


def test_26_match_is_an_except() -> None:
    made = rules(rule("a", "allow", "{action: fs.write}", "[{action: fs.write}]"))
    assert decide(made).effect is DENY
    assert made.warnings == ["rules.yaml, line 3: rule 'a': it passes over all that it matches, and never acts"]
