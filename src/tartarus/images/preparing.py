"""From a template to the directories that a runtime stacks."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import msgspec

from tartarus.images import packages
from tartarus.images.entries import Entry, give, text, write_tree
from tartarus.images.interpreter import Interpreter, find_interpreter
from tartarus.images.paths import VENV, WARM_UP_SCRIPT
from tartarus.images.skeleton import skeleton
from tartarus.images.store import LayerStore
from tartarus.model.settings import Settings
from tartarus.model.template import Template

Progress = Callable[[str], None]

# Part of every digest: raise it when the same inputs are to give other directories.
_FORMAT = 1


class PreparedTemplate(msgspec.Struct, frozen=True):
    """A template that sandboxes can be made from.

    `layers`: overlay lower directories, top first. `binds`: (host path, path in the sandbox), shown
    read-only. `digest` names the content: the same digest is the same file system.
    """

    template: Template
    layers: tuple[Path, ...]
    binds: tuple[tuple[str, str], ...]
    digest: str


async def prepare(
    template: Template,
    settings: Settings,
    uid_base: int | None,
    progress: Progress,
    *,
    interpreter: Interpreter | None = None,
) -> PreparedTemplate:
    """Make the template's root file system unless it is there, and say where it is.

    `uid_base`: the host id that is the sandbox's root, when ids are mapped; the files become its own.
    `progress` is called with one line for each step that takes time. `interpreter`: the Python that the
    template was described with; the host's unless given. Raises TemplateFailed or NoSpace.
    """
    python = await asyncio.to_thread(find_interpreter) if interpreter is None else interpreter
    store = await asyncio.to_thread(LayerStore, settings.cache_dir / "templates")
    environment = await _environment(template, python, store, uid_base, progress)
    entries, binds = await asyncio.to_thread(skeleton, python)
    if template.warm_up is not None and template.warm_up.script:
        entries.append(text(WARM_UP_SCRIPT, template.warm_up.script))
    digest = _digest(entries, binds, environment[0] if environment else "", uid_base)
    name = f"rootfs-{digest}"

    async def build(tree: Path, lock: int) -> dict[str, object]:
        del lock
        progress(f"making the root file system of {template.id}")
        await _whole(_write_rootfs, tree, entries, environment[1] if environment else None, uid_base)
        return {"template": template.id, "interpreter": python.path, "environment": environment and environment[0]}

    layer = await store.get(name, build)
    return PreparedTemplate(template=template, layers=(layer,), binds=binds, digest=digest)


async def _environment(
    template: Template, interpreter: Interpreter, store: LayerStore, uid_base: int | None, progress: Progress
) -> tuple[str, Path] | None:
    """The name and place of the template's Python environment; None when it asks for no packages."""
    if not template.python_packages:
        return None
    name = f"python-{_digest(sorted(template.python_packages), interpreter, uid_base)}"

    async def build(tree: Path, lock: int) -> dict[str, object]:
        installed = await packages.install(tree, interpreter, template.python_packages, lock, progress)
        await _whole(_give_all, tree, uid_base)
        return {"packages": installed, "interpreter": interpreter.path, "version": interpreter.version}

    return name, await store.get(name, build)


async def _whole(function: Callable[..., None], *arguments: object) -> None:
    """Run a thread to its end even when it is cancelled: it must not go on writing what is being removed."""
    work = asyncio.ensure_future(asyncio.to_thread(function, *arguments))
    try:
        await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait([work])
        raise


def _digest(*inputs: object) -> str:
    return hashlib.sha256(msgspec.msgpack.encode((_FORMAT, *inputs))).hexdigest()[:24]


def _write_rootfs(tree: Path, entries: list[Entry], environment: Path | None, uid_base: int | None) -> None:
    write_tree(tree, entries, uid_base)
    if environment is not None:
        # Hard links: the packages are stored once, however often the rest is made anew.
        _link_tree(environment, tree / VENV.lstrip("/"), uid_base)


def _link_tree(source: Path, target: Path, uid_base: int | None) -> None:
    target.mkdir()
    os.chmod(target, 0o755)
    give(target, uid_base, 0)
    with os.scandir(source) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                _link_tree(Path(entry.path), target / entry.name, uid_base)
            else:
                os.link(entry.path, target / entry.name, follow_symlinks=False)


def _give_all(tree: Path, uid_base: int | None) -> None:
    for folder, _, names in os.walk(tree):
        for name in [".", *names]:
            give(Path(folder) / name, uid_base, 0)
