"""Policy documents (Themis): what the sandboxes of a host, of a tenant, of a template may ask for and get.

The keys are those of the roadmap. A document without `tenants` holds for everybody; one with them holds for those,
over it. Within a document, what it says of a template goes over what it says of all. What nobody says is not limited.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable
from enum import Enum
from typing import Any

import msgspec

from tartarus.model.enforcement import ViolationKind
from tartarus.model.errors import InvalidRequest
from tartarus.model.sandbox import Isolation
from tartarus.model.security import Lockdown, SeccompAction, SecurityConfig, at_least_action, at_least_lockdown
from tartarus.model.structured_yaml import StructReader
from tartarus.model.units import parse_duration, parse_size

_MIB = 1024**2
_MAX_PORT = 65535
_MOST = 10**9
"""Of anything: no host has a thousand million CPUs, or that many MiB of memory."""
_MOST_WINDOWS = 32
"""Each is looked at for each violation."""
_DURATIONS = ("max_duration", "default_timeout")
_SEE = "see docs/policies.md for every key"


class OnViolation(str, Enum):
    """What happens to a sandbox that breaks a limit. Strength grows downwards."""

    WARN = "warn"
    THROTTLE = "throttle"
    KILL = "kill"
    QUARANTINE = "quarantine"


class TemplatePolicy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One template's part. `allowed_callers`: users or roles; without them, everybody."""

    id: str
    allowed_callers: tuple[str, ...] | None = None
    max_instances: int | None = None
    default_timeout: str | float | None = None
    isolation: Isolation | None = None


class NetworkPolicy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What contracts may open, at most. Ports and networks in lists; domains with ``*.`` for all below.

    `allow_direct`: whether domains may be reached past the egress proxy. Unsaid it is no where there are
    `allowed_domains`.
    """

    allow: bool | None = None
    deny_private: bool | None = None
    deny_metadata: bool | None = None
    deny_dns: bool | None = None
    allowed_egress_ports: tuple[int, ...] | None = None
    allowed_cidrs: tuple[str, ...] | None = None
    denied_cidrs: tuple[str, ...] | None = None
    allowed_domains: tuple[str, ...] | None = None
    allow_direct: bool | None = None
    max_connections: int | None = None


class ResourcePolicy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The most that one sandbox may ask for, and a tenant may have at once."""

    max_cpu_cores: float | None = None
    max_memory_mb: int | None = None
    max_disk_mb: int | None = None
    max_pids: int | None = None
    max_duration: str | float | None = None
    default_timeout: str | float | None = None
    max_instances: int | None = None
    max_total_cpu_cores: float | None = None
    max_total_memory_mb: int | None = None
    max_launches_per_minute: int | None = None


class SecretsPolicy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of what the host's configuration grants, these names only; an empty list is none. It never grants more."""

    allowed: tuple[str, ...] | None = None


class SecurityPolicy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The least that sandboxes must be hardened by, and the most that they may have: see `policy.hardening`.

    `seccomp_profiles`: one of these; `drop_capabilities`: never to be had; `allowed_capabilities`: no others are added.
    """

    hardened_kernel: bool | None = None
    kernel_lockdown: Lockdown | None = None
    seccomp_profiles: tuple[str, ...] | None = None
    seccomp_default: SeccompAction | None = None
    drop_capabilities: tuple[str, ...] = ()
    allowed_capabilities: tuple[str, ...] | None = None
    user_namespace: bool | None = None

    def __post_init__(self) -> None:
        SecurityConfig(drop_capabilities=self.drop_capabilities)
        SecurityConfig(add_capabilities=self.allowed_capabilities or ())


class WindowPolicy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """So many violations of a kind within so long."""

    violation: ViolationKind
    count: int
    within: str | float = "1m"


class EnforcementPolicy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What happens when a limit is broken."""

    on_timeout: OnViolation | None = None
    on_resource_violation: OnViolation | None = None
    on_network_violation: OnViolation | None = None
    on_syscall_violation: OnViolation | None = None
    max_output: str | int | None = None
    max_cpu_time: str | float | None = None
    quarantine_when: tuple[WindowPolicy, ...] | None = None


