"""`migrate`: a container of another engine becomes a template and a request, with a proof that it runs the same."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING, Any

import click

from tartarus.cli import output
from tartarus.cli.options import RUN
from tartarus.cli.show import print_json, print_table

if TYPE_CHECKING:
    from tartarus.compat.migration import Migration
    from tartarus.compat.plan import MigrationPlan, Wishes
    from tartarus.compat.proving import Proof

# A container's file system is a root of its own, which these can't give.
_WITHOUT_ROOT = {"process", "wasm"}
LEVELS = next(tuple(filter(lambda level: level not in _WITHOUT_ROOT, o.choices)) for o in RUN if o.name == "isolation")
_OPTIONS: tuple[Any, ...] = (
    click.argument("container", metavar="CONTAINER"),
    click.option("--name", default="", metavar="NAME", help="What to call the template.  [default: as the container]"),
    click.option("--isolation", type=click.Choice(LEVELS), default="auto", show_default=True,
                 help="The level that the request asks for, and at which it is proven."),
    click.option("--dry-run", is_flag=True, help="Print the plan and make nothing."),
    click.option("-o", "--output", "request_path", default="", metavar="FILE",
                 help="Where to save the request, as YAML if it ends so.  [default: NAME.request.json]"),
    click.option("--secrets", type=click.Choice(["none", "request", "template"]), default="none", show_default=True,
                 help="Where to keep variables that look like secrets."),
    click.option("--mounts", type=click.Choice(["keep", "copy", "drop"]), default="keep", show_default=True,
                 help="keep: the request mounts the same host directories; copy: the template has their files."),
    click.option("--drop-refused", is_flag=True, help="Go on without what no sandbox is given."),
    click.option("--pause", is_flag=True, help="Freeze a running container while its files are read."),
    click.option("--prove", metavar="COMMAND", default="",
                 help="What to run in both and compare. If not given: the container's own command if it has ended, "
                 "else a harmless check."),
    click.option("--no-prove", is_flag=True, help="Compare nothing."),
    click.option("--prove-timeout", default="60s", show_default=True, metavar="DURATION",
                 help="How long the compared command may run."),
    click.option("--memory", metavar="SIZE", help="Another memory limit."),
    click.option("--cpus", metavar="N", help="Another CPU limit."),
    click.option("--pids", type=int, metavar="N", help="Another limit of processes and threads."),
    click.option("--disk", metavar="SIZE", help="How much a sandbox may write."),
    click.option("--timeout", metavar="DURATION", help="A time limit for the request."),
    click.option("--replace", is_flag=True, help="Take the place of a template and a request of that name."),
    click.option("--socket", default="", metavar="PATH", help="The engine's socket."),
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object."),
)  # fmt: skip


def _options(command: Any) -> Any:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@click.group()
def migrate() -> None:
    """Leave another engine: make a template and a request from one of its containers, and prove them.

    Nothing in the engine is changed. Exit status 1 when the sandbox did something else than the container, or could
    not be made.
    """


@migrate.command("docker")
@_options
def docker(**given: Any) -> int:
    """Migrate a container of Docker's."""
    return _migrate("docker", **given)


@migrate.command("podman")
@_options
def podman(**given: Any) -> int:
    """Migrate a container of Podman's; its service is started if it does not run."""
    return _migrate("podman", **given)


@migrate.command("containerd")
@_options
@click.option("--namespace", default="", metavar="NAME", help="containerd's namespace.  [default: default]")
def containerd(**given: Any) -> int:
    """Migrate a container of containerd's, as root."""
    return _migrate("containerd", **given)


def _migrate(kind: str, *, container: str, socket: str, namespace: str = "", **given: Any) -> int:
    from tartarus.cli.steps import Steps
    from tartarus.compat.engines import check_container
    from tartarus.compat.migration import Orders, migrate, plan_migration
    from tartarus.compat.opening import opened
    from tartarus.model.units import parse_duration

    check_container(container)
    as_json = given["as_json"]
    prove = tuple(_words(given["prove"]))
    patience_s = parse_duration(given["prove_timeout"])
    with opened(kind, socket, namespace) as runtime:
        state, plan = plan_migration(runtime, container, _wishes(given))
        if given["dry_run"]:
            _print_plan(plan, as_json=as_json)
            return 0
        if not as_json:
            _print_plan(plan, as_json=False)
        orders = Orders(
            request_path=given["request_path"] or f"{plan.definition.id}.request.json", replace=given["replace"],
            pause=given["pause"], proves=not given["no_prove"], prove=prove, prove_timeout_s=patience_s,
        )  # fmt: skip
        with Steps(quiet=as_json) as steps:
            made = migrate(runtime, state, plan, orders, on_progress=steps)
    return _report(made, as_json=as_json)


