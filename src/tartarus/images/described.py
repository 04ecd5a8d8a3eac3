"""From an image's configuration and its files to the template that its sandboxes are made by."""

from __future__ import annotations

from typing import Literal

import msgspec

from tartarus.images.accounts import find_user
from tartarus.images.oci import ImageConfig
from tartarus.images.paths import SYSTEM_PATH
from tartarus.images.stackview import StackView
from tartarus.model.checks import check_stop
from tartarus.model.definition import Definition
from tartarus.model.errors import ImageRefused, InvalidRequest
from tartarus.model.template import RunAs, Template, WarmUp

_INTERPRETERS: dict[Literal["python", "node", "r"], tuple[str, ...]] = {
    "python": ("python3", "python"), "node": ("node", "nodejs"), "r": ("Rscript", "R"),
}  # fmt: skip
_WORKDIR = "/work"


def describe(name: str, config: ImageConfig, view: StackView, definition: Definition) -> Template:
    """The template of an image: what its definition says, and the image's own word where that is silent.

    `view` shows the image's files, for the user's numbers and the interpreter's path. Raises ImageRefused when
    the image lacks what the definition asks for.
    """
    env = {"PATH": SYSTEM_PATH, **config.env, **definition.env}
    return Template(
        id=name,
        name=definition.name or name,
        base="image",
        env=env,
        workdir=definition.workdir or config.workdir or _WORKDIR,
        user=_user(definition.user or config.user, view),
        resources=definition.resources.defaults,
        warm_up=warm_up_of(view, env["PATH"], definition.warmup_language, definition.warmup_script),
        description=definition.description,
        stop_signal=definition.stop_signal or _stop_signal(config.stop_signal),
        stop_grace_s=definition.stop_grace_s,
        security=definition.security,
    )


def _stop_signal(text: str) -> str:
    """The image's, if it is one: Docker, too, ends a container whose image names none as if it named TERM."""
    try:
        check_stop(text, None)
    except InvalidRequest:
        return ""
    return text


def _user(name: str, view: StackView) -> RunAs:
    account = find_user(view, name or "0")
    return RunAs(uid=account.uid, gid=account.gid, groups=account.groups, name=account.name, home=account.home or "/")


def warm_up_of(view: StackView, path: str, language: str, script: str) -> WarmUp | None:
    """How the image's interpreter is kept warm; None when it has none.

    `language`: python, node or r; the first of them there is, if empty. Raises ImageRefused when the one that is
    named, or any for a script, is not there.
    """
    for kind, programs in _INTERPRETERS.items():
        if language not in {"", kind}:
            continue
        found = {name: view.which(name, path) for name in programs}
        places = {name: place for name, place in found.items() if place is not None}
        if places:
            interpreter = next(iter(places.values()))
            real = view.resolve(interpreter)
            same = [name for name, place in places.items() if view.resolve(place) == real]
            return WarmUp(interpreter=interpreter, script=script, argv0=tuple(same), kind=kind)
    if script or language:
        raise ImageRefused(
            f"the template is to be kept warm, and its image has no {language or 'interpreter that can be'}",
            why=f"none in {path}",
            fix="install it in the image, or drop warmup_script and warmup_language",
        )
    return None


def without_warm_up(template: Template) -> Template:
    """The same template, started cold."""
    return msgspec.structs.replace(template, warm_up=None)
