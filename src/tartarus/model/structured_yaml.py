"""Reading YAML into structs: safe YAML only, and every refusal says the line.

The parser is libyaml's, by PyYAML (well kept, and what everybody's YAML was tried with). It makes nodes with line
numbers and no objects; aliases, which let a few bytes stand for gigabytes, are refused.
"""

from __future__ import annotations

import difflib
import re
from enum import Enum
from functools import cache
from typing import Any, Generic, Literal, TypeVar, get_args, get_origin, get_type_hints

import msgspec
import yaml

from tartarus.model.errors import InvalidRequest

S = TypeVar("S", bound=msgspec.Struct)
MAX_FILE_BYTES = 256 * 1024
MAX_DEPTH = 16
_ERROR = re.compile(r"(?P<what>.*?)(?: - at `\$(?P<path>.*)`)?", re.DOTALL)
_ENUM = re.compile(r"Invalid enum value '(.*)'", re.DOTALL)
_PLAIN = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null")}
_STR = "tag:yaml.org,2002:str"
_QUOTE = 'put it in quotes if it is text: "…"'


class StructReader(Generic[S]):
    """One file that becomes one struct: its values, and the line of each by its path (``resources.max_cpu``).

    `see` says where every key is described, `holds` what one file is.
    """

    def __init__(self, source: str, kind: type[S], *, see: str, holds: str) -> None:
        self._source = source
        self._kind = kind
        self._see = see
        self._holds = holds
        self._lines: dict[str, int] = {}
        self._kinds: dict[str, str] = {}
        self._types: dict[str, Any] = {}

    def read(self, text: bytes | str) -> S:
        """The struct.

        Raises InvalidRequest: not YAML, an unknown key (the likeliest one is suggested) or a wrong type; with the
        line, what was expected, and what to do.
        """
        value = self._plain(text)
        try:
            return msgspec.convert(value, self._kind)
        except msgspec.ValidationError as error:
            raise self._explained(str(error)) from None

    def line(self, path: str) -> int:
        """Where a place begins; 0 for one that was left out."""
        return self._lines.get(path, 0)

    def _plain(self, text: bytes | str) -> dict[str, Any]:
        """Plain values; unknown keys are refused here."""
        size = len(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
        if size > MAX_FILE_BYTES:
            raise InvalidRequest(f"{self._source} is {size} bytes long", fix=f"use at most {MAX_FILE_BYTES}")
        try:
            text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
            self._survey(text)
            node = yaml.CSafeLoader(text).get_single_node()
        except UnicodeError:
            raise InvalidRequest(f"{self._source} is not UTF-8 text", fix="save it as UTF-8") from None
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = mark.line + 1 if mark is not None else 1
            why = ", ".join(part for part in (error.context, error.problem) if part)
            raise self._at(line, "not YAML", why=why, fix="mind the indentation and the quotes") from None
        except yaml.YAMLError as error:
            raise InvalidRequest(f"{self._source} is not YAML", why=" ".join(str(error).split())) from None
        if not isinstance(node, yaml.MappingNode):
            raise InvalidRequest(f"{self._source} has no keys", fix=self._see)
        found: dict[str, Any] = self._value(node, "", self._kind)
        return found

    def _survey(self, text: str) -> None:
        """Refuse what must not be composed: the composer is recursive, and follows aliases."""
        depth = 0
        documents = 0
        for event in yaml.parse(text, Loader=yaml.CSafeLoader):
            line = event.start_mark.line + 1 if event.start_mark is not None else 1
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                raise self._at(line, "aliases and anchors (* and &) are not taken", fix="write the value out")
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise self._at(line, "a second document", fix=f"one file holds {self._holds}")
            elif isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
                depth += 1
                if depth > MAX_DEPTH:
                    raise self._at(line, "nested too deeply", fix=self._see)
            elif isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
                depth -= 1

    def _value(self, node: yaml.Node, path: str, kind: Any) -> Any:
        self._lines[path] = node.start_mark.line + 1
        self._types[path] = kind
        self._kinds[path] = node.tag.rpartition(":")[2]
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path, kind)
        if isinstance(node, yaml.SequenceNode):
            return [self._value(item, f"{path}[{index}]", kind) for index, item in enumerate(node.value)]
        if node.tag not in _PLAIN:
            raise self._at(node.start_mark.line + 1, f"{path}: a {self._kinds[path]} is not taken", fix=_QUOTE)
        # An empty loader: nothing but the scalar's own text is looked at.
        try:
            return yaml.SafeLoader("").construct_object(node)
        except ValueError as error:
            raise self._at(node.start_mark.line + 1, f"{path}: not a number", why=str(error), fix=_QUOTE) from None

    def _mapping(self, node: yaml.MappingNode, path: str, kind: Any) -> dict[str, Any]:
        owner = _struct_in(kind)
        hints = _keys(owner)
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != _STR:
                raise self._at(line, "a key that is no text", fix=_QUOTE)
            key = key_node.value
            place = f"{path}.{key}" if path else key
            if key in found:
                raise self._at(line, f"{place} is there twice", fix="remove one")
            if owner is not None and key not in hints:
                where = f" in {path}" if path else ""
                raise self._at(line, f"unknown key {key!r}{where}", fix=_nearest(key, list(hints)))
            found[key] = self._value(value_node, place, hints.get(key))
            self._lines[place] = line
        return found

    def _explained(self, message: str) -> InvalidRequest:
        """What msgspec refused, with the line: it names the place, but not the key of a mapping (``.env[...]``)."""
        match = _ERROR.fullmatch(message)
        what, path = (match["what"], (match["path"] or "").lstrip(".")) if match else (message, "")
        if path.endswith("[...]"):
            parent = path.removesuffix("[...]")
            wrong = (
                place
                for place, kind in self._kinds.items()
                if place.startswith(parent + ".") and kind != "str"
            )  # fmt: skip
            path = next(wrong, parent)
        if value := _ENUM.fullmatch(what):
            fix = _nearest(value[1], _values(self._types.get(path)))
            return self.refused(path, f"{path}: {value[1]!r} is none of the values", fix=fix)
        expected_text = what.startswith("Expected `str`")
        return self.refused(path, f"{path}: {what}", fix=_QUOTE if expected_text else self._see)

    def refused(self, path: str, what: str, *, why: str = "", fix: str = "") -> InvalidRequest:
        """The error for a place, or for the whole when that place was left out."""
        line = self._lines.get(path)
        if line is None:
            return InvalidRequest(f"{self._source}: {what}", why=why, fix=fix)
        return self._at(line, what, why=why, fix=fix)

    def _at(self, line: int, what: str, *, why: str = "", fix: str = "") -> InvalidRequest:
        return InvalidRequest(f"{self._source}, line {line}: {what}", why=why, fix=fix)


@cache
def _keys(owner: type[msgspec.Struct] | None) -> dict[str, Any]:
    """What may be written in a struct, and its types."""
    if owner is None:
        return {}
    types = get_type_hints(owner)
    return {field.encode_name: types[field.name] for field in msgspec.structs.fields(owner)}


def _values(kind: Any) -> list[str]:
    """What may stand there, where that is an enumeration."""
    if get_origin(kind) is Literal:
        return [str(value) for value in get_args(kind) if value]
    return [str(member.value) for member in kind] if isinstance(kind, type) and issubclass(kind, Enum) else []


def _struct_in(kind: Any) -> type[msgspec.Struct] | None:
    for candidate in (kind, *get_args(kind)):
        if isinstance(candidate, type) and issubclass(candidate, msgspec.Struct):
            return candidate
    return None


def _nearest(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key.lower(), known, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(sorted(known))}"
