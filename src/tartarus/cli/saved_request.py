"""`run --request FILE`: a request that was saved, with the command line's options over it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from tartarus.cli import requests
from tartarus.cli.options import RUN
from tartarus.model.errors import InvalidRequest
from tartarus.model.sandbox import SandboxSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tartarus.cli.quick import Values

_MAX_BYTES = 4 * 1024**2
_MERGED = ("env", "labels", "resources")


def over(path: str, values: Values, words: Sequence[str]) -> dict[str, Any]:
    """The saved request, with what the command line says besides. Raises InvalidRequest and FileFailed.

    An option at its default says nothing; variables, labels and limits are added, mounts and the rest replaced.
    """
    saved = msgspec.to_builtins(_read(path))
    command = saved["command"]
    if not words and command is None:
        raise InvalidRequest(f"{path} has no command", fix=f"put one after --: tartarus run --request {path} -- ls")
    given = requests.given_spec(values, words or command["argv"])
    usual = {option.name: option.initial() for option in RUN}
    spec = dict(saved)
    for key, value in given.items():
        if key in _MERGED:
            known = {name: held for name, held in saved[key].items() if held is not None}
            spec[key] = known | value
        elif key != "command" and value and value != usual.get(key):
            spec[key] = value
    spec["command"] = given["command"] | ({} if words or command is None else {"env": command["env"]})
    if command is not None:
        spec["command"]["workdir"] = command["workdir"] if not words else ""
        if command["tty"] and not words and not values["tty"]:
            spec["command"] |= {name: command[name] for name in ("tty", "rows", "cols")}
    return spec


def _read(path: str) -> SandboxSpec:
    from tartarus.sdk.wholefile import read_whole

    content = read_whole(path, _MAX_BYTES)
    if not content.lstrip().startswith(b"{"):
        from tartarus.model.structured_yaml import StructReader

        see = "tartarus migrate writes such files; see docs/migrate.md"
        return StructReader(path, SandboxSpec, see=see, holds="one request").read(content)
    try:
        return msgspec.json.decode(content, type=SandboxSpec)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"{path} is no request", why=str(error).splitlines()[0][:200]) from None
