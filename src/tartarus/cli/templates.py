"""`template`: what sandboxes are made from."""

from __future__ import annotations

import os
from typing import Any

import click

from tartarus.cli import output
from tartarus.cli.complete import templates
from tartarus.cli.each import for_each
from tartarus.cli.making import JSON, REPLACE, build_options, ignore_of, login, logins_of, make
from tartarus.cli.show import print_json, print_table
from tartarus.model.errors import InvalidRequest
from tartarus.model.library import TemplateInfo
from tartarus.model.units import format_size

_NAME = click.option("--name", default="", metavar="NAME", help="What sandboxes ask for it by.")
_ONE = click.argument("name", metavar="TEMPLATE", shell_complete=templates)
_SEVERAL = click.argument("names", nargs=-1, required=True, metavar="TEMPLATE...", shell_complete=templates)
_LEVELS = ("unknown", "none", "low", "medium", "high", "critical")


@click.group()
def template() -> None:
    """Make and manage what sandboxes are made from."""


@template.command("list")
@click.option("--json", "as_json", is_flag=True, help="A JSON list.")
def list_templates(*, as_json: bool) -> None:
    """List templates: built-in ones and yours."""
    from tartarus.sdk import Client

    found = Client().templates()
    if as_json:
        print_json(found)
    else:
        head = ["TEMPLATE", "BASE", "STATUS", "SIZE", "MEMORY", "CPUS", "WARM", "DESCRIPTION"]
        print_table(head, [_row(info) for info in found])


def _row(info: TemplateInfo) -> list[str]:
    return [
        info.name, info.base or "-", info.status.value, format_size(info.size_bytes) if info.size_bytes else "-",
        format_size(info.resources.memory_bytes), f"{info.resources.cpu_milli / 1000:g}",
        "yes" if info.warm_up else "no", info.description or info.title or "-",
    ]  # fmt: skip


@template.command("inspect")
@_SEVERAL
def inspect(names: tuple[str, ...]) -> int:
    """Show all that is known of templates, as a JSON list."""
    from tartarus.sdk import Template

    found = []
    status = for_each(names, lambda name: found.append(Template.get(name).info))
    print_json(found)
    return status


@template.command("pull")
@click.argument("reference", metavar="IMAGE")
@_NAME
@REPLACE
@JSON
def pull(reference: str, name: str, *, replace: bool, as_json: bool) -> int:
    """Make a template from a registry's image: tartarus template pull python:3.11.

    Logins are Docker's own (docker login): they are used for this pull and not kept.
    """
    from tartarus.model.definition import Definition
    from tartarus.model.library import ImageSource
    from tartarus.sdk.plans import Plan, default_name

    source = ImageSource(reference, login(reference))
    made = Plan(name or default_name(reference), Definition(), source, replace=replace)
    return make(made, what=reference, as_json=as_json)


@template.command("import")
@click.argument("path")
@_NAME
@click.option("--reference", default="", metavar="IMAGE", help="Which image of an archive that holds several.")
@REPLACE
@JSON
def import_(path: str, name: str, reference: str, *, replace: bool, as_json: bool) -> int:
    """Make a template from a root file system, an OCI layout, or what docker save wrote: a directory or a tar.

    With - it comes on standard input: docker save app | tartarus template import - --name app.
    """
    from tartarus.sdk.plans import load_plan

    made = load_plan(path, name=name, reference=reference, replace=replace)
    return make(made, what=path, as_json=as_json)


@template.command("build")
@click.argument("context", default="")
@click.option("-f", "--file", "file", default="", metavar="FILE", help="The Dockerfile, or a template's YAML.")
@_NAME
@build_options
@REPLACE
@JSON
def build(
    context: str, file: str, name: str, build_args: tuple[str, ...], target: str, network: str | None, *,
    ca_bundle: bool, no_cache: bool, replace: bool, as_json: bool,
) -> int:  # fmt: skip
    """Build a template from a Dockerfile or a template's YAML; CONTEXT is the directory that COPY takes files from.

    It is . if not given, and with a YAML file that file's own directory.

    Or the name of a definition that comes with Tartarus: base, code-interpreter-v1, julia-sci, node, python-ds,
    pytorch-ml, r-analytics. Every RUN is a sandbox of its own, without network unless it is given.
    """
    from tartarus.model.shipped import NAMES, place_of
    from tartarus.sdk.plans import build_plan, build_source, is_yaml, plan
    from tartarus.sdk.shorthand import environment

    if not context:
        context = (os.path.dirname(file) if is_yaml(file) else "") or "."
    if not os.path.isdir(context):
        shipped = place_of(context)
        if shipped is None:
            raise InvalidRequest(
                f"{context} is no directory",
                fix=f"give the build's context, and the Dockerfile with -f; or one of {', '.join(NAMES)}",
            )
        context, file = str(shipped), file or str(shipped / "template.yaml")
    settings = build_source(environment(build_args, os.environ, "build argument"), target, no_cache=no_cache)
    if is_yaml(file):
        path = file if file.startswith((".", "/")) else f"./{file}"
        made = plan(
            path, name=name, context=context, build=settings, ignore=ignore_of(context), network=network or "",
            ca_bundle=ca_bundle, replace=replace,
        )  # fmt: skip
    else:
        made = build_plan(
            file or os.path.join(context, "Dockerfile"), name=name, context=context, build=settings,
            ignore=ignore_of(context), network=network or "", ca_bundle=ca_bundle, replace=replace,
        )  # fmt: skip
    return make(logins_of(made), what=file or os.path.join(context, "Dockerfile"), as_json=as_json)


