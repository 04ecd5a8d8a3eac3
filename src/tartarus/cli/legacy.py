"""`legacy`: run through another engine, and look after what runs there. The engine holds it, not we."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import click

from tartarus.cli import output
from tartarus.cli.show import print_json, print_table

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from tartarus.compat.engines import LegacyRuntime

_ENGINE = (
    click.option("--engine", type=click.Choice(["docker", "podman", "containerd"]), default="docker",
                 show_default=True, help="Which engine of this host."),
    click.option("--socket", default="", metavar="PATH", help="The engine's socket."),
    click.option("--namespace", default="", metavar="NAME", help="containerd's namespace.  [default: default]"),
)  # fmt: skip
_ONE = click.argument("container", metavar="CONTAINER")
_WORDS = click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="COMMAND...")
_MAX_OUTPUT = 64 * 1024**2
_STOP_AT_COMMAND = {"allow_interspersed_args": False}


def _of_engine(command: Any) -> Any:
    for option in reversed(_ENGINE):
        command = option(command)
    return command


def _opened(where: dict[str, Any]) -> AbstractContextManager[LegacyRuntime]:
    from tartarus.compat.opening import opened

    return opened(where["engine"], where["socket"], where["namespace"])


def _command(words: tuple[str, ...]) -> tuple[str, ...]:
    """The command without the -- that sets it off: behind another argument it comes through."""
    return words[1:] if words[:1] == ("--",) else words


@click.group()
def legacy() -> None:
    """Run through Docker or Podman, where you must stay on it for now.

    What runs there is isolated by that engine alone: none of Tartarus's walls stand around it.
    """


@legacy.command("run", context_settings=_STOP_AT_COMMAND)
@click.argument("image", metavar="IMAGE")
@_WORDS
@click.option("--memory", metavar="SIZE", default="512MiB", show_default=True, help="Memory limit.")
@click.option("--cpus", metavar="N", default="1", show_default=True, help="CPU limit.")
@click.option("--pids", type=click.IntRange(min=4), metavar="N", default=512, show_default=True,
              help="Limit of processes and threads.")  # fmt: skip
@click.option("--timeout", metavar="DURATION", default="", help="End it after this long (exit status 124).")
@click.option("-e", "--env", multiple=True, metavar="NAME[=VALUE]", help="Set a variable. May be repeated.")
@click.option("-w", "--workdir", default="", metavar="PATH", help="Directory the command starts in.")
@click.option("-u", "--user", default="", metavar="USER", help="Who it runs as.")
@click.option("--name", default="", metavar="NAME", help="A name to find it by.")
@click.option("-d", "--detach", is_flag=True, help="Print its name and leave it running.")
@click.option("-q", "--quiet", is_flag=True, help="Don't say who holds it.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with the record instead of the output.")
@_of_engine
def run(image: str, words: tuple[str, ...], *, as_json: bool, quiet: bool, detach: bool, **given: Any) -> int:
    """Run a command in a container of another engine, from an image that the engine has.

    Without network, mounts, capabilities or new privileges, and with limits; removed at its end.
    """
    from tartarus.compat.running import request_for, start
    from tartarus.compat.running import run as run_to_end
    from tartarus.model.units import parse_cpus, parse_duration, parse_size
    from tartarus.sdk.shorthand import environment

    request = request_for(
        image, _command(words), name=given["name"], env=environment(given["env"], os.environ), workdir=given["workdir"],
        user=given["user"], memory_bytes=parse_size(given["memory"]), cpu_milli=parse_cpus(given["cpus"]),
        pids=given["pids"],
    )  # fmt: skip
    timeout_s = parse_duration(given["timeout"]) if given["timeout"] else None
    written: dict[int, bytearray] = {1: bytearray(), 2: bytearray()}

    def show(number: int, piece: bytes) -> None:
        if as_json:
            written[number] += piece[: _MAX_OUTPUT - len(written[number])]
        else:
            output.write(number, piece)

    with _opened(given) as runtime:
        if not quiet and not as_json:
            output.say(f"tartarus: held by {runtime.facts().isolation}, not by Tartarus")
        record = start(runtime, request) if detach else run_to_end(runtime, request, show, timeout_s=timeout_s)
    if as_json:
        shown = {name: bytes(content).decode("utf-8", "replace") for name, content in zip(
            ("stdout", "stderr"), written.values(), strict=True
        )}  # fmt: skip
        print_json({"record": record, **({} if detach else shown)})
    elif detach:
        click.echo(record.container)
    return record.exit_code or 0


@legacy.command("ps")
@click.option("-a", "--all", "everything", is_flag=True, help="Those that do not run, too.")
@click.option("--json", "as_json", is_flag=True, help="A JSON list.")
@_of_engine
def ps(*, everything: bool, as_json: bool, **where: Any) -> None:
    """List an engine's containers: what might be migrated."""
    with _opened(where) as runtime:
        found = runtime.containers(everything=everything)
    if as_json:
        print_json(found)
        return
    rows = [[entry.name, entry.image, entry.status, entry.command[:40], entry.isolation] for entry in found]
    print_table(["CONTAINER", "IMAGE", "STATUS", "COMMAND", "HELD BY"], rows)


