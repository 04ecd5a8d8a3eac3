"""A template as its author writes it: the keys of ``templates/my.yaml``, checked whole.

`definition_yaml` reads the file; the API takes the same struct as JSON. What the keys mean in the end is the node's.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from enum import Enum
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from tartarus.model.checks import MAX_ARGV_BYTES, check_env, check_labels, check_stop, no_nul
from tartarus.model.errors import InvalidRequest, TartarusError
from tartarus.model.ids import check_template_name
from tartarus.model.sandbox import Isolation, Resources
from tartarus.model.security import SecurityConfig

MAX_SCRIPT_BYTES = 64 * 1024
MAX_TEXT = 4096
MAX_PACKAGES = 256
_MIB = 1024**2
# A name, extras and version bounds: nothing that an installer could take for an option, a path or an address.
_PACKAGE = re.compile(
    r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,126}[A-Za-z0-9])?"
    r"(?:\[[A-Za-z0-9._-]+(?:,[A-Za-z0-9._-]+)*\])?"
    r"(?:(?:===?|~=|!=|<=?|>=?)[A-Za-z0-9.*+!_-]{1,64}(?:,(?:===?|~=|!=|<=?|>=?)[A-Za-z0-9.*+!_-]{1,64})*)?",
    re.ASCII,
)


class BuildNetwork(str, Enum):
    """What a build's steps may reach. `none`: nothing; `open`: public addresses, with names that the node resolves."""

    NONE = "none"
    OPEN = "open"


class DefinitionRefused(InvalidRequest):
    """A template's definition says something that can't be; `key` is the place, as in ``resources.max_cpu``."""

    def __init__(self, key: str, what: str, *, why: str = "", fix: str = "") -> None:
        super().__init__(f"{key}: {what}", why=why, fix=fix)
        self.key = key


