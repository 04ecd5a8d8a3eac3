"""Instructions that change what an image says of itself, and no file of it."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable
from typing import Any, Final

import msgspec

from tartarus.images.dockerfile import instructions as are
from tartarus.images.dockerfile.limits import MAX_PATH_BYTES, MAX_PORTS, MAX_VARIABLES
from tartarus.images.dockerfile.variables import Scope
from tartarus.images.oci import ImageConfig
from tartarus.model.errors import InvalidRequest

DEFAULT_SHELL: Final = ("/bin/sh", "-c")
_PORT: Final = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?(?:/(tcp|udp|sctp))?", re.IGNORECASE)
_SIGNAL: Final = re.compile(r"(?:SIG)?RTM(?:IN(?:\+[0-9]{1,2})?|AX(?:-[0-9]{1,2})?)")


def configure(config: ImageConfig, step: are.Instruction, scope: Scope, *, cmd_is_own: bool) -> ImageConfig:
    """The configuration after `step`. `cmd_is_own`: CMD was given in this stage, so ENTRYPOINT lets it stand.

    Raises InvalidRequest for values that make no sense.
    """
    changes = _CHANGES[type(step)](step, config, scope)
    if isinstance(step, are.Entrypoint) and not cmd_is_own:
        changes["cmd"] = ()
    return msgspec.structs.replace(config, **changes)


def command(argv: tuple[str, ...], *, in_shell: bool, config: ImageConfig) -> tuple[str, ...]:
    """The arguments of a command, with the stage's shell in front when it is in shell form."""
    return (*(config.shell or DEFAULT_SHELL), *argv) if in_shell else argv


def plain(text: str) -> str:
    """`text`, if a program can be given it: no NUL, and no half of a character."""
    if "\0" in text:
        raise InvalidRequest("a NUL character in a value")
    return text


def _pairs(pairs: tuple[tuple[str, str], ...], before: dict[str, str], scope: Scope) -> dict[str, str]:
    # All values see the variables as they were before the instruction.
    found = {plain(scope.expand(name)): plain(scope.expand(value)) for name, value in pairs}
    for name in found:
        if not name or "=" in name:
            raise InvalidRequest(f"{name[:100]!r} is no name")
    if len(before) + len(found) > MAX_VARIABLES:
        raise InvalidRequest(f"more than {MAX_VARIABLES} of them")
    return {**before, **found}


def _env(step: are.Env, config: ImageConfig, scope: Scope) -> dict[str, Any]:
    return {"env": _pairs(step.pairs, config.env, scope)}


def _label(step: are.Label, config: ImageConfig, scope: Scope) -> dict[str, Any]:
    return {"labels": _pairs(step.pairs, config.labels, scope)}


def _user(step: are.User, config: ImageConfig, scope: Scope) -> dict[str, Any]:  # noqa: ARG001 - all are called alike
    user = plain(scope.expand(step.user)).strip()
    if not user or len(user) > 512 or len(user.split()) != 1:
        raise InvalidRequest(f"{step.user[:100]!r} is no user", fix="write USER name, or USER uid:gid")
    return {"user": user}


def _cmd(step: are.Cmd, config: ImageConfig, scope: Scope) -> dict[str, Any]:  # noqa: ARG001
    return {"cmd": command(step.argv, in_shell=step.in_shell, config=config)}


def _entrypoint(step: are.Entrypoint, config: ImageConfig, scope: Scope) -> dict[str, Any]:  # noqa: ARG001
    return {"entrypoint": command(step.argv, in_shell=step.in_shell, config=config)}


def _shell(step: are.Shell, config: ImageConfig, scope: Scope) -> dict[str, Any]:  # noqa: ARG001
    return {"shell": step.argv}


def _healthcheck(step: are.Healthcheck, config: ImageConfig, scope: Scope) -> dict[str, Any]:  # noqa: ARG001
    return {"healthcheck": step.test}


def _expose(step: are.Expose, config: ImageConfig, scope: Scope) -> dict[str, Any]:
    ports = dict.fromkeys(config.exposed_ports)
    for word in scope.expand(step.ports).split():
        found = _PORT.fullmatch(word)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
        if found is None or not 1 <= first <= last <= 65535:
            raise InvalidRequest(f"{word[:60]!r} is no port", fix="write 80, 53/udp or 8000-8010")
        if last - first >= MAX_PORTS or len(ports) > MAX_PORTS:
            raise InvalidRequest("too many ports", why=f"at most {MAX_PORTS}")
        ports.update(dict.fromkeys(f"{port}/{(found[3] or 'tcp').lower()}" for port in range(first, last + 1)))
    return {"exposed_ports": tuple(ports)}


def _stop_signal(step: are.StopSignal, config: ImageConfig, scope: Scope) -> dict[str, Any]:  # noqa: ARG001
    text = scope.expand(step.signal).upper()
    known = {name.removeprefix("SIG") for name in signal.Signals.__members__}
    number = text.isascii() and text.isdecimal() and len(text) < 3 and 1 <= int(text) <= 64
    if not (number or text.removeprefix("SIG") in known or _SIGNAL.fullmatch(text)):
        raise InvalidRequest(f"{text[:60]!r} is no signal", fix="write SIGTERM, or a number from 1 to 64")
    return {"stop_signal": text}


def workdir(config: ImageConfig, step: are.Workdir, scope: Scope) -> str:
    """The absolute path of a WORKDIR, which is relative to the one before it. Raises InvalidRequest."""
    path = plain(scope.expand(step.path))
    if not path.strip():
        raise InvalidRequest(f"{step.path[:100]!r} is no directory")
    return absolute(path, config.workdir)


def absolute(path: str, base: str) -> str:
    """`path` from `base`, without "." and "..". Raises InvalidRequest when it is longer than any path can be."""
    parts: list[str] = []
    for part in f"{'' if path.startswith('/') else base}/{path}".split("/"):
        if part == "..":
            del parts[-1:]
        elif part not in {"", "."}:
            parts.append(part)
    found = f"/{'/'.join(parts)}"
    if len(found.encode(errors="surrogateescape")) > MAX_PATH_BYTES or any(
        len(part.encode(errors="surrogateescape")) > 255 for part in parts
    ):
        raise InvalidRequest(f"{found[:60]}… is too long for a path")
    return found


_CHANGES: Final[dict[type[are.Instruction], Callable[..., dict[str, Any]]]] = {
    are.Cmd: _cmd,
    are.Entrypoint: _entrypoint,
    are.Env: _env,
    are.Expose: _expose,
    are.Healthcheck: _healthcheck,
    are.Label: _label,
    are.Shell: _shell,
    are.StopSignal: _stop_signal,
    are.User: _user,
}
