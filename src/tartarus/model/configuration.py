"""The configuration file, ``config.yaml``: what an administrator may set of a daemon."""

from __future__ import annotations

import ipaddress
import operator
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import msgspec

from tartarus.model.buckets import SCHEME, Bucket
from tartarus.model.errors import InvalidRequest
from tartarus.model.sandbox import Isolation
from tartarus.model.secrets import SecretGrant, SecretProvider, SecretsSection, wrong_with
from tartarus.model.settings import MicrovmMonitor, Settings
from tartarus.model.structured_yaml import StructReader
from tartarus.model.units import format_size, parse_duration, parse_size

MOST_LOG_FILES = 1000
MOST_SLOTS = 4096


class IsolationSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`floor`: the weakest level that any sandbox of this host may have; `auto` sets none."""

    floor: Isolation = Isolation.AUTO


class GvisorSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`platform`: what gVisor catches its guests' calls with; `auto` is KVM where a guest was seen to run on it."""

    platform: Literal["systrap", "kvm", "auto"] = "systrap"


class LogSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The daemon's own log: at most so many `files` of such a `size` each."""

    size: str | int = "10MiB"
    files: int = 3


class MicrovmSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`monitor`: the virtual machine monitor; `auto` takes the first that is installed and boots a machine.

    `jailer`: Firecracker is started by its official jailer instead of by Tartarus.
    """

    monitor: MicrovmMonitor = MicrovmMonitor.AUTO
    jailer: bool = False


class AuditSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How long (`kept`) and how much (`size`) of the audit log is kept; `witness`: where its checkpoints go besides."""

    kept: str | int = "90d"
    size: str | int = "1GiB"
    witness: str = ""


class NetworkSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`name_servers`: whom sandboxes' questions go to; none: the host's own. `slots`: sandboxes with a network at once.

    `ranges`: private networks that their addresses may come from; none: those that docs/network.md names.
    """

    name_servers: tuple[str, ...] = ()
    slots: int = 512
    ranges: tuple[str, ...] = ()


class Configuration(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All of the file. Sizes as in ``512MiB``, durations as in ``10m``; what is left out has its default."""

    node_name: str = "local"
    ended_kept: str | int = "7d"
    lamentations_kept: str | int = "30d"
    quarantine_kept: str | int = "90d"
    upload: str | int = "16GiB"
    stop_grace: str | int = "10s"
    memory_budget: str | int = "64GiB"
    EnableHypnos: bool = True
    audit: AuditSection = AuditSection()
    log: LogSection = LogSection()
    isolation: IsolationSection = IsolationSection()
    microvm: MicrovmSection = MicrovmSection()
    gvisor: GvisorSection = GvisorSection()
    network: NetworkSection = NetworkSection()
    secrets: SecretsSection = SecretsSection()


class Key(NamedTuple):
    """One key of the file: the field of `Settings` that it sets, how its text is read, and how a value is written."""

    field: str
    read: Callable[[Any], Any]
    write: Callable[[Any], str]


def _name(text: str) -> str:
    if not text.strip():
        raise InvalidRequest("it is empty", fix="give a name, or leave it out")
    return text


def _files(count: int) -> int:
    if not 1 <= count <= MOST_LOG_FILES:
        raise InvalidRequest(f"{count} is out of range", fix=f"use 1 to {MOST_LOG_FILES}")
    return count


def _floor(level: Isolation) -> Isolation:
    if level is Isolation.WASM:
        raise InvalidRequest("wasm is for modules, and no floor", fix="use container: its walls hold modules, too")
    return level


