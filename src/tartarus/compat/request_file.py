"""A request as a file: written whole or not at all, for its owner alone, and read back strictly."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import msgspec

from tartarus.model.errors import FileFailed, MigrationRefused
from tartarus.model.sandbox import SandboxSpec

_YAML = (".yaml", ".yml")


def check_free(path: str, *, replace: bool) -> None:
    """Refuse a place that is taken, or that can't be written. Raises MigrationRefused and FileFailed."""
    directory = os.path.dirname(os.path.abspath(path))
    if os.path.lexists(path) and not replace:
        raise MigrationRefused(f"{path} is there already", fix="give another place with --output, or --replace")
    if os.path.isdir(path) or not os.access(directory, os.W_OK):
        raise FileFailed(f"can't write {path}", fix="give another place with --output")


def encode(request: SandboxSpec, path: str = "") -> bytes:
    """As YAML or, for any other ending, as JSON; without what is not set."""
    document = _set(request)
    if path.endswith(_YAML):
        return msgspec.yaml.encode(document)
    return msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n"


def _set(value: msgspec.Struct) -> dict[str, Any]:
    """The fields that are not what they are by default."""
    document = {}
    for field in msgspec.structs.fields(value):
        found = getattr(value, field.name)
        default = field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
        if found != default:
            document[field.name] = _set(found) if isinstance(found, msgspec.Struct) else found
    return document


def write(request: SandboxSpec, path: str) -> None:
    """Put it there in one step, in the place of what is there. Raises FileFailed.

    Until it is whole it has no name, so that a kill leaves nothing of it.
    """
    path = os.path.abspath(path)
    directory, name = os.path.split(path)
    try:
        fd = os.open(directory, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(encode(request, path))
            file.flush()
            os.fsync(fd)
            try:
                _link(fd, path)
            except FileExistsError:
                # Always the same name: should we be killed just here, the next one takes it away.
                between = os.path.join(directory, f".{name}.new")
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(between)
                _link(fd, between)
                os.replace(between, path)
    except OSError as error:
        raise FileFailed(f"can't write {path}", why=error.strerror or str(error)) from error


def _link(fd: int, path: str) -> None:
    # With a directory's descriptor, since only then the link of /proc is followed.
    directory = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.link(f"/proc/self/fd/{fd}", os.path.basename(path), dst_dir_fd=directory, follow_symlinks=True)
    finally:
        os.close(directory)
