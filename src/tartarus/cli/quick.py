"""The short way to parse `run` and `exec`: what click would make of the arguments, or None to ask click itself.

click takes 22 ms to import. This reads every well-formed command line; whatever is unusual (unknown or
incomplete options, --help, a bad choice) is left to click, which knows how to explain it. A property test
holds both to the same answer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tartarus.cli.options import FLAG, LIST, NUMBER

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tartarus.cli.options import Option

Values = dict[str, object]


def parse(arguments: Sequence[str], options: Sequence[Option]) -> tuple[Values, list[str]] | None:
    """The options' values and the words after them, or None when click must decide."""
    known = {flag: option for option in options for flag in option.flags}
    values: Values = {option.name: option.initial() for option in options}
    lists: dict[str, list[str]] = {option.name: [] for option in options if option.kind == LIST}
    rest = list(arguments)
    while rest and rest[0].startswith("-") and len(rest[0]) > 1:
        word = rest.pop(0)
        if word == "--":
            break
        if not _take(word, rest, known, values, lists):
            return None
    for name, items in lists.items():
        values[name] = tuple(items)
    return values, rest


def _take(word: str, rest: list[str], known: dict[str, Option], values: Values, lists: dict[str, list[str]]) -> bool:
    """Read one word that begins with a dash, and its value; False when it is unusual."""
    if word.startswith("--"):
        flag, equals, value = word.partition("=")
        option = known.get(flag)
        if option is None or (option.kind == FLAG and equals):
            return False
        return _set(option, value if equals else None, rest, values, lists)
    for position in range(1, len(word)):
        option = known.get("-" + word[position])
        if option is None:
            return False
        if option.kind != FLAG:
            return _set(option, word[position + 1 :] or None, rest, values, lists)
        values[option.name] = True
    return True


def _set(option: Option, value: str | None, rest: list[str], values: Values, lists: dict[str, list[str]]) -> bool:
    if option.kind == FLAG:
        values[option.name] = True
        return True
    if value is None:
        if not rest:
            return False
        value = rest.pop(0)
    if option.choices and value not in option.choices:
        return False
    if option.kind == LIST:
        lists[option.name].append(value)
    elif option.kind == NUMBER:
        if not (value.isascii() and value.isdigit()) or len(value) > 18:
            return False
        values[option.name] = int(value)
    else:
        values[option.name] = value
    return True
