"""From a container's state to a template's definition and a request: decided whole, before anything is done.

Pure but for a look at the mounts' sources. Each setting ends in one finding: carried, changed, dropped or refused.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from enum import Enum
from typing import Any

import msgspec

from tartarus.compat.engines import ContainerMount, ContainerState, shown
from tartarus.compat.places import refusal
from tartarus.compat.secrets import looks_secret, secret_arguments
from tartarus.model.checks import MAX_LABEL_KEY, MAX_LABEL_VALUE, MAX_LABELS, check_mount
from tartarus.model.definition import Definition, TemplateResources
from tartarus.model.errors import InvalidRequest, TartarusError
from tartarus.model.sandbox import ExecSpec, Isolation, Mount, ResourceRequest, Resources, SandboxSpec
from tartarus.model.units import format_size

_MIB = 1024**2
_LEAST_MEMORY, _LEAST_PIDS, _LEAST_CPU = 8 * _MIB, 4, 10
MAX_VARIABLES = 4096
MAX_SETTINGS = 256
"""Mounts, ports and the like, of each kind."""
MAX_ENV_BYTES = 1024**2
# What the engine sets by itself in every container: a sandbox has its own.
_ENGINES_OWN = frozenset({"HOSTNAME", "HOME", "TERM", "container"})


class Effect(str, Enum):
    """What becomes of a setting. `refused`: nothing is made while it is there, unless its owner drops it."""

    CARRIED = "carried"
    CHANGED = "changed"
    DROPPED = "dropped"
    REFUSED = "refused"


class Finding(msgspec.Struct, frozen=True):
    """One setting and what becomes of it, in words."""

    effect: Effect
    what: str
    detail: str


class Secrets(str, Enum):
    """Where variables that look like secrets are kept."""

    NONE = "none"
    REQUEST = "request"
    TEMPLATE = "template"


class Mounts(str, Enum):
    """What becomes of mounted directories: the request mounts them, or the template has a copy, or neither."""

    KEEP = "keep"
    COPY = "copy"
    DROP = "drop"


class Wishes(msgspec.Struct, frozen=True, kw_only=True):
    """What the owner of a container says of its migration. Limits override the container's own."""

    name: str
    isolation: Isolation = Isolation.AUTO
    secrets: Secrets = Secrets.NONE
    mounts: Mounts = Mounts.KEEP
    drop_refused: bool = False
    memory_bytes: int | None = None
    cpu_milli: int | None = None
    pids: int | None = None
    disk_bytes: int | None = None
    timeout_s: float | None = None


class MigrationPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What a migration would make: a template by this definition, and a request for sandboxes of it.

    `secrets` are names only; `copies` are the mounted directories that go into the template.
    """

    engine: str
    container: str
    image: str
    status: str
    definition: Definition
    request: SandboxSpec
    findings: tuple[Finding, ...]
    secrets: tuple[str, ...] = ()
    copies: tuple[Mount, ...] = ()

    @property
    def refused(self) -> tuple[Finding, ...]:
        """What stands in the way."""
        return tuple(finding for finding in self.findings if finding.effect is Effect.REFUSED)


def make_plan(state: ContainerState, wishes: Wishes, *, engine_socket: str = "") -> MigrationPlan:
    """Decide what becomes of each setting. Raises InvalidRequest for what no process could be given at all."""
    return _Planner(state, wishes, engine_socket).plan()


class _Planner:
    def __init__(self, state: ContainerState, wishes: Wishes, engine_socket: str) -> None:
        self._state = state
        self._wishes = wishes
        self._socket = engine_socket
        self._findings: list[Finding] = []

    def plan(self) -> MigrationPlan:
        state, wishes = self._state, self._wishes
        if not state.argv:
            raise InvalidRequest(f"the container {shown(state.name or state.id)} has no command")
        for several in (state.mounts, state.ports, state.powers, state.others):
            if len(several) > MAX_SETTINGS:
                raise InvalidRequest("the container has too many settings", why=f"{len(several)} of one kind")
        self._say(Effect.CARRIED, "files", "its file system as it is now, without what is mounted in it")
        env, secrets = self._environment()
        resources = self._limits()
        self._command()
        labels = self._labels()
        mounts = tuple(self._mounts())
        copies = mounts if wishes.mounts is Mounts.COPY else ()
        self._rest()
        secret_env = {name: env[name] for name in secrets}
        open_env = {name: value for name, value in env.items() if name not in secret_env}
        try:
            definition = Definition(
                id=wishes.name,
                description=shown(f"Migrated from the {state.engine} container {state.name or state.id}"),
                env=open_env | (secret_env if wishes.secrets is Secrets.TEMPLATE else {}),
                workdir=f"/{state.workdir.lstrip('/')}",
                user=state.user,
                labels={"tartarus.migrated-from": shown(f"{state.engine}/{state.name or state.id}")},
                resources=_defaults(resources),
            )
            request = SandboxSpec(
                template=wishes.name,
                isolation=wishes.isolation,
                command=ExecSpec(argv=state.argv, tty=state.tty),
                resources=resources,
                env=secret_env if wishes.secrets is Secrets.REQUEST else {},
                mounts=() if copies else mounts,
                labels=labels,
                timeout_s=wishes.timeout_s,
            )
        except TartarusError as error:
            raise InvalidRequest(
                f"the container {shown(state.name or state.id)} can't be carried over", why=shown(str(error), 400)
            ) from None
        return MigrationPlan(
            engine=state.engine, container=shown(state.name or state.id), image=shown(state.image),
            status=shown(state.status, 40), definition=definition, request=request, findings=tuple(self._findings),
            secrets=tuple(secrets), copies=copies,
        )  # fmt: skip

    def _say(self, effect: Effect, what: str, detail: str) -> None:
        self._findings.append(Finding(effect, shown(what), shown(detail, 400)))

    def _refuse(self, what: str, detail: str) -> None:
        effect = Effect.DROPPED if self._wishes.drop_refused else Effect.REFUSED
        self._say(effect, what, detail)

    def _environment(self) -> tuple[dict[str, str], list[str]]:
        """The variables, and the names of those that look like secrets."""
        pairs = self._state.env
        if len(pairs) > MAX_VARIABLES or sum(map(len, pairs)) > MAX_ENV_BYTES:
            raise InvalidRequest(
                "the container's environment is too large",
                why=f"at most {MAX_VARIABLES} variables of {MAX_ENV_BYTES} characters in all are taken",
            )
        env = {}
        for pair in pairs:
            name, equals, value = pair.partition("=")
            if not name or "\0" in pair:
                raise InvalidRequest(f"the container sets a variable that no process could have: {shown(pair)!r}")
            if equals and name not in _ENGINES_OWN:
                env[name] = value
        secrets = [name for name, value in env.items() if looks_secret(name, value)]
        kept = len(env) - len(secrets)
        self._say(Effect.CARRIED, "environment", f"{kept} variable{'s' if kept != 1 else ''}, into the template")
        where = {
            Secrets.NONE: (Effect.DROPPED, "kept nowhere; see --secrets, or pass them with tartarus run -e NAME"),
            Secrets.REQUEST: (Effect.CARRIED, "kept in the request, which its owner alone can read"),
            Secrets.TEMPLATE: (Effect.CARRIED, "kept in the template, in the open"),
        }
        effect, detail = where[self._wishes.secrets]
        for name in secrets:
            self._say(effect, f"secret {shown(name, 80)}", detail)
        return env, secrets

    def _limits(self) -> ResourceRequest:
        wishes, limits, usual = self._wishes, self._state.limits, Resources()
        memory = self._limit("memory", wishes.memory_bytes, limits.memory_bytes, usual.memory_bytes, _LEAST_MEMORY)
        cpu = self._limit("cpus", wishes.cpu_milli, limits.cpu_milli, usual.cpu_milli, _LEAST_CPU)
        pids = self._limit("pids", wishes.pids, limits.pids, usual.pids, _LEAST_PIDS)
        disk = self._limit("disk", wishes.disk_bytes, None, usual.disk_bytes, _MIB)
        try:
            return ResourceRequest(memory_bytes=memory, cpu_milli=cpu, pids=pids, disk_bytes=disk)
        except TartarusError as error:
            raise InvalidRequest("a limit is out of range", why=str(error)) from None

    def _limit(self, what: str, wished: int | None, had: int | None, usual: int, least: int) -> int:
        def words(amount: int) -> str:
            return (
                f"{amount / 1000:g}" if what == "cpus" else str(amount) if what == "pids" else format_size(amount)
            )  # fmt: skip

        if wished is not None:
            self._say(Effect.CHANGED, what, f"{words(had) if had else 'no limit'} becomes {words(wished)}, as you say")
            return wished
        if had is None:
            self._say(Effect.CHANGED, what, f"no limit becomes {words(usual)}; say another with --{what}")
            return usual
        if had < least:
            self._say(Effect.CHANGED, what, f"{words(had)} becomes {words(least)}, the least there is")
            return least
        self._say(Effect.CARRIED, what, words(had))
        return had

    def _command(self) -> None:
        state = self._state
        self._say(Effect.CARRIED, "command", "entrypoint and arguments, into the request: " + " ".join(state.argv))
        for position in secret_arguments(state.argv):
            self._say(
                Effect.CHANGED, f"argument {position}",
                "it looks like a secret, and is in the request: edit it if that is no place for it",
            )  # fmt: skip
        for what, value in (("workdir", state.workdir or "/"), ("user", state.user or "root")):
            self._say(Effect.CARRIED, what, value)

    def _labels(self) -> dict[str, str]:
        kept: dict[str, str] = {}
        dropped = 0
        for key, value in self._state.labels.items():
            fits = key and "=" not in key and "\0" not in key + value
            if fits and len(key) <= MAX_LABEL_KEY and len(value) <= MAX_LABEL_VALUE and len(kept) < MAX_LABELS:
                kept[key] = value
            else:
                dropped += 1
        if kept:
            self._say(Effect.CARRIED, "labels", f"{len(kept)}, into the request")
        if dropped:
            self._say(Effect.DROPPED, "labels", f"{dropped} that are too long, too many, or no key=value")
        return kept

    def _mounts(self) -> Iterator[Mount]:
        for mount in self._state.mounts:
            what = f"mount {mount.target}"
            if mount.kind == "tmpfs":
                self._say(Effect.CHANGED, what, "a tmpfs becomes an ordinary directory, within the disk limit")
                continue
            if mount.kind not in {"bind", "volume"}:
                self._say(Effect.DROPPED, what, f"a mount of kind {mount.kind} has no counterpart")
                continue
            made, why = self._mount(mount)
            if made is None:
                self._refuse(what, f"{mount.source}: {why}")
            elif self._wishes.mounts is Mounts.DROP:
                self._say(Effect.DROPPED, what, "as you say (--mounts drop)")
            elif self._wishes.mounts is Mounts.COPY:
                if not os.path.isdir(made.source):
                    self._refuse(what, f"{mount.source}: only directories are copied")
                    continue
                self._say(Effect.CARRIED, what, f"{mount.source}, copied: each sandbox changes a copy of its own")
                yield made
            elif self._wishes.isolation is Isolation.MICROVM:
                self._refuse(what, f"{mount.source}: a microVM takes no mounts; see --mounts copy")
            else:
                mode = "read-only" if made.read_only else "writable: sandboxes write into the same files"
                volume = f" It is {self._state.engine}'s volume and goes with it." if mount.kind == "volume" else ""
                self._say(Effect.CARRIED, what, f"{mount.source}, {mode}.{volume}")
                yield made

    def _mount(self, mount: ContainerMount) -> tuple[Mount | None, str]:
        # Resolved once: what is judged is what is taken, whatever a link leads to later.
        source = os.path.realpath(mount.source) if _is_path(mount.source) else mount.source
        made = Mount(source, mount.target, mount.read_only)
        try:
            check_mount(made)
        except TartarusError as error:
            return None, str(error)
        why = refusal(source, engine_socket=self._socket, volume=mount.kind == "volume")
        return (None if why else made), why

    def _rest(self) -> None:
        state = self._state
        for power in state.powers:
            self._refuse("power", f"{power}; a sandbox has no power over its host")
        if state.network not in {"none", ""}:
            self._say(Effect.CHANGED, "network", f"{state.network} becomes none: a sandbox reaches nothing")
        for port in state.ports:
            self._say(Effect.DROPPED, "port", f"{port}: a sandbox without network listens to nobody outside")
        if state.restart:
            self._say(Effect.DROPPED, "restart", f"{state.restart}: let a supervisor run tartarus run")
        for other in state.others:
            self._say(Effect.DROPPED, "setting", other)


def _is_path(text: str) -> bool:
    return text.startswith("/") and "\0" not in text


def _defaults(resources: ResourceRequest) -> TemplateResources:
    """The same limits as a template says them, in whole MiB."""
    got = resources.over(Resources())
    return TemplateResources(
        default_cpu=got.cpu_milli / 1000,
        default_memory=-(-got.memory_bytes // _MIB),
        default_disk=-(-got.disk_bytes // _MIB),
        default_pids=got.pids,
    )


def summary(plan: MigrationPlan) -> dict[str, Any]:
    """The plan for programs. Secrets are in it only where they are kept by their owner's word."""
    return {
        "engine": plan.engine, "container": plan.container, "image": plan.image, "status": plan.status,
        "template": plan.definition.id, "findings": plan.findings, "secrets": plan.secrets,
        "definition": plan.definition, "request": plan.request, "copies": plan.copies,
    }  # fmt: skip
