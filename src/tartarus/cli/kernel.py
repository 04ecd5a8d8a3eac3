"""`kernel`: what microVMs boot. Works on this host's files, as the daemon's user, whether the daemon runs or not."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tartarus.cli.each import for_each
from tartarus.cli.show import print_json, print_table
from tartarus.model.errors import PermissionRefused
from tartarus.model.settings import Settings

if TYPE_CHECKING:
    from tartarus.runtimes.microvm.kernel import Kernel

_JSON = click.option("--json", "as_json", is_flag=True, help="JSON.")


@click.group()
def kernel() -> None:
    """Install and choose the kernels of microVMs. Takes the rights of the daemon's user."""


@kernel.command("install")
@click.argument("file", default="", type=click.Path())
@click.option("--modules", default="", metavar="DIR", help="The modules of a bare kernel: /lib/modules/RELEASE.")
@_JSON
def install(file: str, modules: str, *, as_json: bool) -> None:
    """Install FILE: a Debian kernel package, a bzImage, a vmlinux. Without it, Debian's cloud kernel, fetched by apt.

    A new kernel is booted by machines that are made after the daemon's next start.
    """
    from tartarus.runtimes.microvm import kernel, kernelfetch

    with _as_owner() as root:
        if file:
            made = kernel.install(Path(file), root, Path(modules) if modules else None)
        else:
            with kernelfetch.fetched() as package:
                made = kernel.install(package, root)
        chosen = kernel.default(root).release
    if as_json:
        print_json(_shown(made, chosen))
    else:
        click.echo(f"Kernel {made.release} installed ({made.facts.kind.value}, {len(made.modules)} modules)")


@kernel.command("list")
@_JSON
def list_kernels(*, as_json: bool) -> None:
    """List installed kernels, the newest first; the one that machines boot is marked."""
    from tartarus.model.units import format_size
    from tartarus.runtimes.microvm import kernel

    with _as_owner() as root:
        found = kernel.installed(root)
        chosen = kernel.default(root).release if found else ""
        shown = [_shown(each, chosen) for each in found]
    if as_json:
        print_json(shown)
        return
    rows = [
        [f"{each['release']}{' *' if each['default'] else ''}", str(each["kind"]), str(each["modules"]),
         format_size(int(str(each["size_bytes"]))), str(each["digest"])[:12]]
        for each in shown
    ]  # fmt: skip
    print_table(["KERNEL", "KIND", "MODULES", "SIZE", "SHA256"], rows)


@kernel.command("remove")
@click.argument("releases", nargs=-1, required=True, metavar="KERNEL...")
def remove(releases: tuple[str, ...]) -> int:
    """Remove kernels; machines that booted one go on."""
    from tartarus.runtimes.microvm import kernel

    with _as_owner() as root:

        def act(release: str) -> None:
            kernel.remove(root, release)
            click.echo(f"Kernel {release} removed")

        return for_each(releases, act)


@kernel.command("default")
@click.argument("release", default="", metavar="KERNEL")
def default(release: str) -> None:
    """Show the kernel that machines boot, or choose another. Without a choice it is the newest."""
    from tartarus.runtimes.microvm import kernel

    with _as_owner() as root:
        click.echo(kernel.choose(root, release).release if release else kernel.default(root).release)


def _shown(kernel: Kernel, chosen: str) -> dict[str, object]:
    return {
        "release": kernel.release,
        "default": kernel.release == chosen,
        "kind": kernel.facts.kind.value,
        "digest": kernel.facts.digest,
        "size_bytes": kernel.image.stat().st_size,
        "modules": len(kernel.modules),
        "source": kernel.facts.source,
        "installed_at": kernel.facts.installed_at,
    }


@contextlib.contextmanager
def _as_owner() -> Iterator[Path]:
    """Where kernels lie. Raises PermissionRefused for whoever may not write, or read, there."""
    root = Settings.from_environment(os.environ, os.getuid()).kernels
    try:
        yield root
    except PermissionError as error:
        raise PermissionRefused(
            f"{root} is not yours", why=error.strerror or "", fix="run it as the daemon's user (sudo tartarus kernel …)"
        ) from error
