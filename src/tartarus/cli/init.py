"""`init`: the first things of one's own."""

from __future__ import annotations

import os

import click

from tartarus.cli.making import JSON, REPLACE, build_options, ignore_of, logins_of, make


@click.group()
def init() -> None:
    """Create something of your own: a template."""


@init.command("template")
@click.option("--name", default="", metavar="NAME", help="What sandboxes ask for it by.")
@click.option("--from", "base", required=True, metavar="SOURCE", help="What to make it from; see above.")
@build_options
@REPLACE
@JSON
def init_template(
    name: str, base: str, build_args: tuple[str, ...], target: str, network: str | None, *, ca_bundle: bool,
    no_cache: bool, replace: bool, as_json: bool,
) -> int:  # fmt: skip
    """Create a template: tartarus init template --name my-python --from python:3.11.

    SOURCE is an image, host, another template's name, or a path that begins with . or /: a Dockerfile or a directory
    with one, a template's YAML, a root file system, an OCI layout, or what docker save wrote.
    """
    from tartarus.sdk.plans import build_source, plan
    from tartarus.sdk.shorthand import environment

    directory = base if os.path.isdir(base) else os.path.dirname(base) or "."
    made = plan(
        base, name=name,
        build=build_source(environment(build_args, os.environ, "build argument"), target, no_cache=no_cache),
        ignore=ignore_of(directory), network=network or "", ca_bundle=ca_bundle, replace=replace,
    )  # fmt: skip
    return make(logins_of(made), what=base, as_json=as_json)
