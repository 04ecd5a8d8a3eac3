"""ARG and ENV: which variables an instruction sees, and which of them a RUN gets."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from typing import Final

from tartarus.images.dockerfile.instructions import Arg, Dockerfile
from tartarus.images.dockerfile.limits import MAX_BUILD_ARGS, MAX_VALUE
from tartarus.images.dockerfile.words import Budget, expand
from tartarus.images.oci import Platform
from tartarus.model.errors import InvalidRequest

PROXIES: Final = frozenset(
    name
    for base in ("HTTP_PROXY", "HTTPS_PROXY", "FTP_PROXY", "NO_PROXY", "ALL_PROXY")
    for name in (base, base.lower())
)
"""Build arguments that need no ARG, and that do not count for the cache (Docker: "Predefined ARGs")."""


def platform_arguments(platform: Platform, target: str) -> dict[str, str]:
    """Docker's "automatic platform ARGs in the global scope". We build for the host only, so both sides are it."""
    name = "/".join(part for part in (platform.os, platform.architecture, platform.variant) if part)
    values = {
        "PLATFORM": name,
        "OS": platform.os,
        "ARCH": platform.architecture,
        "VARIANT": platform.variant,
    }
    found = {f"{side}{key}": value for side in ("TARGET", "BUILD") for key, value in values.items()}
    return {**found, "TARGETSTAGE": target or "default"}


def check_build_args(dockerfile: Dockerfile, given: Mapping[str, str]) -> None:
    """Refuse build arguments that nothing declares, that are too many or too long. Raises InvalidRequest."""
    if len(given) > MAX_BUILD_ARGS:
        raise InvalidRequest(f"{len(given)} build arguments", why=f"at most {MAX_BUILD_ARGS}")
    instructions = [*dockerfile.arguments, *(step for stage in dockerfile.stages for step in stage.steps)]
    declared = {name for step in instructions if isinstance(step, Arg) for name, _ in step.pairs}
    for name, value in given.items():
        if name not in declared and name not in PROXIES:
            raise InvalidRequest(
                f"no ARG in the Dockerfile takes the build argument {name[:100]!r}",
                why=f"declared are: {_listed(declared)}",
                fix=f"add 'ARG {name[:100]}' to the stage that uses it, or leave it out",
            )
        if len(value) > MAX_VALUE or "\0" in value or not _is_text(value):
            raise InvalidRequest(f"the build argument {name!r} can't be a variable", why="too long, or no text")


def _listed(names: set[str]) -> str:
    shown = [name[:100] for name in sorted(names)[:20]]
    return ", ".join([*shown, *(["…"] if len(names) > len(shown) else [])]) or "none"


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


class Scope:
    """The variables of one stage, or of the lines in front of the first one."""

    def __init__(self, given: Mapping[str, str], outer: Mapping[str, str], budget: Budget, escape: str) -> None:
        """`given`: the build arguments. `outer`: values an ARG without one of its own takes: the global ARGs."""
        self._given = given
        self._outer = outer
        self._budget = budget
        self._escape = escape
        self.args: dict[str, str] = {}
        """Declared here, or in a stage this one is based on."""
        self.env: dict[str, str] = {}

    def declare(self, arg: Arg) -> None:
        """An ARG: from here on its names have values, if anybody gave one."""
        for name, default in arg.pairs:
            if name in self._given:
                self.args[name] = self._given[name]
            elif default is not None:
                self.args[name] = self.expand(default)
            elif name in self._outer:
                self.args[name] = self._outer[name]

    def expand(self, text: str, *, quotes: bool = True) -> str:
        """Put variables in. ENV comes before ARG, always."""
        return expand(text, ChainMap(self.env, self.args), escape=self._escape, quotes=quotes, budget=self._budget)

    def run_environment(self) -> tuple[dict[str, str], dict[str, str]]:
        """(what a RUN gets, the part of it that its cache key depends on)."""
        env = {**self.args, **self.env}
        proxies = {name: value for name, value in self._given.items() if name in PROXIES and name not in env}
        return {**env, **proxies}, env
