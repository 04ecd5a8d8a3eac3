"""The short forms people type: ``NAME=value``, ``key=value``, ``source:target[:ro]``."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from tartarus.model.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence


def environment(words: Iterable[str], own: Mapping[str, str], what: str = "variable") -> dict[str, str]:
    """From NAME=VALUE words; NAME alone takes our own value, if we have one. `what`: what they are, for errors."""
    found = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not name:
            raise InvalidRequest(f"{word!r} is not a {what}", fix="write it like NAME=value, or NAME for yours")
        if equals:
            found[name] = value
        elif name in own:
            found[name] = own[name]
    return found


def labels(words: Sequence[str]) -> dict[str, str]:
    """Labels from KEY=VALUE words."""
    found = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not key or not equals:
            raise InvalidRequest(f"{word!r} is not a label", fix="write it like key=value")
        found[key] = value
    return found


def mount_fields(text: str) -> dict[str, Any]:
    """A mount's JSON from ``source:target[:ro|rw]``; a relative source is below the current directory."""
    parts = text.split(":")
    mode = parts.pop() if len(parts) == 3 else "rw"
    if len(parts) != 2 or mode not in {"ro", "rw"} or not all(parts):
        raise InvalidRequest(f"{text!r} is not a mount", fix="write it like /on/host:/in/sandbox[:ro]")
    return {"source": os.path.abspath(parts[0]), "target": parts[1], "read_only": mode == "ro"}


def secret_fields(text: str) -> dict[str, str]:
    """A secret's JSON from ``NAME[,as=env|file|proxy][,target=T]``; the name or reference is as its grant has it."""
    ref, *rest = text.split(",")
    found = {"ref": ref}
    for part in rest:
        key, equals, value = part.partition("=")
        if key not in {"as", "target"} or not equals or not value or key in found:
            raise InvalidRequest(f"{text!r} is not a secret", fix="write it like NAME, or NAME,as=env,target=VARIABLE")
        found[key] = value
    return found


_FLAGS = ("hardened_kernel", "user_namespace")
_WORDS = ("kernel_lockdown", "seccomp_profile", "seccomp_default")
_NAMES = ("drop_capabilities", "add_capabilities")
_MAPPINGS = ("uid_mapping", "gid_mapping")


def security_fields(texts: Iterable[str]) -> dict[str, Any]:
    """A SecurityConfig's JSON from ``KEY=VALUE`` each: names in lists with commas, mappings as ``ID:SIZE``."""
    found: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not value or key in found:
            raise InvalidRequest(f"{text!r} is no security setting", fix="write it once, like seccomp_profile=ember")
        if key in _FLAGS and value in {"true", "false"}:
            found[key] = value == "true"
        elif key in _WORDS:
            found[key] = value
        elif key in _NAMES:
            found[key] = value.split(",")
        elif key in _MAPPINGS:
            first, _, size = value.partition(":")
            if not (first.isdecimal() and size.isdecimal()):
                raise InvalidRequest(f"{text!r} is no range of ids", fix=f"write it like {key}=0:1000")
            found[key] = [{"container_id": int(first), "size": int(size)}]
        else:
            known = ", ".join((*_FLAGS, *_WORDS, *_NAMES, *_MAPPINGS))
            raise InvalidRequest(f"{text!r} is no security setting", fix=f"of settings there are: {known}")
    return found
