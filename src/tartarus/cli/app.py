"""Everything but the short way: the click group, whose commands are imported when they are called."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING

import click

from tartarus import __version__
from tartarus.cli import output
from tartarus.model.errors import InvalidRequest, TartarusError

if TYPE_CHECKING:
    from collections.abc import Sequence

# In the order of the help page: name, module, and the line that the help page shows without importing it.
COMMANDS = {
    "run": ("launching", "Run a command in a fresh sandbox."),
    "ps": ("listing", "List sandboxes."),
    "logs": ("logs", "Show what a sandbox's command wrote."),
    "exec": ("launching", "Run a command in a live sandbox."),
    "kill": ("lifecycle", "End sandboxes, or signal their commands."),
    "stop": ("endings", "Ask sandboxes to end, and end those that don't."),
    "inspect": ("listing", "Show all that is known of sandboxes, as JSON."),
    "cp": ("copying", "Copy files into and out of a sandbox."),
    "top": ("usage", "Show what live sandboxes use."),
    "pause": ("lifecycle", "Freeze sandboxes."),
    "resume": ("lifecycle", "Let paused sandboxes go on, or start from checkpoints."),
    "checkpoints": ("endings", "List what resume can start sandboxes from."),
    "hibernate": ("lifecycle", "Write sandboxes' memory to disk and free everything else."),
    "wake": ("lifecycle", "Let hibernated sandboxes go on."),
    "swear": ("swearing", "Hold a live sandbox to another network contract."),
    "fork": ("forking", "Make live copies of a sandbox."),
    "init": ("init", "Create something of your own: a template."),
    "template": ("templates", "Make and manage what sandboxes are made from."),
    "snapshot": ("snapshots", "Keep sandboxes' files, or all of them as they run."),
    "module": ("modules", "Keep WebAssembly modules compiled."),
    "policy": ("policy", "Say what sandboxes of this host may ask for."),
    "audit": ("audit", "Look at the audit log, verify it, prove an entry."),
    "seccomp": ("seccomp", "Make and try profiles of system calls."),
    "secret": ("secret", "Keep secrets in a vault, and renew those of sandboxes."),
    "quarantine": ("quarantine", "Hold sandboxes that broke the rules, and see what they left."),
    "lamentations": ("lamentations", "Show what failed and why, and try again what never ran."),
    "kernel": ("kernel", "Install and choose the kernels of microVMs."),
    "migrate": ("migrate", "Turn containers of other engines into templates."),
    "legacy": ("legacy", "Run through another engine, which then holds what runs."),
    "up": ("daemon", "Start the daemon."),
    "drain": ("endings", "Take no new sandboxes, and end all there are."),
    "down": ("daemon", "Stop the daemon and its sandboxes."),
    "config": ("config", "Show and check the daemon's configuration."),
    "doctor": ("doctor", "Find out what this host can give."),
    "bench": ("bench", "Measure this host beside other sandboxes."),
    "completion": ("completion", "Print the completion script of a shell."),
    "version": ("daemon", "Show the versions of this client and of the daemon."),
}
NAMES_IN_MODULES = {"exec": "execute"}


class LazyGroup(click.Group):
    """Imports a command's module when the command is called or completed."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """Every command, in the help page's order."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - click's signature
        """Import and return a command."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"tartarus.cli.{COMMANDS[cmd_name][0]}")
        command: click.Command = getattr(module, NAMES_IN_MODULES.get(cmd_name, cmd_name))
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002 - click's signature
        """The list of commands, without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit status: the command's own; 128+n when signal n ended it; 124 time limit, 125 Tartarus failed or "
    "refused, 126 not executable, 127 not found.",
)
@click.version_option(__version__, message="tartarus %(version)s")
def app() -> None:
    """Run code that nobody vouches for, in sandboxes that start in milliseconds."""


def main(arguments: Sequence[str]) -> int:
    """Parse with click and run; returns the exit status."""
    if "_TARTARUS_COMPLETE" in os.environ:
        app.main(list(arguments), prog_name="tartarus")
    try:
        # Not app.main: it would write an empty line on Ctrl-C and make a closed pipe status 1.
        with app.make_context("tartarus", list(arguments)) as context:
            result = app.invoke(context)
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.exceptions.NoArgsIsHelpError as help_page:
        click.echo(help_page.format_message())
        return InvalidRequest.exit_status
    except click.ClickException as error:
        where = getattr(error, "ctx", None)
        command = where.command_path if where is not None else "tartarus"
        return output.report(InvalidRequest(error.format_message().rstrip("."), fix=f"see: {command} --help"))
    except TartarusError as error:
        return output.report(error)
    except (output.Closed, BrokenPipeError):
        return output.SIGPIPE_STATUS
    return result if isinstance(result, int) else 0
