"""From friendly arguments (``memory="512MiB"``, ``mounts=["/data:/data:ro"]``) to the model's specs, checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import msgspec

from tartarus.model.contract import Contract, Publish
from tartarus.model.errors import InvalidRequest
from tartarus.model.sandbox import ExecSpec, Isolation, Mount, ResourceRequest, SandboxSpec, Wasm
from tartarus.model.secrets import SecretUse
from tartarus.model.security import SecurityConfig
from tartarus.model.units import parse_cpus, parse_duration, parse_size
from tartarus.sdk.networks import network_fields, published
from tartarus.sdk.shorthand import mount_fields, secret_fields

Choice = TypeVar("Choice", bound=Isolation)


def sandbox_spec(
    *,
    template: str = "host",
    isolation: str = "auto",
    command: Sequence[str] | None = None,
    timeout_s: float | str | None = None,
    memory: int | str | None = None,
    cpus: float | str | None = None,
    pids: int | None = None,
    disk: int | str | None = None,
    env: Mapping[str, str] | None = None,
    workdir: str = "",
    mounts: Iterable[str | Mount] = (),
    network: str | Contract = "none",
    allow: Iterable[str] = (),
    publish: Iterable[str | int | Publish] = (),
    name: str = "",
    labels: Mapping[str, str] | None = None,
    snapshot: str = "",
    module: str = "",
    fuel: int | None = None,
    stop_signal: int | str = "",
    stop_grace: float | str | None = None,
    idle: float | str | None = None,
    secrets: Iterable[str | SecretUse] = (),
    security: SecurityConfig | None = None,
    record_calls: bool = False,
) -> SandboxSpec:
    """A whole spec. Raises InvalidRequest, naming what is wrong, before anything is asked of the daemon."""
    mode, contract = network_fields(network, tuple(allow))
    return SandboxSpec(
        template=template,
        isolation=_choice(Isolation, isolation, "isolation level"),
        command=None if command is None else exec_spec(command),
        resources=ResourceRequest(
            memory_bytes=None if memory is None else parse_size(memory),
            cpu_milli=None if cpus is None else parse_cpus(cpus),
            pids=pids,
            disk_bytes=None if disk is None else parse_size(disk),
        ),
        timeout_s=None if timeout_s is None else parse_duration(timeout_s),
        env=dict(env or {}),
        workdir=workdir,
        mounts=tuple(parse_mount(mount) if isinstance(mount, str) else mount for mount in mounts),
        network=mode,
        contract=contract,
        publish=tuple(published(one) for one in publish),
        name=name,
        labels=dict(labels or {}),
        snapshot=snapshot,
        wasm=Wasm(module=module, fuel=fuel) if module or fuel is not None else None,
        stop_signal=str(stop_signal),
        stop_grace_s=duration_or_none(stop_grace),
        idle_s=None if idle is None else parse_duration(idle),
        secrets=tuple(parse_secret(secret) if isinstance(secret, str) else secret for secret in secrets),
        security=security,
        record_calls=record_calls,
    )


def exec_spec(
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    workdir: str = "",
    stdin: bool = False,
    tty: bool = False,
    rows: int = 24,
    cols: int = 80,
    timeout_s: float | str | None = None,
) -> ExecSpec:
    """A command's spec. A string is refused: there is no shell between you and the sandbox."""
    if isinstance(argv, str):
        raise InvalidRequest(
            "the command is one string",
            fix='give a list, as in ["echo", "hello"], or ["sh", "-c", "echo hello | wc"] for a shell',
        )
    return ExecSpec(
        argv=tuple(argv), env=dict(env or {}), workdir=workdir, stdin=stdin, tty=tty, rows=rows, cols=cols,
        timeout_s=None if timeout_s is None else parse_duration(timeout_s),
    )  # fmt: skip


def duration_or_none(text: float | str | None) -> float | None:
    """Seconds from a duration that may be none at all, or 0. Raises InvalidRequest."""
    if text is None:
        return None
    return 0.0 if text in {0, "0", "0s"} else parse_duration(text)


def parse_mount(text: str) -> Mount:
    """Read ``source:target[:ro|rw]``; a relative source is below the current directory."""
    return msgspec.convert(mount_fields(text), Mount)


def parse_secret(text: str) -> SecretUse:
    """Read ``NAME[,as=env|file][,target=T]``."""
    try:
        return msgspec.convert(secret_fields(text), SecretUse)
    except msgspec.ValidationError:
        raise InvalidRequest(f"{text!r} is not a secret", fix="as is file or env") from None


def _choice(kind: type[Choice], text: str, what: str) -> Choice:
    try:
        return kind(text)
    except ValueError:
        known = ", ".join(member.value for member in kind)
        raise InvalidRequest(f"{text!r} is no {what} of this version", fix=f"use one of: {known}") from None
