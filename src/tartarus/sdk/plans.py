"""From what people say (``python:3.11``, ``./Dockerfile``, ``my.yaml``) to a request and what must be uploaded first.

Nothing is asked of the daemon here: the blocking and the async client do that, and come back with the answers.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import msgspec

from tartarus.model.definition import BuildNetwork, Definition
from tartarus.model.definition_yaml import MAX_FILE_BYTES, read_definition
from tartarus.model.errors import FileFailed, InvalidRequest, TemplateExists
from tartarus.model.library import (
    MAX_DOCKERFILE_BYTES,
    CreateTemplate,
    Credentials,
    DockerfileSource,
    ImageSource,
    TemplateBase,
    TemplateSource,
    UploadSource,
)
from tartarus.sdk.packing import Ignore, Parts, Payload
from tartarus.sdk.wholefile import read_whole

_YAML = (".yaml", ".yml")
_EMPTY = DockerfileSource(dockerfile="")


class Plan(NamedTuple):
    """A template to be made.

    `payload` is uploaded first. `ask` is a word that may be a template's name and else is an image's: the daemon knows.
    """

    name: str
    definition: Definition
    source: TemplateSource
    payload: Parts | None = None
    ask: str = ""
    network: BuildNetwork = BuildNetwork.NONE
    ca_bundle: bool = False
    replace: bool = False

    def request(self, upload: str = "", *, is_template: bool = False) -> CreateTemplate:
        """What to ask for, with the upload's id, and whether `ask` is a template."""
        source = self.source
        if is_template:
            source = TemplateBase(self.ask)
        elif isinstance(source, UploadSource):
            source = msgspec.structs.replace(source, upload=upload)
        elif isinstance(source, DockerfileSource):
            source = msgspec.structs.replace(source, context=upload)
        # One word for both: a caller who says `none` closes what a YAML would open.
        definition = msgspec.structs.replace(self.definition, network=self.network)
        return CreateTemplate(
            name=self.name, source=source, definition=definition, network=self.network,
            ca_bundle=self.ca_bundle, replace=self.replace,
        )  # fmt: skip


def plan(
    base: str,
    *,
    name: str = "",
    definition: Definition | None = None,
    context: str | None = None,
    build: DockerfileSource = _EMPTY,
    ignore: Ignore | None = None,
    network: str = "",
    ca_bundle: bool = False,
    credentials: Iterable[Credentials] = (),
    replace: bool = False,
) -> Plan:
    """Find out what `base` is.

    Paths begin with ``.`` or ``/``: a Dockerfile, a directory that has one, a template's YAML, or what `Template.load`
    takes. Everything else is ``host``, a template's name, or an image. `build` has a build's arguments and target.
    Raises InvalidRequest and FileFailed.
    """
    definition = definition or Definition()
    logins = tuple(credentials)
    if not _is_path(base):
        base = base or definition.base_image or "host"
        name = name or definition.id or default_name(base)
        made = Plan(name, definition, ImageSource(base, logins), None, "" if _is_image(base) else base)
    elif is_yaml(base):
        definition = read_file(base)
        beside = os.path.dirname(os.path.abspath(base))
        inner = definition.dockerfile or definition.base_image
        if definition.dockerfile:
            inner = _below(beside, inner, base)
            context = beside if context is None else context
        elif _is_path(inner):
            inner = _below(beside, inner, base)
        if is_yaml(inner):
            raise InvalidRequest(f"{base} stands on another YAML file", fix="build that first, and name its template")
        return plan(
            inner, name=name or definition.id, definition=definition, context=context, build=build, ignore=ignore,
            network=network, ca_bundle=ca_bundle, credentials=logins, replace=replace,
        )  # fmt: skip
    elif is_dockerfile(base) or definition.dockerfile or (os.path.isdir(base) and _has_dockerfile(base)):
        return build_plan(
            os.path.join(base, "Dockerfile") if os.path.isdir(base) else base, name=name, definition=definition,
            context=context, build=build, ignore=ignore, network=network, ca_bundle=ca_bundle, credentials=logins,
            replace=replace,
        )  # fmt: skip
    else:
        _check_readable(base)
        name = name or definition.id or default_name(os.path.basename(os.path.abspath(base)))
        made = Plan(name, definition, UploadSource(""), Payload(base, owners=True))
    wanted = _network(network) if network else definition.network
    return made._replace(network=wanted, ca_bundle=ca_bundle, replace=replace)


def load_plan(path: str, *, name: str = "", reference: str = "", replace: bool = False) -> Plan:
    """A root file system, an OCI layout or a saved image, at `path` or (``-``) on standard input."""
    if path == "-" and not name:
        raise InvalidRequest("what comes on standard input has no name", fix="give one, with --name")
    if path != "-":
        _check_readable(path)
    name = name or default_name(os.path.basename(os.path.abspath(path)))
    return Plan(name, Definition(), UploadSource("", reference), Payload(path, owners=True), replace=replace)


