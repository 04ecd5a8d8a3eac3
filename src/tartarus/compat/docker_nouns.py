"""What Docker's API answers (v1.41; Podman's answers alike), as far as we look, and what it means in our nouns.

Everything else is ignored, and every field may be missing: engines differ, and none is trusted.
"""

from __future__ import annotations

from typing import Any

import msgspec

from tartarus.compat.engines import ContainerLimits, ContainerMount, ContainerState, ContainerSummary, shown

_Words = list[str] | None


class VersionAnswer(msgspec.Struct, rename="pascal"):
    """GET /version."""

    version: str = ""


class InfoAnswer(msgspec.Struct, rename="pascal"):
    """GET /info."""

    default_runtime: str = ""


class _RestartPolicy(msgspec.Struct, rename="pascal"):
    name: str = ""


class _LogConfig(msgspec.Struct, rename="pascal"):
    type: str = ""


class _Ulimit(msgspec.Struct, rename="pascal"):
    name: str = ""


class _Host(msgspec.Struct, rename="pascal"):
    network_mode: str = ""
    pid_mode: str = ""
    ipc_mode: str = ""
    uts_mode: str = msgspec.field(default="", name="UTSMode")
    userns_mode: str = ""
    cgroupns_mode: str = ""
    port_bindings: dict[str, Any] | None = None
    restart_policy: _RestartPolicy = msgspec.field(default_factory=_RestartPolicy)
    log_config: _LogConfig = msgspec.field(default_factory=_LogConfig)
    privileged: bool = False
    cap_add: _Words = None
    devices: list[Any] | None = None
    device_cgroup_rules: _Words = None
    device_requests: list[Any] | None = None
    security_opt: _Words = None
    volumes_from: _Words = None
    group_add: _Words = None
    dns: _Words = None
    extra_hosts: _Words = None
    links: _Words = None
    sysctls: dict[str, str] | None = None
    ulimits: list[_Ulimit] | None = None
    tmpfs: dict[str, str] | None = None
    readonly_rootfs: bool = False
    init: bool | None = None
    oom_kill_disable: bool | None = None
    memory: int = 0
    nano_cpus: int = 0
    cpu_quota: int = 0
    cpu_period: int = 0
    cpu_shares: int = 0
    cpuset_cpus: str = ""
    pids_limit: int | None = None


class _Health(msgspec.Struct, rename="pascal"):
    test: _Words = None


class _Config(msgspec.Struct, rename="pascal"):
    image: str = ""
    user: str = ""
    env: _Words = None
    cmd: _Words = None
    entrypoint: _Words = None
    working_dir: str = ""
    tty: bool = False
    open_stdin: bool = False
    labels: dict[str, str] | None = None
    exposed_ports: dict[str, Any] | None = None
    healthcheck: _Health | None = None


class _State(msgspec.Struct, rename="pascal"):
    status: str = ""
    exit_code: int = 0
    started_at: str = ""


class _Mount(msgspec.Struct, rename="pascal"):
    type: str = ""
    name: str = ""
    source: str = ""
    destination: str = ""
    rw: bool = msgspec.field(default=True, name="RW")


class ContainerAnswer(msgspec.Struct, rename="pascal"):
    """GET /containers/{id}/json."""

    id: str
    name: str = ""
    path: str = ""
    args: _Words = None
    state: _State = msgspec.field(default_factory=_State)
    config: _Config = msgspec.field(default_factory=_Config)
    host_config: _Host = msgspec.field(default_factory=_Host)
    mounts: list[_Mount] | None = None


class ListedAnswer(msgspec.Struct, rename="pascal"):
    """One of GET /containers/json."""

    id: str
    names: _Words = None
    image: str = ""
    command: str | list[str] | None = ""
    state: str = ""


def summary(found: ListedAnswer, engine: str, isolation: str) -> ContainerSummary:
    """A listing's entry."""
    command = found.command if isinstance(found.command, str) else " ".join(found.command or ())
    name = (found.names or [""])[0].lstrip("/")
    return ContainerSummary(
        id=shown(found.id, 64), name=shown(name), image=shown(found.image), status=shown(found.state, 40),
        command=shown(command), isolation=isolation, engine=engine,
    )  # fmt: skip


