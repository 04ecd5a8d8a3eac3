"""JSON to structs, strictly: a wrong type, an unknown key or a NUL byte refuses the whole body, and says where."""

from __future__ import annotations

import difflib
import functools
import re
import typing
from enum import Enum
from typing import Any, TypeVar, cast, get_args, get_type_hints

import msgspec
from litestar.dto import AbstractDTO

from tartarus.model.errors import InvalidRequest

if typing.TYPE_CHECKING:
    from litestar._openapi.schema_generation import SchemaCreator
    from litestar.openapi.spec import Reference, Schema
    from litestar.typing import FieldDefinition

T = TypeVar("T")
_MESSAGE = re.compile(r"(?P<what>.*?)(?: - at `\$(?P<path>.*)`)?", re.DOTALL)
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)
_ENUM = re.compile(r"Invalid enum value '(.*)'", re.DOTALL)
_STEP = re.compile(r"\.([^.\[]+)|\[[^\]]*\]")


@functools.cache
def _decoder(kind: Any) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(kind)


def decode(kind: type[T], body: bytes | str) -> T:
    """Read `body` as one `kind`. Raises InvalidRequest, naming the place and the nearest known key."""
    decoder: msgspec.json.Decoder[T] = _decoder(cast("Any", kind))
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _explain(kind, str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the body is not JSON: {error}", fix="send one JSON object, in UTF-8") from None
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply", fix="see GET /v1/schema") from None


def nearest(key: str, known: typing.Collection[str]) -> str:
    """Advice on an unknown key: the one that was probably meant, else all there are."""
    close = difflib.get_close_matches(key.lower(), known, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known here: {', '.join(sorted(known))}" if known else "see GET /v1/schema"


def _explain(kind: Any, message: str) -> InvalidRequest:
    """The library's message in our words, with what was probably meant."""
    found = _MESSAGE.fullmatch(message)
    if found is None:
        return InvalidRequest(message, fix="see GET /v1/schema")
    what, path = found["what"], found["path"] or ""
    place = f" in {path.lstrip('.')}" if path else ""
    there = _at(kind, path)
    if unknown := _UNKNOWN.fullmatch(what):
        owner = _struct_in(there)
        known = owner.__struct_encode_fields__ if owner is not None else ()
        return InvalidRequest(f"unknown key {unknown[1]!r}{place}", fix=nearest(unknown[1], known))
    if wrong := _ENUM.fullmatch(what):
        values = [str(member.value) for member in there] if isinstance(there, type) and issubclass(there, Enum) else []
        return InvalidRequest(f"{wrong[1]!r} is not one of the values{place}", fix=nearest(wrong[1], values))
    return InvalidRequest(f"{what}{place}", fix="see GET /v1/schema")


def _at(kind: Any, path: str) -> Any:
    """The type that a path such as ``.command.env[...]`` leads to; None where it leads nowhere."""
    for step in _STEP.finditer(path):
        owner = _struct_in(kind)
        if step[1] is None:
            kind = next((arg for arg in reversed(get_args(kind)) if arg is not Ellipsis), None)
        else:
            kind = None if owner is None else get_type_hints(owner).get(step[1])
    return kind


def _struct_in(kind: Any) -> type[msgspec.Struct] | None:
    """The struct among `kind` and, for unions such as ``X | None``, its members."""
    for candidate in (kind, *get_args(kind)):
        if isinstance(candidate, type) and issubclass(candidate, msgspec.Struct):
            return candidate
    return None


class Strict(AbstractDTO[T]):
    """Makes Litestar read a handler's `data` with `decode`, and describe it by its own type."""

    @classmethod
    def create_for_field_definition(
        cls, field_definition: FieldDefinition, handler_id: str, backend_cls: Any = None
    ) -> None:
        """Nothing to prepare: the struct is its own transfer model."""

    @classmethod
    def create_openapi_schema(
        cls,
        field_definition: FieldDefinition,
        handler_id: str,  # noqa: ARG003 - the framework's signature
        schema_creator: SchemaCreator,
    ) -> Reference | Schema:
        """Describe the body as the struct that it is."""
        return schema_creator.for_field_definition(field_definition)

    def decode_bytes(self, value: bytes) -> T:
        """Called by Litestar with the whole body, already within its size cap."""
        return decode(self.model_type, value)