def _words(command: str) -> list[str]:
    from tartarus.model.errors import InvalidRequest

    try:
        return shlex.split(command)
    except ValueError as error:
        raise InvalidRequest("--prove is not a command", why=str(error), fix="close its quotation") from None


def _wishes(given: dict[str, Any]) -> Wishes:
    from tartarus.compat.plan import Mounts, Secrets, Wishes
    from tartarus.model.sandbox import Isolation
    from tartarus.model.units import parse_cpus, parse_duration, parse_size

    return Wishes(
        name=given["name"], isolation=Isolation(given["isolation"]), secrets=Secrets(given["secrets"]),
        mounts=Mounts(given["mounts"]), drop_refused=given["drop_refused"],
        memory_bytes=parse_size(given["memory"]) if given["memory"] else None,
        cpu_milli=parse_cpus(given["cpus"]) if given["cpus"] else None,
        pids=given["pids"],
        disk_bytes=parse_size(given["disk"]) if given["disk"] else None,
        timeout_s=parse_duration(given["timeout"]) if given["timeout"] else None,
    )  # fmt: skip


def _print_plan(plan: MigrationPlan, *, as_json: bool) -> None:
    from tartarus.compat.plan import summary
    from tartarus.compat.request_file import encode

    if as_json:
        print_json(summary(plan))
        return
    _say(f"Container '{plan.container}' of {plan.engine} (image {plan.image or '-'}, {plan.status or '-'})")
    print_table(
        ["", "SETTING", "WHAT BECOMES OF IT"],
        [[finding.effect.value, finding.what, finding.detail] for finding in plan.findings],
    )
    _say("Request:")
    shown = encode(plan.request)
    for value in plan.request.env.values():
        shown = shown.replace(_quoted(value), b'"..."')
    output.write(1, _harmless(shown.decode()).encode())


def _harmless(document: str) -> str:
    """JSON without what terminals obey: all of it may stand as an escape there."""
    return "".join(
        letter if letter.isprintable() or letter == "\n" else json.dumps(letter)[1:-1] for letter in document
    )


def _quoted(value: str) -> bytes:
    import msgspec

    return msgspec.json.encode(value)


def _report(made: Migration, *, as_json: bool) -> int:
    from tartarus.compat.plan import summary
    from tartarus.compat.proving import Verdict

    proof = made.proof
    if as_json:
        document = {
            "plan": summary(made.plan), "template": made.template, "request_path": made.request_path, "proof": proof,
        }  # fmt: skip
        print_json(document)
    else:
        _say(f"Template '{made.template.name}' ready (ID: {made.template.id})")
        saved = made.request_path
        _say(f"Request saved in {saved}; run it with: tartarus run --request {shlex.quote(saved)}")
        if proof is not None:
            _print_proof(proof)
    return 1 if proof is not None and proof.verdict in {Verdict.DIFFERS, Verdict.FAILED} else 0


def _print_proof(proof: Proof) -> None:
    from tartarus.compat.proving import Verdict

    command = shlex.join(proof.command)
    if proof.verdict is Verdict.SAME:
        _say(
            f"Proven at level {proof.isolation}: {command} ended with {proof.exit_code} in both, "
            f"with the same {proof.output_bytes} bytes of output"
        )
    elif proof.verdict is Verdict.FAILED:
        where = f" at level {proof.isolation}, no sandbox could be made" if proof.isolation else ""
        _say(f"Not proven{where}: {proof.why}")
    elif proof.verdict is Verdict.UNPROVEN:
        _say(f"Not proven: {proof.why}")
    else:
        _say(f"Not the same at level {proof.isolation}: {command}")
        for difference in proof.differences:
            _say(f"  {difference}")
        if proof.why:
            _say(f"  {proof.why}")


def _say(text: str) -> None:
    # The indentation of a list is kept, control characters of foreign text are not.
    indent = len(text) - len(text.lstrip(" "))
    output.write(1, (" " * indent + output.one_line(text)).encode("utf-8", "backslashreplace") + b"\n")