def build_plan(
    dockerfile: str,
    *,
    name: str = "",
    definition: Definition | None = None,
    context: str | None = None,
    build: DockerfileSource = _EMPTY,
    ignore: Ignore | None = None,
    network: str = "",
    ca_bundle: bool = False,
    credentials: Iterable[Credentials] = (),
    replace: bool = False,
) -> Plan:
    """A build of the file `dockerfile`, with the directory `context`: the file's own if None, none at all if empty."""
    definition = definition or Definition()
    text = read_whole(dockerfile, MAX_DOCKERFILE_BYTES).decode("utf-8", "replace")
    context = os.path.dirname(os.path.abspath(dockerfile)) if context is None else context
    if context and not os.path.isdir(context):
        raise FileFailed(f"can't read {context}", why="it is no directory", fix="give the build's context directory")
    name = name or definition.id
    if not name:
        raise InvalidRequest("the template has no name", fix="give one, with --name")
    source = msgspec.structs.replace(build, dockerfile=text, credentials=tuple(credentials))
    return Plan(
        name, definition, source, Payload(context, ignore=ignore) if context else None,
        network=_network(network) if network else definition.network, ca_bundle=ca_bundle, replace=replace,
    )  # fmt: skip


def read_file(path: str) -> Definition:
    """A template's YAML. Raises InvalidRequest and FileFailed."""
    return read_definition(read_whole(path, MAX_FILE_BYTES), path)


def default_name(reference: str) -> str:
    """A name for what was given none: ``python:3.11`` becomes ``python-3.11``."""
    last = reference.partition("@")[0].rstrip("/").rpartition("/")[2].removesuffix(":latest")
    for ending in (".gz", ".tgz", ".zst", ".tar"):
        last = last.removesuffix(ending)
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", last).strip("-_.")[:63]


def check_database(path: str) -> None:
    """Refuse what is no zip, before it is sent."""
    if not zipfile.is_zipfile(path):
        raise InvalidRequest(
            f"{path} is no zip of OSV's records",
            fix="give an ecosystem's all.zip; several belong in the daemon's own database (see docs/scanning.md)",
        )


def name_taken(name: str) -> TemplateExists:
    """The error for a name that a template has."""
    return TemplateExists(
        f"there is a template {name!r} already",
        fix=f"choose another name, give --replace, or remove it: tartarus template rm {name}",
    )


def is_dockerfile(path: str) -> bool:
    """Whether a path's name is a Dockerfile's: ``Dockerfile``, ``Dockerfile.dev`` or ``dev.Dockerfile``."""
    last = os.path.basename(path)
    return last.startswith("Dockerfile") or last.endswith(".Dockerfile")


def is_yaml(path: str) -> bool:
    """Whether a path's name is a YAML file's."""
    return path.endswith(_YAML)


def build_source(args: Mapping[str, str] | None, target: str, *, no_cache: bool) -> DockerfileSource:
    """A build's settings, without its Dockerfile."""
    return DockerfileSource(dockerfile="", args=dict(args or {}), target=target, no_cache=no_cache)


def _has_dockerfile(directory: str) -> bool:
    # A root file system may have one lying about; one that is an image by its layout is not built.
    return os.path.isfile(os.path.join(directory, "Dockerfile")) and not os.path.exists(
        os.path.join(directory, "oci-layout")
    )


def _below(directory: str, path: str, file: str) -> str:
    """A path that a YAML file names, below its own directory.

    Whoever builds somebody else's YAML must not find files of their own in a sandbox with somebody else's code.
    """
    found = os.path.join(directory, path)
    top = os.path.realpath(directory)
    if os.path.commonpath([top, os.path.realpath(found)]) != top:
        raise InvalidRequest(
            f"{file}: {path} is not below the file's own directory",
            fix="move it there, or give it on the command line: tartarus init template --from PATH",
        )
    return found


def _is_path(base: str) -> bool:
    return base.startswith((".", "/"))


def _is_image(base: str) -> bool:
    return any(mark in base for mark in ":/@")


def _network(text: str) -> BuildNetwork:
    try:
        return BuildNetwork(text)
    except ValueError:
        raise InvalidRequest(f"{text!r} is no network of a build", fix="use none or open") from None


def _check_readable(path: str) -> None:
    if not os.access(path, os.R_OK):
        missing = not os.path.exists(path)
        why = "No such file or directory" if missing else "Permission denied"
        raise FileFailed(f"can't read {path}", why=why, fix="an image's name does not begin with . or /")
