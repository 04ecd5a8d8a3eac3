"""`run` and `exec` as click commands, made from the same option data that the short way reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import click

from tartarus.cli.complete import sandboxes, snapshots, templates
from tartarus.cli.options import EXEC, FLAG, LIST, NUMBER, RUN, Option

_STOP_AT_COMMAND = {"allow_interspersed_args": False}
_COMPLETE = {"template": templates, "snapshot": snapshots}


def parameter(option: Option) -> click.Option:
    """The click option for one of ours."""
    settings: dict[str, Any] = {"help": option.help, "default": option.initial()}
    if option.kind == FLAG:
        settings["is_flag"] = True
    elif option.choices:
        settings["type"] = click.Choice(option.choices)
        settings["show_default"] = True
    else:
        settings |= {"type": int if option.kind == NUMBER else str, "metavar": option.metavar}
        settings["multiple"] = option.kind == LIST
        settings["show_default"] = option.default is not None
        settings["shell_complete"] = _COMPLETE.get(option.name)
    return click.Option([option.name, *option.flags], **settings)


def _command(
    name: str, own: Sequence[Option], arguments: list[click.Parameter], text: str
) -> Callable[[Callable[..., int]], click.Command]:
    def make(callback: Callable[..., int]) -> click.Command:
        return click.Command(
            name, callback=callback, params=[*arguments, *map(parameter, own)], help=text,
            context_settings=_STOP_AT_COMMAND,
        )  # fmt: skip

    return make


_WORDS = click.Argument(["words"], nargs=-1, type=click.UNPROCESSED, metavar="COMMAND...")


@_command(
    "run", RUN, [_WORDS],
    "Run a command in a fresh sandbox: tartarus run -- python3 -c 'print(42)'. The sandbox ends with the command, "
    "whose exit status is passed on. Standard input is forwarded when it is a pipe or a file; "
    "to keep it, add </dev/null.",
)  # fmt: skip
def run(words: tuple[str, ...], **values: object) -> int:
    """See the text above."""
    from tartarus.cli import launch

    return launch.run(values, words)


@_command(
    "exec", EXEC,
    [click.Argument(["sandbox"], required=False, shell_complete=sandboxes), _WORDS],
    "Run a command in a live sandbox, by id, name or id prefix: tartarus exec -it sbx-… -- sh.",
)  # fmt: skip
def execute(sandbox: str | None, words: tuple[str, ...], **values: object) -> int:
    """See the text above."""
    from tartarus.cli import launch

    return launch.execute(values, [*([] if sandbox is None else [sandbox]), *words])