def state(found: ContainerAnswer, engine: str) -> ContainerState:
    """A container in our nouns."""
    config, host = found.config, found.host_config
    return ContainerState(
        engine=engine,
        id=found.id,
        name=found.name.lstrip("/"),
        image=config.image,
        status=found.state.status,
        argv=(found.path, *(found.args or ())) if found.path else (),
        env=tuple(config.env or ()),
        workdir=config.working_dir,
        user=config.user,
        tty=config.tty,
        labels=config.labels or {},
        limits=_limits(host),
        mounts=tuple(sorted((*map(_mount, found.mounts or ()), *_tmpfs(host)), key=lambda mount: mount.target)),
        network=host.network_mode or "default",
        ports=tuple(sorted({*(host.port_bindings or {}), *(config.exposed_ports or {})})),
        restart="" if host.restart_policy.name in {"", "no"} else host.restart_policy.name,
        powers=tuple(_powers(host)),
        others=tuple(_others(config, host)),
        exit_code=found.state.exit_code,
        started_at=found.state.started_at,
        keeps_logs=host.log_config.type in {"json-file", "local", "journald", "k8s-file", ""},
    )


def _limits(host: _Host) -> ContainerLimits:
    cpu = host.nano_cpus // 1_000_000
    if not cpu and host.cpu_quota > 0:
        cpu = host.cpu_quota * 1000 // (host.cpu_period or 100_000)
    pids = host.pids_limit
    return ContainerLimits(
        memory_bytes=host.memory if host.memory > 0 else None,
        cpu_milli=cpu if cpu > 0 else None,
        pids=pids if pids is not None and pids > 0 else None,
    )


def _mount(found: _Mount) -> ContainerMount:
    return ContainerMount(
        kind=found.type or "bind", source=found.source, target=found.destination, read_only=not found.rw,
        name=found.name,
    )  # fmt: skip


def _tmpfs(host: _Host) -> list[ContainerMount]:
    return [ContainerMount(kind="tmpfs", source="", target=target) for target in host.tmpfs or {}]


def _powers(host: _Host) -> list[str]:
    """What the container may do to its host."""
    found = ["it is privileged"] if host.privileged else []
    shared = (
        ("network", host.network_mode), ("process", host.pid_mode), ("ipc", host.ipc_mode), ("uts", host.uts_mode),
        ("user", host.userns_mode),
    )  # fmt: skip
    for what, mode in shared:
        if mode == "host":
            found.append(f"it shares the host's {what} namespace")
        elif mode.startswith("container:"):
            found.append(f"it shares another container's {what} namespace")
    found += [f"it has the capability {shown(name, 60)}" for name in host.cap_add or ()]
    if host.devices or host.device_requests or host.device_cgroup_rules:
        found.append("it is given devices of the host")
    implied = host.privileged or "host" in {host.pid_mode, host.ipc_mode}
    for option in host.security_opt or ():
        if implied and option.startswith("label"):
            continue  # Docker's own addition to these
        if option.replace("=", ":").removesuffix(":true") == "no-new-privileges":
            continue  # every sandbox has it
        found.append(f"its security options: {shown(option, 100)}")
    if host.sysctls:
        found.append("it sets kernel parameters")
    return found


def _others(config: _Config, host: _Host) -> list[str]:
    """Settings that sandboxes do not have and that give no power."""
    wanted = (
        (config.healthcheck is not None and config.healthcheck.test, "the health check"),
        (host.readonly_rootfs, "the read-only root: a sandbox writes into a layer of its own, gone at its end"),
        (host.group_add, "additional groups"),
        (host.dns or host.extra_hosts or host.links, "names and links of the network"),
        (host.ulimits, "ulimits"),
        (host.volumes_from, "volumes of other containers, beyond those listed"),
        (host.cpu_shares or host.cpuset_cpus, "CPU shares and sets"),
        (host.init, "--init: every sandbox's process 1 reaps"),
        (config.open_stdin, "the open standard input: pipe something into tartarus run"),
    )
    return [text for holds, text in wanted if holds]
