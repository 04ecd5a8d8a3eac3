"""The built-in templates, as data."""

from __future__ import annotations

import functools

from tartarus.images.interpreter import Interpreter, find_interpreter
from tartarus.images.paths import OWN_BIN, SYSTEM_PATH, VENV
from tartarus.model.sandbox import Resources
from tartarus.model.template import Template, WarmUp


def _host(interpreter: str, path: str) -> Template:
    return Template(
        id="host",
        name="Host base",
        env={"PATH": path},
        warm_up=WarmUp(interpreter=interpreter),
        description="This host's own programs, read-only, under a fresh root. Needs no download.",
    )


def _python_ds(path: str) -> Template:
    return Template(
        id="python-ds",
        name="Python Data Science",
        base="host",
        python_packages=("numpy", "pandas", "scipy", "matplotlib"),
        env={
            "PATH": f"{VENV}/bin:{path}",
            "VIRTUAL_ENV": VENV,
            # No display in a sandbox: the backend that draws into memory, without a search for others.
            "MPLBACKEND": "Agg",
        },
        resources=Resources(memory_bytes=4 * 1024**3, cpu_milli=2000),
        warm_up=WarmUp(
            interpreter=f"{VENV}/bin/python3",
            # pyplot, not matplotlib alone: it looks for fonts and styles once, here, instead of in every sandbox.
            imports=("numpy", "pandas", "scipy", "matplotlib.pyplot"),
        ),
        description="The host base with numpy, pandas, scipy and matplotlib, imported before the sandbox starts.",
    )


@functools.cache
def catalogue() -> dict[str, Template]:
    """Every template that can be asked for, by id. Looks for the host's Python the first time."""
    return templates_for(find_interpreter())


def templates_for(interpreter: Interpreter) -> dict[str, Template]:
    """The templates as they are with this Python."""
    # A Python from outside /usr is on nobody's PATH until ours leads to it.
    path = f"{OWN_BIN}:{SYSTEM_PATH}" if interpreter.bind else SYSTEM_PATH
    templates = (_host(interpreter.path, path), _python_ds(path))
    return {template.id: template for template in templates}
