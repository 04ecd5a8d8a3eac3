"""A request, held to a monitor's official API document: path, method, body, required and unknown fields, types, enums.

Firecracker's document is Swagger 2.0, Cloud Hypervisor's OpenAPI 3.0.1. Both monitors refuse unknown fields or might
one day, so every object with listed properties is closed here, which is stricter than the documents are.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema
import yaml

PLACE = Path(__file__).parent


class Breach(Exception):
    """A request that the document does not allow."""


class Operation(NamedTuple):
    """One documented operation: its path, its parameters, the schema of its body."""

    template: str
    parameters: dict[str, str]
    body: dict[str, Any] | None
    body_required: bool
    statuses: frozenset[int]


class Document:
    """One monitor's API."""

    def __init__(self, name: str) -> None:
        with (PLACE / name).open(encoding="utf-8") as file:
            self._loaded: dict[str, Any] = closed(yaml.safe_load(file))
        base = self._loaded.get("basePath", "/")
        for server in self._loaded.get("servers", ()):
            base = server["url"].removeprefix("http://localhost")
        self._base = base.rstrip("/")

    def check(self, method: str, path: str, body: Any) -> Operation:
        """The operation that a request asks for. Raises Breach for what the document does not have."""
        if not path.startswith(self._base + "/"):
            raise Breach(f"{path} is not below {self._base}")
        found = self._find(method, path.removeprefix(self._base))
        if body is None:
            if found.body_required:
                raise Breach(f"{method} {path} needs a body")
            return found
        if found.body is None:
            raise Breach(f"{method} {path} takes no body")
        schema = {**found.body, "definitions": self._loaded.get("definitions", {}),
                  "components": self._loaded.get("components", {})}  # fmt: skip
        problems = sorted(jsonschema.Draft4Validator(schema).iter_errors(body), key=str)
        if problems:
            where = "/".join(str(part) for part in problems[0].absolute_path)
            raise Breach(f"{method} {path}: {where or 'the body'}: {problems[0].message}")
        for name, value in found.parameters.items():
            if isinstance(body, dict) and name in body and body[name] != value:
                raise Breach(f"{method} {path}: {name} is {body[name]!r}")
        return found

    def _find(self, method: str, path: str) -> Operation:
        for template, operations in self._loaded["paths"].items():
            pattern = re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>[^/]+)", re.escape(template))
            match = re.fullmatch(pattern, path)
            if match is not None and method.lower() in operations:
                return _operation(template, operations[method.lower()], match.groupdict())
        raise Breach(f"there is no {method} {path}")


def _operation(template: str, said: dict[str, Any], parameters: dict[str, str]) -> Operation:
    statuses = frozenset(int(status) for status in said["responses"] if str(status).isdigit())
    for parameter in said.get("parameters", ()):
        if parameter["in"] == "body":
            return Operation(template, parameters, parameter["schema"], parameter.get("required", False), statuses)
    request = said.get("requestBody")
    if request is None:
        return Operation(template, parameters, None, False, statuses)
    schema = request["content"]["application/json"]["schema"]
    return Operation(template, parameters, schema, request.get("required", False), statuses)


def closed(node: Any) -> Any:
    """The same with every object of listed properties closed to others."""
    if isinstance(node, list):
        return [closed(part) for part in node]
    if not isinstance(node, dict):
        return node
    made = {key: closed(value) for key, value in node.items()}
    if isinstance(node.get("properties"), dict) and node.get("type", "object") == "object":
        made.setdefault("additionalProperties", False)
    return made
