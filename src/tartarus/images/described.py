"""From an image's configuration and its files to the template that its sandboxes are made by."""

from __future__ import annotations

import posixpath

import msgspec

from tartarus.images.accounts import find_user
from tartarus.images.oci import ImageConfig
from tartarus.images.paths import SYSTEM_PATH
from tartarus.images.stackview import StackView
from tartarus.model.definition import Definition
from tartarus.model.errors import ImageRefused
from tartarus.model.template import RunAs, Template, WarmUp

_PYTHONS = ("python3", "python")
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
        warm_up=python_warm_up(view, env["PATH"], definition.warmup_script),
        description=definition.description,
    )


def _user(name: str, view: StackView) -> RunAs:
    account = find_user(view, name or "0")
    return RunAs(uid=account.uid, gid=account.gid, groups=account.groups, name=account.name, home=account.home or "/")


def python_warm_up(view: StackView, path: str, script: str) -> WarmUp | None:
    """How the image's Python is warmed; None when it has none. Raises ImageRefused when a script needs one."""
    for program in _PYTHONS:
        found = view.which(program, path)
        if found is not None:
            names = {*_PYTHONS, found, posixpath.basename(found)}
            return WarmUp(interpreter=found, script=script, argv0=tuple(sorted(names)))
    if script:
        raise ImageRefused(
            "the template has a warm-up script, and its image no Python",
            why=f"no python3 in {path}",
            fix="install Python in the image, or drop warmup_script",
        )
    return None


def without_warm_up(template: Template) -> Template:
    """The same template, started cold."""
    return msgspec.structs.replace(template, warm_up=None)