class TemplateResources(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What its sandboxes get unless they ask for something else, and the most that they may ask for.

    CPUs in CPUs, memory and disk in MiB, `pids` in processes and threads. Without a maximum, only the host's holds.
    """

    default_cpu: Annotated[float, Meta(description="CPUs a sandbox gets, such as 2 or 0.5.")] = 1
    default_memory: Annotated[int, Meta(description="Memory a sandbox gets, in MiB.")] = 512
    default_disk: Annotated[int, Meta(description="What a sandbox may write, in MiB.")] = 1024
    default_pids: Annotated[int, Meta(description="Processes and threads a sandbox may have.")] = 512
    max_cpu: Annotated[float | None, Meta(description="The most CPUs a sandbox may ask for.")] = None
    max_memory: Annotated[int | None, Meta(description="The most memory a sandbox may ask for, in MiB.")] = None
    max_disk: Annotated[int | None, Meta(description="The most a sandbox may ask to write, in MiB.")] = None
    max_pids: Annotated[int | None, Meta(description="The most processes and threads it may ask for.")] = None

    def __post_init__(self) -> None:
        for kind, least, most in (("cpu", 0.01, 1024), ("memory", 8, 2**40), ("disk", 1, 2**40), ("pids", 4, 2**22)):
            default, highest = getattr(self, f"default_{kind}"), getattr(self, f"max_{kind}")
            for key, value in ((f"default_{kind}", default), (f"max_{kind}", highest)):
                if value is not None and not least <= value < most:
                    raise DefinitionRefused(f"resources.{key}", "out of range", fix=f"use {least:g} or more")
            if highest is not None and highest < default:
                raise DefinitionRefused(
                    f"resources.max_{kind}",
                    f"the maximum of {highest:g} is below the default of {default:g}",
                    fix=f"raise max_{kind}, or lower default_{kind}",
                )

    @property
    def defaults(self) -> Resources:
        """The limits of a sandbox that asks for none."""
        return Resources(
            memory_bytes=self.default_memory * _MIB,
            cpu_milli=round(self.default_cpu * 1000),
            pids=self.default_pids,
            disk_bytes=self.default_disk * _MIB,
        )

    def check(self, asked: Resources, template: str) -> None:
        """Refuse limits above the template's maximum. Raises InvalidRequest."""
        for what, value, most, unit in (
            ("CPUs", asked.cpu_milli / 1000, self.max_cpu, ""),
            ("memory", asked.memory_bytes / _MIB, self.max_memory, "MiB"),
            ("disk", asked.disk_bytes / _MIB, self.max_disk, "MiB"),
            ("pids", asked.pids, self.max_pids, ""),
        ):
            if most is not None and value > most:
                raise InvalidRequest(
                    f"{value:g}{unit} is more {what} than template {template!r} allows",
                    fix=f"ask for at most {most:g}{unit}",
                )


class Definition(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A template: what it is made from, how it warms up, and what its sandboxes get.

    What is left out of `env`, `workdir` and `user` is the image's. Its entrypoint and command are not used: whoever
    runs something gives the whole command.
    """

    id: Annotated[str, Meta(description="The name that sandboxes ask for it by, such as python-ds.")] = ""
    name: Annotated[str, Meta(description="A title for people.")] = ""
    description: Annotated[str, Meta(description="One sentence about it.")] = ""
    version: Annotated[str, Meta(description="The author's own version of it, in quotes.")] = ""
    base_image: Annotated[
        str,
        Meta(
            description="What it stands on: host (this machine's own programs), an image such as python:3.11-slim, "
            "another template's name, or the path (beginning with . or /) of a root file system, an OCI layout or a "
            "saved image. host when neither this nor dockerfile is given."
        ),
    ] = ""
    dockerfile: Annotated[str, Meta(description="A Dockerfile to build instead, beside this file.")] = ""
    packages: Annotated[
        tuple[str, ...], Meta(description="Python packages to install, such as numpy or pandas>=2.")
    ] = ()
    warmup_script: Annotated[
        str, Meta(description="What runs once before the template parks; what it loads is there from the start.")
    ] = ""
    warmup_language: Annotated[
        Literal["", "python", "node", "r"],
        Meta(description="The language of warmup_script, and what is kept warm; the first of them there is, if empty."),
    ] = ""
    ready_check: Annotated[
        tuple[str, ...],
        Meta(description="A command that must exit with 0 in a sandbox before the template is put in service."),
    ] = ()
    resources: TemplateResources = TemplateResources()
    env: Annotated[dict[str, str], Meta(description="Variables of every command, over the image's.")] = {}
    workdir: Annotated[str, Meta(description="The directory commands start in.")] = ""
    user: Annotated[str, Meta(description="Who commands run as: a name or number, with :group if need be.")] = ""
    stop_signal: Annotated[
        str, Meta(description="The signal that asks its sandboxes to end, such as TERM or QUIT; the image's if empty.")
    ] = ""
    stop_grace_s: Annotated[
        float | None, Meta(description="How long, in seconds, they then have before they are killed.")
    ] = None
    labels: Annotated[dict[str, str], Meta(description="Your own keys and values.")] = {}
    isolation: Annotated[
        Isolation, Meta(description="The weakest level that its sandboxes may have; auto sets no floor.")
    ] = Isolation.AUTO
    network: Annotated[
        BuildNetwork, Meta(description="What the steps of its build may reach; its sandboxes say so themselves.")
    ] = BuildNetwork.NONE
    security: Annotated[
        SecurityConfig | None, Meta(description="How its sandboxes are hardened; a request may only tighten it.")
    ] = None

    def __post_init__(self) -> None:
        if self.id:
            self._check("id", lambda: check_template_name(self.id))
        for key in ("name", "description", "version", "base_image", "dockerfile", "workdir", "user"):
            self._text(key, getattr(self, key), MAX_TEXT)
        self._text("warmup_script", self.warmup_script, MAX_SCRIPT_BYTES)
        if self.base_image and self.dockerfile:
            raise DefinitionRefused("dockerfile", "base_image is given too", fix="give one of the two")
        if self.workdir and not self.workdir.startswith("/"):
            raise DefinitionRefused("workdir", f"{self.workdir!r} is not absolute", fix="begin it with /")
        if len(self.packages) > MAX_PACKAGES:
            raise DefinitionRefused("packages", f"{len(self.packages)} packages", fix=f"use at most {MAX_PACKAGES}")
        for package in self.packages:
            if not _PACKAGE.fullmatch(package):
                raise DefinitionRefused(
                    "packages",
                    f"{package!r} is not a package with a version",
                    fix="write it like numpy, pandas>=2 or uvicorn[standard]==0.30.0",
                )
        if self.isolation is Isolation.WASM:
            raise DefinitionRefused(
                "isolation", "wasm is for modules, and no floor", fix="use container: its walls hold modules, too"
            )
        self._check("stop_signal", lambda: check_stop(self.stop_signal, None))
        self._check("stop_grace_s", lambda: check_stop("", self.stop_grace_s))
        self._check("env", lambda: check_env(self.env))
        self._check("labels", lambda: check_labels(self.labels))
        words = self.ready_check
        if sum(len(word) + 9 for word in words) > MAX_ARGV_BYTES or (words and not words[0]):
            raise DefinitionRefused("ready_check", "not a command", fix='write it like ["sh", "-c", "true"]')
        for word in words:
            self._text("ready_check", word, MAX_ARGV_BYTES)

    @staticmethod
    def _text(key: str, text: str, most: int) -> None:
        Definition._check(key, lambda: no_nul(text, key))
        if len(text) > most:
            raise DefinitionRefused(key, f"{len(text)} characters", fix=f"use at most {most}")

    @staticmethod
    def _check(key: str, check: Callable[[], object]) -> None:
        try:
            check()
        except TartarusError as error:
            raise DefinitionRefused(key, error.what, why=error.why, fix=error.fix) from None
