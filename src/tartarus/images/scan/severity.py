"""How bad a vulnerability is: CVSS vectors where there are any, else the words of whoever wrote the advisory."""

from __future__ import annotations

from collections.abc import Iterable

# Red Hat's, which the CVSS working group's own calculator is checked against; it has no dependencies.
from cvss import CVSS2, CVSS3, CVSS4
from cvss.exceptions import CVSSError

from tartarus.images.scan.findings import Severity

_MAX_VECTOR = 512  # a CVSS 4.0 vector with all its metrics has under 200 characters

_WORDS: dict[str, Severity] = {
    "negligible": "low", "unimportant": "low", "low": "low", "moderate": "medium", "medium": "medium", "high": "high",
    "important": "high", "critical": "critical",
}  # fmt: skip


def score_of(vector: str) -> float | None:
    """The base score of a CVSS 2, 3 or 4 vector; None for what is none."""
    if len(vector) > _MAX_VECTOR:
        return None
    try:
        if vector.startswith("CVSS:4"):
            return float(CVSS4(vector).base_score)
        if vector.startswith("CVSS:3"):
            return float(CVSS3(vector).base_score)
        return float(CVSS2(vector).base_score)
    except (CVSSError, ValueError, KeyError, ArithmeticError):
        return None


def level_of(score: float) -> Severity:
    """The qualitative rating of a score: CVSS 3.1, section 5, and the same in 4.0."""
    levels: tuple[tuple[float, Severity], ...] = ((9.0, "critical"), (7.0, "high"), (4.0, "medium"), (0.1, "low"))
    return next((level for least, level in levels if score >= least), "none")


def level_of_word(word: object) -> Severity:
    """The rating that a distribution or an advisory gives in words; `unknown` for any other."""
    return _WORDS.get(word.strip().lower(), "unknown") if isinstance(word, str) else "unknown"


def worst(vectors: Iterable[str]) -> tuple[float | None, str]:
    """The highest score among `vectors`, and which of them gave it."""
    scored = [(score, vector) for vector in vectors if (score := score_of(vector)) is not None]
    return max(scored, default=(None, ""))
