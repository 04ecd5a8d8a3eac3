"""What `ctr containers info` says: containerd's record and the OCI runtime specification's document in it."""

from __future__ import annotations

from typing import Any

import msgspec

from tartarus.compat.engines import ContainerLimits, ContainerMount, ContainerState, ContainerSummary, shown

# What containerd, like Docker, gives every container.
_USUAL = frozenset(
    f"CAP_{name}"
    for name in (
        "CHOWN", "DAC_OVERRIDE", "FSETID", "FOWNER", "MKNOD", "NET_RAW", "SETGID", "SETUID", "SETFCAP", "SETPCAP",
        "NET_BIND_SERVICE", "SYS_CHROOT", "KILL", "AUDIT_WRITE",
    )
)  # fmt: skip
_MANY = len(_USUAL) * 2
_NAMESPACES = ("network", "pid", "ipc", "uts", "mount")
_ENGINES_OWN = ("/proc", "/dev", "/sys", "/run", "/etc/hosts", "/etc/hostname", "/etc/resolv.conf")


class _User(msgspec.Struct):
    uid: int = 0
    gid: int = 0


class _Capabilities(msgspec.Struct):
    bounding: list[str] | None = None


class _Process(msgspec.Struct):
    args: list[str] | None = None
    env: list[str] | None = None
    cwd: str = ""
    terminal: bool = False
    user: _User = msgspec.field(default_factory=_User)
    capabilities: _Capabilities | None = None


class _Mount(msgspec.Struct):
    destination: str = ""
    type: str = ""
    source: str = ""
    options: list[str] | None = None


class _Memory(msgspec.Struct):
    limit: int | None = None


class _Cpu(msgspec.Struct):
    quota: int | None = None
    period: int | None = None


class _Pids(msgspec.Struct):
    limit: int | None = None


class _Resources(msgspec.Struct):
    memory: _Memory | None = None
    cpu: _Cpu | None = None
    pids: _Pids | None = None


class _Namespace(msgspec.Struct):
    type: str = ""
    path: str = ""


class _Linux(msgspec.Struct):
    resources: _Resources = msgspec.field(default_factory=_Resources)
    namespaces: list[_Namespace] | None = None
    devices: list[Any] | None = None
    seccomp: Any = None
    masked_paths: list[str] | None = msgspec.field(default=None, name="maskedPaths")


class _Spec(msgspec.Struct):
    process: _Process = msgspec.field(default_factory=_Process)
    mounts: list[_Mount] | None = None
    linux: _Linux = msgspec.field(default_factory=_Linux)


class _Runtime(msgspec.Struct, rename="pascal"):
    name: str = ""


class ContainerAnswer(msgspec.Struct, rename="pascal"):
    """One container; `snapshot_key` names its files in its `snapshotter`."""

    id: str = msgspec.field(name="ID")
    image: str = ""
    labels: dict[str, str] | None = None
    snapshot_key: str = ""
    snapshotter: str = ""
    runtime: _Runtime = msgspec.field(default_factory=_Runtime)
    spec: _Spec = msgspec.field(default_factory=_Spec)


def summary(found: ContainerAnswer, status: str, isolation: str) -> ContainerSummary:
    """A listing's entry."""
    return ContainerSummary(
        id=shown(found.id, 80), name=shown(found.id, 80), image=shown(found.image), status=shown(status, 40),
        command=shown(" ".join(found.spec.process.args or ())), isolation=isolation, engine="containerd",
    )  # fmt: skip


def state(found: ContainerAnswer, status: str) -> ContainerState:
    """A container in our nouns. containerd keeps neither output nor exit status."""
    process = found.spec.process
    return ContainerState(
        engine="containerd", id=found.id, name=found.id, image=found.image, status=status,
        argv=tuple(process.args or ()), env=tuple(process.env or ()), workdir=process.cwd,
        user=f"{process.user.uid}:{process.user.gid}", tty=process.terminal, labels=found.labels or {},
        limits=_limits(found.spec.linux.resources), mounts=tuple(_mounts(found.spec.mounts or [])),
        network="none" if _own_namespace(found.spec.linux, "network") else "host", powers=tuple(_powers(found.spec)),
        keeps_logs=False,
    )  # fmt: skip


def _limits(found: _Resources) -> ContainerLimits:
    memory = found.memory.limit if found.memory is not None else None
    pids = found.pids.limit if found.pids is not None else None
    cpu = None
    if found.cpu is not None and found.cpu.quota is not None and found.cpu.quota > 0:
        cpu = found.cpu.quota * 1000 // (found.cpu.period or 100_000)
    return ContainerLimits(
        memory_bytes=memory if memory is not None and memory > 0 else None,
        cpu_milli=cpu or None,
        pids=pids if pids is not None and pids > 0 else None,
    )


def _mounts(found: list[_Mount]) -> list[ContainerMount]:
    """Those that somebody asked for; the rest is what every container has."""
    mounts = []
    for mount in found:
        options = mount.options or []
        if "bind" in options or "rbind" in options or mount.type == "bind":
            kind = "bind"
        elif mount.destination.startswith(_ENGINES_OWN):
            continue
        else:
            kind = mount.type
        mounts.append(
            ContainerMount(kind=kind, source=mount.source, target=mount.destination, read_only="ro" in options)
        )
    return sorted(mounts, key=lambda mount: mount.target)


def _own_namespace(linux: _Linux, kind: str) -> bool:
    return any(namespace.type == kind and not namespace.path for namespace in linux.namespaces or ())


def _powers(spec: _Spec) -> list[str]:
    """What the container may do to its host."""
    held = set((spec.process.capabilities.bounding if spec.process.capabilities is not None else None) or ())
    more = sorted(held - _USUAL)
    found = ["it has every capability"] if len(more) > _MANY else []
    if not found:
        found = [f"it has the capability {shown(name.removeprefix('CAP_'), 60)}" for name in more]
    for kind in _NAMESPACES:
        if not any(namespace.type == kind for namespace in spec.linux.namespaces or ()):
            found.append(f"it shares the host's {'process' if kind == 'pid' else kind} namespace")
        elif not _own_namespace(spec.linux, kind):
            found.append(f"it joins another's {'process' if kind == 'pid' else kind} namespace")
    if spec.linux.devices:
        found.append("it is given devices of the host")
    return found
