"""Small decisions and words about sandboxes that are being started, and what they are called."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import structlog

from tartarus.model.errors import GuestFailed, TartarusError
from tartarus.model.sandbox import SandboxRecord, SandboxSpec
from tartarus.model.template import Template
from tartarus.runtimes.nursery import exhausted_or_failed

if TYPE_CHECKING:
    from tartarus.node.sandbox import Sandbox

_log = structlog.get_logger("tartarus.node")
_MIN_PREFIX = 8  # "sbx-" and four characters


def wants_clone(template: Template, spec: SandboxSpec) -> bool:
    """Whether its command is one for the template's warm interpreter."""
    warm_up = template.warm_up
    if warm_up is None or not warm_up.is_cloned:
        return False
    return spec.command is None or spec.command.argv[0] in warm_up.argv0


def is_called(record: SandboxRecord, id_or_name: str) -> bool:
    """Whether that is its name, or the beginning of its id."""
    is_prefix = len(id_or_name) >= _MIN_PREFIX and record.id.startswith(id_or_name)
    return record.name == id_or_name or is_prefix


def as_failure(error: Exception) -> TartarusError:
    """What kept a sandbox from starting, as the user is told it."""
    if isinstance(error, TartarusError):
        return error
    if isinstance(error, OSError):
        return exhausted_or_failed("the sandbox can't be started", error.errno or 0)
    return GuestFailed("the sandbox can't be started", why=f"{type(error).__name__}: {error}")


def preparing(template_id: str) -> Callable[[str], None]:
    """What is told of a template's preparation goes to the log."""

    def report(message: str) -> None:
        _log.info("preparing", template=template_id, step=message)

    return report


async def unwanted(sandbox: Sandbox) -> None:
    """End a sandbox that runs and whose creator will not have it. One that is held in quarantine stays there."""
    with contextlib.suppress(TartarusError):
        await asyncio.shield(sandbox.kill())