class PolicyDocument(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One document. `version` is its author's; the store counts its own."""

    id: str
    name: str = ""
    version: int = 1
    tenants: tuple[str, ...] = ()
    templates: tuple[TemplatePolicy, ...] = ()
    network: NetworkPolicy = NetworkPolicy()
    resources: ResourcePolicy = ResourcePolicy()
    enforcement: EnforcementPolicy = EnforcementPolicy()
    secrets: SecretsPolicy = SecretsPolicy()
    security: SecurityPolicy = SecurityPolicy()
    isolation: Isolation | None = None


class WindowRule(msgspec.Struct, frozen=True):
    """A `WindowPolicy` in seconds."""

    violation: ViolationKind
    count: int
    within_s: float


class Limits(msgspec.Struct, frozen=True):
    """What holds for one tenant and template, in the units of the rest: bytes, thousandths of a CPU, seconds."""

    memory_bytes: int | None = None
    cpu_milli: int | None = None
    disk_bytes: int | None = None
    pids: int | None = None
    duration_s: float | None = None
    default_timeout_s: float | None = None
    instances: int | None = None
    tenant_instances: int | None = None
    tenant_cpu_milli: int | None = None
    tenant_memory_bytes: int | None = None
    launches_per_minute: int | None = None
    callers: tuple[str, ...] | None = None
    secrets: tuple[str, ...] | None = None
    floor: Isolation = Isolation.AUTO
    network: NetworkPolicy = NetworkPolicy()
    security: SecurityPolicy = SecurityPolicy()
    on_timeout: OnViolation = OnViolation.KILL
    on_resources: OnViolation = OnViolation.WARN
    on_network: OnViolation = OnViolation.WARN
    on_syscall: OnViolation | None = None
    output_bytes: int | None = None
    cpu_time_s: float | None = None
    quarantine_when: tuple[WindowRule, ...] = ()
    documents: tuple[str, ...] = ()

    @property
    def watches_calls(self) -> bool:
        """Whether it matters what system calls are tried, which takes a colder start."""
        return self.on_syscall is not None or any(
            rule.violation is ViolationKind.SYSCALL for rule in self.quarantine_when
        )


def read_policy(text: bytes | str, source: str = "the policy") -> PolicyDocument:
    """Read one document. Raises InvalidRequest with the line; nothing of such a file is in force."""
    reader = StructReader(source, PolicyDocument, see=_SEE, holds="one policy")
    document = reader.read(text)
    for place, what, fix in _wrongs(document):
        raise reader.refused(place, f"{place}: {what}", fix=fix)
    return document


def _wrongs(document: PolicyDocument) -> Iterable[tuple[str, str, str]]:
    if not document.id.strip():
        yield "id", "it is empty", "give the policy a name"
    for place, value, check in _values(document):
        try:
            check(value)
        except InvalidRequest as error:
            yield place, error.what, error.fix
    ids: set[str] = set()
    for index, template in enumerate(document.templates):
        if template.id in ids:
            yield f"templates[{index}].id", f"the template {template.id!r} is there twice", "remove one"
        ids.add(template.id)
    if len(document.enforcement.quarantine_when or ()) > _MOST_WINDOWS:
        yield "enforcement.quarantine_when", "there are too many rules", f"keep to {_MOST_WINDOWS}"


def _values(document: PolicyDocument) -> Iterable[tuple[str, Any, Callable[[Any], object]]]:
    """Each value that may be out of range, and what checks it."""
    resources, network, enforcement = document.resources, document.network, document.enforcement
    for name, value in msgspec.structs.asdict(resources).items():
        if value is not None:
            yield f"resources.{name}", value, parse_duration if name in _DURATIONS else _above_zero
    for port in network.allowed_egress_ports or ():
        yield "network.allowed_egress_ports", port, _port
    for text in (*(network.allowed_cidrs or ()), *(network.denied_cidrs or ())):
        yield "network", text, _cidr
    if network.max_connections is not None:
        yield "network.max_connections", network.max_connections, _above_zero
    if enforcement.max_output is not None:
        yield "enforcement.max_output", enforcement.max_output, parse_size
    if enforcement.max_cpu_time is not None:
        yield "enforcement.max_cpu_time", enforcement.max_cpu_time, parse_duration
    for index, window in enumerate(enforcement.quarantine_when or ()):
        yield f"enforcement.quarantine_when[{index}].count", window.count, _above_zero
        yield f"enforcement.quarantine_when[{index}].within", window.within, parse_duration
    for index, template in enumerate(document.templates):
        if template.default_timeout is not None:
            yield f"templates[{index}].default_timeout", template.default_timeout, parse_duration
        if template.max_instances is not None:
            yield f"templates[{index}].max_instances", template.max_instances, _above_zero


def _above_zero(value: float) -> None:
    if not value > 0:
        raise InvalidRequest("it is not above 0", fix="give more than 0, or leave it out")
    if value > _MOST:
        raise InvalidRequest("it is out of range", fix="leave it out to have no limit")


def _port(value: int) -> None:
    if not 0 < value <= _MAX_PORT:
        raise InvalidRequest(f"{value} is no port", fix="use 1 to 65535")


def _cidr(text: str) -> None:
    try:
        ipaddress.ip_network(text)
    except ValueError as error:
        raise InvalidRequest(str(error), fix="write it like 10.0.0.0/8 or 2001:db8::/32") from None


def limits_of(documents: Iterable[PolicyDocument], tenant: str, template: str) -> Limits:
    """What the documents that are in force say of a tenant's sandboxes of a template.

    A tenant's own documents go over the general ones, and within each the template's part over the rest; documents
    of the same kind in the order of their ids. A floor only ever rises, as do minima of security; lists of callers
    and secrets only ever shrink.
    """
    applying = sorted(
        (document for document in documents if not document.tenants or tenant in document.tenants),
        key=lambda document: (bool(document.tenants), document.id),
    )
    found: dict[str, Any] = {}
    network: dict[str, Any] = {}
    security = SecurityPolicy()
    for document in applying:
        resources, enforcement = document.resources, document.enforcement
        _put(found, "memory_bytes", resources.max_memory_mb, lambda value: value * _MIB)
        _put(found, "cpu_milli", resources.max_cpu_cores, lambda value: round(value * 1000))
        _put(found, "disk_bytes", resources.max_disk_mb, lambda value: value * _MIB)
        _put(found, "pids", resources.max_pids)
        _put(found, "duration_s", resources.max_duration, parse_duration)
        _put(found, "default_timeout_s", resources.default_timeout, parse_duration)
        _put(found, "tenant_instances", resources.max_instances)
        _put(found, "tenant_cpu_milli", resources.max_total_cpu_cores, lambda value: round(value * 1000))
        _put(found, "tenant_memory_bytes", resources.max_total_memory_mb, lambda value: value * _MIB)
        _put(found, "launches_per_minute", resources.max_launches_per_minute)
        _put(found, "on_timeout", enforcement.on_timeout)
        _put(found, "on_resources", enforcement.on_resource_violation)
        _put(found, "on_network", enforcement.on_network_violation)
        _put(found, "on_syscall", enforcement.on_syscall_violation)
        _put(found, "output_bytes", enforcement.max_output, parse_size)
        _put(found, "cpu_time_s", enforcement.max_cpu_time, parse_duration)
        _put(found, "quarantine_when", enforcement.quarantine_when, _windows)
        network |= {
            name: value for name, value in msgspec.structs.asdict(document.network).items() if value is not None
        }
        security = stricter(security, document.security)
        _raise_floor(found, document.isolation)
        _shrink(found, "secrets", document.secrets.allowed)
        for part in document.templates:
            if part.id == template:
                _put(found, "instances", part.max_instances)
                _put(found, "default_timeout_s", part.default_timeout, parse_duration)
                _raise_floor(found, part.isolation)
                _shrink(found, "callers", part.allowed_callers)
    return Limits(
        **found, network=NetworkPolicy(**network), security=security,
        documents=tuple(document.id for document in applying),
    )  # fmt: skip


def stricter(one: SecurityPolicy, other: SecurityPolicy) -> SecurityPolicy:
    """What both demand: a minimum only ever rises, and a list of what is allowed only ever shrinks."""
    lists = {
        name: second if first is None else first if second is None else tuple(x for x in first if x in second)
        for name in ("seccomp_profiles", "allowed_capabilities")
        for first, second in [(getattr(one, name), getattr(other, name))]
    }
    lockdown, action = one.kernel_lockdown, one.seccomp_default
    return SecurityPolicy(
        hardened_kernel=one.hardened_kernel or other.hardened_kernel,
        user_namespace=one.user_namespace or other.user_namespace,
        kernel_lockdown=lockdown if at_least_lockdown(lockdown, other.kernel_lockdown) else other.kernel_lockdown,
        seccomp_default=action if at_least_action(action, other.seccomp_default) else other.seccomp_default,
        drop_capabilities=tuple(dict.fromkeys((*one.drop_capabilities, *other.drop_capabilities))),
        **lists,
    )


def _windows(written: tuple[WindowPolicy, ...]) -> tuple[WindowRule, ...]:
    return tuple(WindowRule(each.violation, each.count, parse_duration(each.within)) for each in written)


_ORDER = (Isolation.AUTO, Isolation.PROCESS, Isolation.CONTAINER, Isolation.GVISOR, Isolation.MICROVM)


def _raise_floor(found: dict[str, Any], floor: Isolation | None) -> None:
    if floor in _ORDER and _ORDER.index(floor) > _ORDER.index(found.get("floor", Isolation.AUTO)):
        found["floor"] = floor


def _shrink(found: dict[str, Any], name: str, allowed: tuple[str, ...] | None) -> None:
    if allowed is not None:
        before = found.get(name)
        found[name] = tuple(one for one in allowed if before is None or one in before)


def _put(found: dict[str, Any], name: str, value: Any, convert: Any = None) -> None:
    if value is not None:
        found[name] = value if convert is None else convert(value)
