"""`completion`: the script that a shell reads to complete our commands, options, sandboxes and templates."""

from __future__ import annotations

import click
from click.shell_completion import ShellComplete, get_completion_class

from tartarus.model.errors import TartarusError


@click.command(
    epilog='bash: eval "$(tartarus completion bash)" in ~/.bashrc. zsh: the same in ~/.zshrc. '
    "fish: tartarus completion fish > ~/.config/fish/completions/tartarus.fish"
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script of a shell."""
    from tartarus.cli.app import app

    found = get_completion_class(shell)
    if found is None:
        raise TartarusError(f"this version of click has no completion for {shell}")
    # The class's own `source` would start a bash to look at its version.
    click.echo(ShellComplete.source(found(app, {}, "tartarus", "_TARTARUS_COMPLETE")))