@template.command("rm")
@_SEVERAL
def rm(names: tuple[str, ...]) -> int:
    """Remove templates of yours; sandboxes that live go on."""
    from tartarus.sdk import Template

    def act(name: str) -> None:
        Template.remove(name)
        click.echo(f"Template {name} removed")

    return for_each(names, act)


@template.command("warm")
@_SEVERAL
def warm(names: tuple[str, ...]) -> int:
    """Make the warm snapshots of templates anew; the old ones serve until then."""
    from tartarus.cli.steps import Steps
    from tartarus.sdk import Template

    def act(name: str) -> None:
        with Steps(quiet=True) as steps:
            info = Template.get(name).warm(on_progress=steps)
        took = f" (in {info.warm_ms:.0f} ms)" if info.warm_ms is not None else ""
        click.echo(f"Template {info.name} warmed{took}")

    return for_each(names, act)


@template.command("scan")
@_ONE
@click.option("--format", "form", type=click.Choice(["table", "json", "cyclonedx"]), default="table", show_default=True,
              help="cyclonedx: the packages alone, as an SBOM.")  # fmt: skip
@click.option("--database", default="", metavar="ZIP", help="A zip of OSV's records; the daemon's own if not given.")
@click.option("--tool", type=click.Choice(["trivy", "grype"]), help="Ask this scanner, where the daemon runs, instead.")
@click.option("--online", is_flag=True, help="Ask OSV's service, which learns the packages' names.")
@click.option("--fail-on", type=click.Choice(_LEVELS), help="Exit with 1 for a finding of that severity or worse.")
def scan(name: str, form: str, database: str, *, tool: str | None, online: bool, fail_on: str | None) -> int:
    """Look up a template's packages among known vulnerabilities. Exit status 1 when the host's policy blocks it."""
    from tartarus.sdk import Template

    found = Template.get(name)
    if form == "cyclonedx":
        print_json(found.sbom())
        return 0
    result = found.scan(database=database, online=online, tool=tool or "")
    findings = result["report"]["findings"]
    verdict = result["verdict"]
    if form == "json":
        print_json(result)
    else:
        _print_findings(result)
    worst = max((_LEVELS.index(finding["severity"]) for finding in findings), default=-1)
    failed = verdict["blocked"] or (fail_on is not None and worst >= _LEVELS.index(fail_on))
    return 1 if failed else 0


def _print_findings(result: dict[str, Any]) -> None:
    report, verdict = result["report"], result["verdict"]
    rows = [
        [finding["id"], finding["severity"], finding["package"], finding["version"],
         ", ".join(finding["fixed_in"]) or "-", finding["summary"][:80] or "-"]
        for finding in report["findings"]
    ]  # fmt: skip
    if rows:
        print_table(["ID", "SEVERITY", "PACKAGE", "VERSION", "FIXED IN", "SUMMARY"], rows)
    date = f", newest advisory {report['database_date']}" if report["database_date"] else ""
    counts = ", ".join(f"{count} {level}" for level, count in result["counts"].items() if count) or "nothing"
    lines = [f"{report['checked']} of {report['packages']} packages checked with {report['source']}{date}: {counts}"]
    lines += [f"not checked: {gap}" for gap in report["gaps"]]
    lines += [f"blocked: {reason}" for reason in verdict["reasons"]] if verdict["blocked"] else []
    lines += [f"note: {note}" for note in verdict["notes"]]
    output.write(1, "".join(f"{output.one_line(line)}\n" for line in lines).encode())


@template.command("push")
@_ONE
@click.argument("reference", metavar="IMAGE")
@JSON
def push(name: str, reference: str, *, as_json: bool) -> None:
    """Push a template of yours to a registry as an image."""
    from tartarus.cli.steps import Steps
    from tartarus.sdk import Template

    with Steps(quiet=as_json) as steps:
        pushed = Template.get(name).push(reference, credentials=login(reference), on_progress=steps)
    if as_json:
        print_json(pushed)
    else:
        click.echo(output.one_line(f"Template '{name}' pushed to {pushed.reference} ({pushed.digest})"))
