"""What Tab offers: live sandboxes and templates. It never starts a daemon and never complains."""

from __future__ import annotations

import click
from click.shell_completion import CompletionItem

from tartarus.model.errors import TartarusError


def sandboxes(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Ids and names of live sandboxes."""
    from tartarus.sdk import Client, Sandbox

    try:
        found = Sandbox.list(client=Client(start=False))
    except TartarusError:
        return []
    items = []
    for sandbox in found:
        info = sandbox.info
        words = [word for word in (info.name, info.id) if word.startswith(incomplete)]
        items += [CompletionItem(word, help=f"{info.template} {info.state.value}") for word in words if word]
    return items


def templates(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Ids of templates."""
    from tartarus.sdk import Client

    try:
        found = Client(start=False).templates()
    except TartarusError:
        return []
    return [CompletionItem(item.id, help=item.description) for item in found if item.id.startswith(incomplete)]
