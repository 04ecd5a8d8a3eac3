"""`tartarus bench`: the project's own measurements, which live in its source checkout."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import click

from tartarus.model.errors import InvalidRequest


@click.command()
@click.option("--all", "everything", is_flag=True, help="Run every bench (also what happens when none is named).")
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Write the figures here.")
@click.argument("names", nargs=-1)
def bench(everything: bool, json_file: Path | None, names: tuple[str, ...]) -> None:
    """Measure Tartarus on this host beside every other sandbox that is installed.

    Needs the source checkout as the current directory: the benches are not part of the installed package.
    """
    sys.path.insert(0, str(Path.cwd()))
    if importlib.util.find_spec("benchmarks") is None:
        raise InvalidRequest("the benches are not here", fix="run this in a checkout of the source, or type make bench")
    from benchmarks.__main__ import run

    run([] if everything else list(names), json_file)