@legacy.command("inspect")
@_ONE
@_of_engine
def inspect(container: str, **where: Any) -> None:
    """Show how a container is set up, as JSON: what a migration goes by, secrets and all."""
    import msgspec

    with _opened(where) as runtime:
        found = msgspec.to_builtins(runtime.export_state(container))
        held_by = runtime.facts().isolation
    print_json({**found, "isolation": "engine", "held_by": held_by})


@legacy.command("exec", context_settings=_STOP_AT_COMMAND)
@_ONE
@_WORDS
@click.option("--timeout", metavar="DURATION", default="10m", show_default=True, help="How long to wait for it.")
@_of_engine
def execute(container: str, words: tuple[str, ...], timeout: str, **where: Any) -> int:
    """Run one more command in a container; its output is shown at its end, 64 MiB of it."""
    from tartarus.model.errors import InvalidRequest
    from tartarus.model.units import parse_duration

    words = _command(words)
    if not words:
        raise InvalidRequest("no command given", fix=f"put one after --: tartarus legacy exec {container} -- ls")
    with _opened(where) as runtime:
        ended = runtime.execute(container, words, timeout_s=parse_duration(timeout), most_bytes=_MAX_OUTPUT)
    output.write(1, ended.stdout)
    output.write(2, ended.stderr)
    return ended.exit_code


@legacy.command("logs")
@_ONE
@click.option("-f", "--follow", is_flag=True, help="Also what still comes, until it ends.")
@_of_engine
def logs(container: str, *, follow: bool, **where: Any) -> None:
    """Show what a container wrote: its stdout to stdout, its stderr to stderr."""
    with _opened(where) as runtime:
        for number, piece in runtime.logs(container, follow=follow):
            output.write(number, piece)


@legacy.command("stats")
@_ONE
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@_of_engine
def stats(container: str, *, as_json: bool, **where: Any) -> None:
    """Show what a container uses now."""
    from tartarus.model.units import format_size

    with _opened(where) as runtime:
        used = runtime.usage(container)
    if as_json:
        print_json(used)
    else:
        row = [container, f"{used.cpu_ms / 1000:.2f}s", format_size(used.memory_bytes), str(used.pids)]
        print_table(["CONTAINER", "CPU TIME", "MEMORY", "PIDS"], [row])


@legacy.command("stop")
@_ONE
@click.option("--grace", type=click.IntRange(0, 3600), default=10, show_default=True, metavar="SECONDS",
              help="How long it may take to end by itself.")  # fmt: skip
@_of_engine
def stop(container: str, grace: int, **where: Any) -> None:
    """Stop a container: SIGTERM, and SIGKILL after a while."""
    with _opened(where) as runtime:
        runtime.stop(container, grace_s=grace)


@legacy.command("rm")
@_ONE
@_of_engine
def rm(container: str, **where: Any) -> None:
    """Remove a container that `legacy run` made; others are left to their engine's own command."""
    with _opened(where) as runtime:
        runtime.remove(container)
