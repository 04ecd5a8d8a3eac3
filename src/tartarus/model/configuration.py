"""The configuration file, ``config.yaml``: what an administrator may set of a daemon."""

from __future__ import annotations

from typing import Any

import msgspec

from tartarus.model.errors import InvalidRequest
from tartarus.model.sandbox import Isolation
from tartarus.model.settings import Settings
from tartarus.model.structured_yaml import StructReader
from tartarus.model.units import parse_duration, parse_size


class IsolationSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`floor`: the weakest level that any sandbox of this host may have; `auto` sets none."""

    floor: Isolation = Isolation.AUTO


class LogSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The daemon's own log: at most so many `files` of such a `size` each."""

    size: str | int = "10MiB"
    files: int = 3


class Configuration(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All of the file. Sizes as in ``512MiB``, durations as in ``10m``; what is left out has its default."""

    node_name: str = "local"
    ended_kept: str | int = "7d"
    upload: str | int = "16GiB"
    stop_grace: str | int = "10s"
    log: LogSection = LogSection()
    isolation: IsolationSection = IsolationSection()


def configured(settings: Settings, text: bytes | str, source: str = "config.yaml") -> Settings:
    """`settings` with what the file says. An empty file says nothing.

    Raises InvalidRequest with the line for an unknown key, a wrong type, or a value that is none; nothing of the file
    is in force then.
    """
    if not text.strip():
        return settings
    reader = StructReader(source, Configuration, see="see docs/configuration.md for every key", holds="a configuration")
    found = reader.read(text)

    def read(place: str, parse: Any, value: object) -> Any:
        try:
            return parse(value)
        except InvalidRequest as error:
            raise reader.refused(place, f"{place}: {error.what}", why=error.why, fix=error.fix) from None

    if not found.node_name.strip():
        raise reader.refused("node_name", "node_name is empty", fix="give a name, or leave it out")
    if not 1 <= found.log.files <= 1000:
        raise reader.refused("log.files", "log.files is out of range", fix="use 1 to 1000")
    return msgspec.structs.replace(
        settings,
        node_name=found.node_name,
        ended_kept_s=read("ended_kept", parse_duration, found.ended_kept),
        upload_bytes=read("upload", parse_size, found.upload),
        stop_grace_s=read("stop_grace", parse_duration, found.stop_grace),
        log_bytes=read("log.size", parse_size, found.log.size),
        log_files=found.log.files,
        isolation_floor=found.isolation.floor,
    )
