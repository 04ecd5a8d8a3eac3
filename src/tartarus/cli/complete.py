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


def snapshots(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names and ids of snapshots."""
    from tartarus.sdk import Client, Snapshot

    try:
        found = Snapshot.list(client=Client(start=False))
    except TartarusError:
        return []
    words = [(word, snapshot.info.template) for snapshot in found for word in (snapshot.info.name, snapshot.id)]
    return [CompletionItem(word, help=template) for word, template in words if word and word.startswith(incomplete)]


def modules(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Digests of modules."""
    from tartarus.sdk import Client, Module

    try:
        found = Module.list(client=Client(start=False))
    except TartarusError:
        return []
    return [CompletionItem(kept.digest, help=kept.info.kind) for kept in found if kept.digest.startswith(incomplete)]


def templates(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of templates."""
    from tartarus.sdk import Client

    try:
        found = Client(start=False).templates()
    except TartarusError:
        return []
    return [CompletionItem(item.name, help=item.description) for item in found if item.name.startswith(incomplete)]
