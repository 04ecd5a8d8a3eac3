"""Write the pages of docs/ that repeat what the code says: errors.md, cli.md, capabilities.md, template.schema.json.

`make docs` runs it; a test fails when a committed page is not what it would write.

    python3 scripts/generate_docs.py          write them
    python3 scripts/generate_docs.py --check  exit with 1 when one is out of date
"""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import tartarus
from tartarus.model.errors import registry

if TYPE_CHECKING:
    import click

    from tartarus.runtimes.base import Capabilities

DOCS = Path(__file__).resolve().parent.parent / "docs"
_NOTICE = "<!-- Written by scripts/generate_docs.py; change the code that it reads instead. -->\n"

_ERRORS_HEAD = """\
# Errors

Every error has a stable code, what happened, often why, and what to do. The command line prints them in one line and
exits with the status below; the API answers with the HTTP status and a problem document that carries the code; the SDK
raises the class.

A sandboxed command's own exit status is passed through, so 124 to 127 may also be the command's. `tartarus run --json`
tells the two apart.

| exit status | meaning |
|---|---|
| 124 | the time limit passed |
| 125 | Tartarus failed or refused |
| 126 | the command was found but can't be executed |
| 127 | the command does not exist in the sandbox |
| 128 + n | the command was ended by signal n |

| code | meaning | class | exit | HTTP | worth retrying |
|---|---|---|---|---|---|
"""


def errors_page() -> str:
    """The registry as a table."""
    # An error is in the registry once its module is imported: all are, but programs and what others load by path.
    for module in pkgutil.walk_packages(tartarus.__path__, "tartarus."):
        if (
            not module.name.endswith((".runner", ".wasm_runner", ".wasm_engine", ".__main__"))
            and ".migrations" not in module.name
        ):
            importlib.import_module(module.name)

    rows = []
    for code, error in sorted(registry().items()):
        meaning = " ".join((inspect.getdoc(error) or "").split("\n\n", maxsplit=1)[0].split())
        retry = "yes" if error.retryable else "no"
        rows.append(
            f"| `{code}` | {meaning} | `{error.__name__}` | {error.exit_status} | {error.http_status} | {retry} |"
        )
    return _NOTICE + _ERRORS_HEAD + "\n".join(rows) + "\n"


_CLI_HEAD = """\
# Command line

`tartarus COMMAND --help` says the same. Human output goes to the terminal; `--json` is for programs. Exit statuses are
in [Errors](errors.md).
"""


def cli_page() -> str:
    """Every command's own help."""
    import click

    from tartarus.cli.app import app

    top = click.Context(app, info_name="tartarus", terminal_width=100, **app.context_settings)
    sections = (f"\n## {at.command_path}\n\n```text\n{at.command.get_help(at)}\n```\n" for at in _commands(top))
    return _NOTICE + _CLI_HEAD + "".join(sections)


def _commands(context: click.Context) -> Iterator[click.Context]:
    """A context for each command, parents first."""
    import click

    yield context
    if isinstance(context.command, click.Group):
        for name in context.command.list_commands(context):
            below = context.command.get_command(context, name)
            if below is not None and not below.hidden:
                yield from _commands(click.Context(below, parent=context, info_name=name))


def template_schema() -> str:
    """What a template's YAML may say, as JSON Schema 2020-12, made from the struct that reads it."""
    import msgspec

    from tartarus.model.definition import Definition

    head = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A Tartarus template",
        "$comment": "Written by scripts/generate_docs.py from tartarus.model.definition.",
    }
    return json.dumps({**head, **msgspec.json.schema(Definition)}, indent=2) + "\n"


_CAPABILITIES_HEAD = """\
# What each level can do

On a host that lacks nothing; `tartarus doctor` says what yours lacks. What a level can't do is refused with the error
`unsupported`, which says what to use instead. [Isolation levels](isolation-levels.md) tells what each of them is.

"""


def capabilities_page() -> str:
    """What the runtimes say of themselves, as a table."""
    from tartarus.node.levels import KINDS

    rows: dict[str, Callable[[Capabilities], object]] = {
        "its commands are": lambda can: can.runs,
        "code contexts": lambda can: can.contexts,
        "terminals": lambda can: can.terminals,
        "starts from a warm snapshot": lambda can: can.warm_start,
        "pause and resume": lambda can: can.pause,
        "snapshots of files": lambda can: can.keeps_files,
        "snapshots with memory, fork of live memory, hibernation": lambda can: can.saves_memory,
        "mounts of host directories": lambda can: can.mounts,
        "a network stack of its own": lambda can: can.own_network,
        "process ids of its own": lambda can: can.own_pids,
        "memory limit": lambda can: can.memory_limit,
        "CPU limit": lambda can: can.cpu_limit,
        "process limit": lambda can: can.pids_limit,
        "disk limit": lambda can: can.disk_limit,
    }
    lines = [f"| | {' | '.join(kind.isolation.value for kind in KINDS)} |", "|---" * (len(KINDS) + 1) + "|"]
    for what, of in rows.items():
        said = [of(kind.best) for kind in KINDS]
        shown = ["yes" if value is True else "no" if value is False else str(value) for value in said]
        lines.append(f"| {what} | {' | '.join(shown)} |")
    return _NOTICE + _CAPABILITIES_HEAD + "\n".join(lines) + "\n"


PAGES = {
    "errors.md": errors_page, "cli.md": cli_page, "template.schema.json": template_schema,
    "capabilities.md": capabilities_page,
}  # fmt: skip


def stale() -> list[str]:
    """The committed pages that differ from what would be written."""
    return [name for name, make in PAGES.items() if not _same(DOCS / name, make())]


def _same(path: Path, text: str) -> bool:
    return path.exists() and path.read_text(encoding="utf-8") == text


def main() -> int:
    """Write or check; the exit status."""
    if "--check" in sys.argv[1:]:
        for name in stale():
            print(f"docs/{name} is out of date: run scripts/generate_docs.py")
        return 1 if stale() else 0
    for name, make in PAGES.items():
        text = make()
        if not _same(DOCS / name, text):
            (DOCS / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
