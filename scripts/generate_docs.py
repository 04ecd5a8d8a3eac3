"""Write the pages of docs/ that repeat what the code says: errors.md, cli.md and template.schema.json.

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
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import tartarus
from tartarus.model.errors import registry

if TYPE_CHECKING:
    import click

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
        if not module.name.endswith((".runner", ".__main__")) and ".migrations" not in module.name:
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


PAGES = {"errors.md": errors_page, "cli.md": cli_page, "template.schema.json": template_schema}


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