def _above_zero(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def checked(text: Any) -> Any:
        value = read(text)
        if not value:
            raise InvalidRequest("it is nothing", fix="use more than 0")
        return value

    return checked


def _witness(text: str) -> str:
    if not text or text == "syslog" or text.startswith(("/", "https://")):
        return text
    if text.startswith(SCHEME):
        Bucket.parse(text)
        return text
    raise InvalidRequest(
        f"{text!r} is no place for checkpoints",
        fix="use an absolute path, an https:// or s3:// address, or syslog",
    )


def _names(named: Sequence[SecretProvider | SecretGrant]) -> str:
    return ", ".join(one.name for one in named) or "none"


def _seconds(value: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if value >= length and not value % length:
            return f"{value / length:g}{unit}"
    return f"{value:g}s"


def _servers(texts: tuple[str, ...]) -> tuple[str, ...]:
    for text in texts:
        try:
            ipaddress.ip_address(text)
        except ValueError as error:
            raise InvalidRequest(str(error), fix="give addresses, as in 192.0.2.53") from None
    return texts


def _ranges(texts: tuple[str, ...]) -> tuple[str, ...]:
    for text in texts:
        try:
            ipaddress.IPv4Network(text)
        except ValueError as error:
            raise InvalidRequest(str(error), fix="give private networks, as in 10.201.0.0/16") from None
    return texts


def _slots(count: int) -> int:
    if not 1 <= count <= MOST_SLOTS:
        raise InvalidRequest(f"{count} is out of range", fix=f"use 1 to {MOST_SLOTS}")
    return count


KEYS: dict[str, Key] = {
    "node_name": Key("node_name", _name, str),
    "ended_kept": Key("ended_kept_s", parse_duration, _seconds),
    "lamentations_kept": Key("lamentations_kept_s", parse_duration, _seconds),
    "quarantine_kept": Key("quarantine_kept_s", parse_duration, _seconds),
    "upload": Key("upload_bytes", parse_size, format_size),
    "stop_grace": Key("stop_grace_s", parse_duration, _seconds),
    "memory_budget": Key("memory_budget_bytes", parse_size, format_size),
    "EnableHypnos": Key("enable_hypnos", bool, lambda value: "true" if value else "false"),
    "log.size": Key("log_bytes", parse_size, format_size),
    "log.files": Key("log_files", _files, str),
    "microvm.monitor": Key("microvm_monitor", lambda monitor: monitor, lambda monitor: str(monitor.value)),
    "gvisor.platform": Key("gvisor_platform", str, str),
    "microvm.jailer": Key("microvm_jailer", bool, lambda on: "true" if on else "false"),
    "audit.kept": Key("audit_kept_s", _above_zero(parse_duration), _seconds),
    "audit.size": Key("audit_bytes", _above_zero(parse_size), format_size),
    "audit.witness": Key("audit_witness", _witness, str),
    "network.name_servers": Key("network_name_servers", _servers, ", ".join),
    "network.slots": Key("network_slots", _slots, str),
    "network.ranges": Key("network_ranges", _ranges, ", ".join),
    "secrets.providers": Key("secret_providers", tuple, _names),
    "secrets.allow": Key("secret_grants", tuple, _names),
    "isolation.floor": Key("isolation_floor", _floor, lambda level: str(level.value)),
}
"""Every key, by the path that it has in the file."""


def configured(settings: Settings, text: bytes | str, source: str = "config.yaml") -> Settings:
    """`settings` with what the file says. An empty file says nothing.

    Raises InvalidRequest with the line for an unknown key, a wrong type, or a value that is none; nothing of the file
    is in force then.
    """
    if not text.strip():
        return settings
    reader = StructReader(source, Configuration, see="see docs/configuration.md for every key", holds="a configuration")
    file = reader.read(text)
    changes = {}
    for path, key in KEYS.items():
        value = operator.attrgetter(path)(file)
        if not reader.line(path):
            continue  # left out: what `settings` has stands
        try:
            changes[key.field] = key.read(value)
        except InvalidRequest as error:
            raise reader.refused(path, f"{path}: {error.what}", why=error.why, fix=error.fix) from None
    for place, what, fix in wrong_with(file.secrets):
        raise reader.refused(f"secrets.{place}", f"secrets.{place}: {what}", fix=fix)
    return msgspec.structs.replace(settings, **changes)


def in_force(settings: Settings) -> dict[str, str]:
    """Each key with the value that `settings` have, written as in the file."""
    return {path: key.write(getattr(settings, key.field)) for path, key in KEYS.items()}
