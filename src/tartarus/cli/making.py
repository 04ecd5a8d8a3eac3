"""What the commands that make templates share: logins, ignored files, and the conversation on the way."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tartarus.cli import output
from tartarus.cli.show import print_json
from tartarus.cli.steps import Steps
from tartarus.model.errors import InvalidRequest, TemplateBlocked
from tartarus.model.library import Credentials, DockerfileSource, TemplateStatus

if TYPE_CHECKING:
    from tartarus.sdk.packing import Ignore
    from tartarus.sdk.plans import Plan

REPLACE = click.option(
    "--replace", is_flag=True, help="Take the place of your template of that name, which serves until then."
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object with the result.")
BUILD_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.option("--build-arg", "build_args", multiple=True, metavar="NAME[=VALUE]", help="A build argument."),
    click.option("--target", default="", metavar="STAGE", help="The stage to stop at."),
    click.option(
        "--network", type=click.Choice(["none", "open"]), default=None,
        help="What a build's steps may reach; open: public addresses only.  [default: none, or what the YAML says]",
    ),
    click.option("--ca-bundle", is_flag=True, help="Show this host's certificates to a build's steps."),
    click.option("--no-cache", is_flag=True, help="Run every step again."),
)  # fmt: skip


def build_options(command: Any) -> Any:
    """The options of everything that may build."""
    for option in reversed(BUILD_OPTIONS):
        command = option(command)
    return command


def make(made: Plan, *, what: str, as_json: bool) -> int:
    """Carry a plan out and say so; returns the exit status."""
    from tartarus.sdk import Template

    if not as_json:
        output.write(1, output.one_line(f"Creating template '{made.name}' from {what}...").encode() + b"\n")
    with Steps(quiet=as_json) as steps:
        info = Template.make(made, on_progress=steps).info
    if as_json:
        print_json(info)
    if info.status is TemplateStatus.BLOCKED:
        return output.report(
            TemplateBlocked(
                f"template {info.name!r} was made, but can't be used", why=info.message,
                fix=f"see: tartarus template scan {info.name}",
            )
        )  # fmt: skip
    if not as_json:
        output.write(1, f"Template '{info.name}' ready (ID: {info.id})\n".encode())
    return 0


def login(reference: str) -> tuple[Credentials, ...]:
    """Our login for an image's registry, from Docker's config.json and credential helpers."""
    return _logins([reference])


def logins_of(made: Plan) -> Plan:
    """The same plan with our logins for the images that it takes. Raises InvalidRequest for a bad Dockerfile."""
    from msgspec.structs import replace

    from tartarus.model.library import ImageSource

    source = made.source
    if isinstance(source, ImageSource) and source.reference != "host":
        return made._replace(source=replace(source, credentials=_logins([source.reference])))
    if isinstance(source, DockerfileSource):
        return made._replace(source=replace(source, credentials=_logins(_bases(source))))
    return made


def _bases(source: DockerfileSource) -> list[str]:
    from tartarus.images.dockerfile.parser import parse
    from tartarus.images.dockerfile.planning import make_plan
    from tartarus.images.dockerfile.words import Budget
    from tartarus.images.oci import host_platform

    planned = make_plan(parse(source.dockerfile), source.target, source.args, host_platform(), Budget())
    found = [base for stage in planned.stages for base in (stage.base, *stage.origins.values())]
    return [base for base in found if isinstance(base, str) and base]


def _logins(references: Iterable[str]) -> tuple[Credentials, ...]:
    from tartarus.images.reference import Reference
    from tartarus.images.registry.credentials import DockerConfig

    registries = set()
    for reference in references:
        # What is no image's name may be a template's; the daemon knows.
        with contextlib.suppress(InvalidRequest):
            registries.add(Reference.parse(reference).registry)
    if not registries:
        return ()
    home = os.environ.get("DOCKER_CONFIG") or os.path.join(os.path.expanduser("~"), ".docker")
    config = DockerConfig(Path(home) / "config.json")

    async def ask() -> list[Credentials]:
        logins = []
        for registry in sorted(registries):
            known = await config.find(registry)
            if known is not None:
                logins.append(Credentials(registry, known.username, known.password, known.identity_token))
        return logins

    return tuple(asyncio.run(ask()))


def ignore_of(context: str) -> Ignore | None:
    """What the context's .dockerignore leaves out; the daemon reads the same file by the same rules."""
    from tartarus.images.dockerfile.limits import MAX_IGNORE_BYTES
    from tartarus.images.dockerfile.patterns import Ignore as Rules

    try:
        with open(os.path.join(context, ".dockerignore"), "rb") as file:
            text = file.read(MAX_IGNORE_BYTES + 1).decode("utf-8", "surrogateescape")
    except (FileNotFoundError, NotADirectoryError):
        return None
    rules = Rules(text)
    return lambda path: path != ".dockerignore" and rules.ignores(path)
