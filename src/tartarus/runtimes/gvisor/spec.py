"""What runsc is told: the OCI bundle of a guest, as bytes."""

from __future__ import annotations

import resource
from collections.abc import Sequence
from typing import Any

import msgspec

from tartarus.guest.syscalls import machine, table
from tartarus.model.sandbox import Isolation, Mount, Resources
from tartarus.model.secrets import SECRETS_DIRECTORY
from tartarus.model.security import CAPABILITIES, SeccompAction
from tartarus.model.template import RunAs
from tartarus.runtimes.confine import narrowing, rlimits
from tartarus.runtimes.container.secretsdir import SECRETS_BYTES
from tartarus.runtimes.hardening import USUAL, Hardening
from tartarus.runtimes.idmap import IdMap

AGENT = "/.tartarus/guest"
"""Where a guest finds the agent: in a layer above the template's."""
SHM_MIN = 64 * 1024**2
_ACTIONS = {
    SeccompAction.ERRNO: "SCMP_ACT_ERRNO", SeccompAction.TRAP: "SCMP_ACT_TRAP",
}  # fmt: skip
_ARCHITECTURES = {"x86_64": "SCMP_ARCH_X86_64", "aarch64": "SCMP_ARCH_AARCH64"}
_LIMIT_NAMES = {
    getattr(resource, name): name
    for name in ("RLIMIT_CORE", "RLIMIT_NOFILE", "RLIMIT_MEMLOCK", "RLIMIT_STACK", "RLIMIT_NICE", "RLIMIT_RTPRIO",
                 "RLIMIT_SIGPENDING", "RLIMIT_MSGQUEUE", "RLIMIT_NPROC")
}  # fmt: skip


def bundle(
    argv: Sequence[str],
    env: dict[str, str],
    *,
    user: RunAs,
    hostname: str,
    root: str,
    binds: Sequence[tuple[str, str]],
    mounts: Sequence[tuple[str, Mount]],
    resources: Resources,
    id_map: IdMap,
    secrets: bool = False,
    network: bool = False,
    hardening: Hardening = USUAL,
) -> bytes:
    """The bundle's config.json. `binds` and `mounts` name their sources as runsc finds them.

    `network`: runsc is started in the network namespace whose links its own stack takes over.
    """
    kinds = [{"type": kind} for kind in ("user", "pid", "ipc", "uts", "mount")]
    kinds.append({"type": "network", "path": "/proc/self/ns/net"} if network else {"type": "network"})
    identity = {"containerID": 0, "hostID": id_map.base, "size": hardening.ids or id_map.span}
    config = {
        "ociVersion": "1.0.2",
        "process": {
            "args": list(argv),
            "env": [f"{name}={value}" for name, value in env.items()],
            "cwd": "/",
            "user": {"uid": user.uid, "gid": user.gid, "additionalGids": list(user.groups)},
            "capabilities": _capabilities(hardening.added),
            "noNewPrivileges": True,
            "rlimits": [
                {"type": _LIMIT_NAMES[which], "soft": soft, "hard": hard}
                for which, soft, hard in [
                    *rlimits.wanted(resources, Isolation.CONTAINER),
                    # gVisor's own kernel counts; the group on the host is wider, and runsc dies when that is full.
                    (resource.RLIMIT_NPROC, resources.pids + 1, resources.pids + 1),
                ]
            ],
        },
        "root": {"path": root, "readonly": False},
        "hostname": hostname,
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["ro", "nosuid", "nodev", "noexec"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "tmpfs",  # noqa: S108 - the guest's
             "options": ["mode=1777", f"size={max(SHM_MIN, resources.memory_bytes // 2)}"]},
            # Else runsc puts a tmpfs of the sandbox's memory there, without a limit.
            {"destination": "/tmp", "type": "bind", "source": f"{root}/tmp", "options": ["bind", "rw"]},  # noqa: S108
            # Out of reach of whoever is root inside: it is once run with a privilege, to name a restored guest.
            {"destination": "/.tartarus", "type": "bind", "source": "/a/.tartarus", "options": ["rbind", "ro"]},
            *({"destination": target, "type": "bind", "source": source, "options": ["rbind", "ro"]}
              for source, target in binds),
            *({"destination": mount.target, "type": "bind", "source": source,
               "options": ["bind", "ro" if mount.read_only else "rw"]} for source, mount in mounts),
            *([{"destination": SECRETS_DIRECTORY, "type": "tmpfs", "source": "tmpfs",
                "options": ["nosuid", "nodev", "noexec", "mode=0700", f"uid={user.uid}", f"gid={user.gid}",
                            f"size={SECRETS_BYTES}"]}] if secrets else []),
        ],
        "linux": {
            "namespaces": kinds,
            "uidMappings": [identity],
            "gidMappings": [identity],
            **({"seccomp": seccomp(hardening)} if hardening.filters else {}),
        },
    }  # fmt: skip
    return msgspec.json.encode(config)


def _capabilities(added: int) -> dict[str, list[str]]:
    names = [f"CAP_{name}" for number, name in enumerate(CAPABILITIES) if added & 1 << number]
    return dict.fromkeys(("bounding", "effective", "permitted", "inheritable", "ambient"), names) if names else {}


def seccomp(hardening: Hardening) -> dict[str, Any]:
    """The profile as OCI has it, judged by gVisor's own kernel. What falls back there is that kernel's to answer."""
    calls = table() if hardening.calls is None else hardening.calls
    allowed = narrowing.AGENT | narrowing.FALLS_BACK | frozenset(calls)
    rules = [{"names": sorted(allowed), "action": "SCMP_ACT_ALLOW"}]
    if features := sorted(narrowing.FEATURES - allowed):
        rules.append({"names": features, "action": "SCMP_ACT_ERRNO"})
    return {"defaultAction": _ACTIONS[hardening.default], "architectures": [_ARCHITECTURES[machine()]],
            "syscalls": rules}  # fmt: skip
