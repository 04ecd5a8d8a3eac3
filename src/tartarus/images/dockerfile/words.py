"""Words of a Dockerfile: splitting them, taking their quotes off, putting variables in.

The rules are those of Docker's documentation ("Environment replacement") and of its reference builder: single
quotes keep everything, double quotes keep all but ``$`` and escapes, and the escape character takes the meaning
from whatever follows it. `${name:-word}`, `${name:+word}`, `${name:?word}` and their forms without the colon are
known; the pattern forms (``#``, ``%``, ``/``) are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec

from tartarus.images.dockerfile.limits import MAX_EXPANDED, MAX_NESTING, MAX_VALUE, MAX_WORDS
from tartarus.model.errors import ImageRefused, InvalidRequest

_SPECIAL: Final = "@*#?-$!0123456789"
_BLANK: Final = " \t\v\f\r\n"


class Budget(msgspec.Struct):
    """What is left of the characters that a build's expansions may produce together."""

    left: int = MAX_EXPANDED

    def spend(self, text: str) -> str:
        """Count `text`, and give it back. Raises InvalidRequest when it is too long, or all together are."""
        self.left -= len(text)
        if len(text) > MAX_VALUE or self.left < 0:
            raise InvalidRequest(
                "a value is too long once its variables are put in",
                why=f"one value may have {MAX_VALUE} characters, and all of a build {MAX_EXPANDED}",
            )
        return text


def split_words(text: str, escape: str = "\\") -> list[str]:
    """The words of `text` between unquoted blanks, with their quotes and escapes as written.

    A quote that is never closed takes the rest of the text, as with Docker; `expand` then refuses it.
    """
    words: list[str] = []
    word: list[str] = []
    quote = ""
    position = 0
    while position < len(text):
        char = text[position]
        if char == escape and quote != "'":
            word.append(text[position : position + 2])
            position += 2
            continue
        position += 1
        if not quote and char in _BLANK:
            if word:
                words.append("".join(word))
                word = []
            continue
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        word.append(char)
    if word:
        words.append("".join(word))
    if len(words) > MAX_WORDS:
        raise InvalidRequest(f"too many words: {len(words)}", why=f"one instruction may have {MAX_WORDS}")
    return words


def expand(
    text: str,
    variables: Mapping[str, str],
    *,
    escape: str = "\\",
    quotes: bool = True,
    budget: Budget | None = None,
) -> str:
    """`text` with its variables put in and its quotes and escapes taken off.

    With `quotes` false, quotes are ordinary characters: the inline files of COPY. Raises InvalidRequest for an
    open quote or brace, a form that is not known, and a value that grows too long.
    """
    budget = Budget() if budget is None else budget
    return budget.spend(_Expansion(text, variables, escape, quotes, budget).until(""))


class _Expansion:
    """One pass over one text."""

    def __init__(self, text: str, variables: Mapping[str, str], escape: str, quotes: bool, budget: Budget) -> None:
        self._text = text
        self._at = 0
        self._variables = variables
        self._escape = escape
        self._quotes = quotes
        self._budget = budget
        self._depth = 0

    def until(self, stop: str) -> str:
        """What comes before the unquoted character `stop`, which is passed over; all of it when that is empty."""
        out: list[str] = []
        while self._at < len(self._text):
            char = self._next()
            if stop and char == stop:
                return "".join(out)
            if char == "$":
                out.append(self._dollar())
            elif char == "'" and self._quotes:
                out.append(self._single())
            elif char == '"' and self._quotes:
                out.append(self._double())
            elif char == self._escape:
                # With nothing behind it, it means nothing.
                out.append(self._next())
            else:
                out.append(char)
        if stop:
            raise InvalidRequest(f"{_short(self._text)}: a '{stop}' is missing")
        return "".join(out)

    def _next(self) -> str:
        char = self._text[self._at : self._at + 1]
        self._at += 1
        return char

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _single(self) -> str:
        end = self._text.find("'", self._at)
        if end < 0:
            raise InvalidRequest(f"{_short(self._text)}: a single quote is never closed")
        inside = self._text[self._at : end]
        self._at = end + 1
        return inside

    def _double(self) -> str:
        out: list[str] = []
        while self._at < len(self._text):
            char = self._next()
            if char == '"':
                return "".join(out)
            if char == "$":
                out.append(self._dollar())
            elif char == self._escape:
                # Only these lose their meaning by it; before all others it stays.
                following = self._peek()
                if following and following in {'"', "$", self._escape}:
                    out.append(self._next())
                elif following:
                    out.append(char)
            else:
                out.append(char)
        raise InvalidRequest(f"{_short(self._text)}: a double quote is never closed")

    def _dollar(self) -> str:
        if self._peek() != "{":
            name = self._name()
            return self._budget.spend(self._variables.get(name, "")) if name else "$"
        self._next()
        name = self._name()
        if not name:
            raise InvalidRequest(f"{_short(self._text)}: bad substitution", why="a variable's name must follow '${'")
        operator = self._next()
        if operator == "}":
            return self._budget.spend(self._variables.get(name, ""))
        empty_counts = operator == ":"
        if empty_counts:
            operator = self._next()
        if not operator:
            raise InvalidRequest(f"{_short(self._text)}: a '}}' is missing")
        if operator not in "-+?":
            raise InvalidRequest(
                f"{_short(self._text)}: '${{{name}{operator}…}}' is not supported",
                why="of the forms of substitution, '-', '+' and '?' are, with and without a colon",
                fix="write the value out, or do it in a RUN",
            )
        return self._conditional(name, operator, empty_counts)

    def _conditional(self, name: str, operator: str, empty_counts: bool) -> str:
        self._depth += 1
        if self._depth > MAX_NESTING:
            raise InvalidRequest(f"{_short(self._text)}: too deep", why=f"at most {MAX_NESTING} levels of '${{…}}'")
        word = self.until("}")
        self._depth -= 1
        value = self._variables.get(name)
        missing = value is None or (empty_counts and not value)
        if operator == "+":
            return "" if missing else word
        if operator == "?" and missing:
            raise InvalidRequest(f"the variable {name} is not set", why=_short(word))
        return self._budget.spend(word if missing or value is None else value)

    def _name(self) -> str:
        start = self._at
        first = self._peek()
        if first and first in _SPECIAL:
            self._next()
            if first.isdigit():
                while self._peek() and self._peek() in "0123456789":
                    self._next()
            return self._text[start : self._at]
        while (char := self._peek()) and (char == "_" or (char.isascii() and char.isalnum())):
            self._next()
        return self._text[start : self._at]


def printable(error: InvalidRequest | ImageRefused) -> InvalidRequest:
    """The error without what would reach into the terminal that it is shown on: it quotes foreign text."""
    texts = (
        "".join(char if char.isprintable() or char == "\n" else "?" for char in text)
        for text in (error.what, error.why, error.fix)
    )
    what, why, fix = texts
    return InvalidRequest(what, why=why, fix=fix)


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}…"
