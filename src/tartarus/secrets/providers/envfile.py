"""Values in a file of NAME=value lines, which only its owner may touch."""

from __future__ import annotations

from pathlib import Path

from tartarus.model.errors import InvalidRequest, SecretUnavailable
from tartarus.model.secrets import Reference
from tartarus.secrets.files import read_private, wipe
from tartarus.secrets.providers import take

MAX_FILE_BYTES = 1024**2


class EnvFile:
    """Reads the file anew each time, so that a change is seen. A value is the rest of its line, as it stands there."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @classmethod
    def made(cls, options: dict[str, str]) -> EnvFile:
        """From the option `path`. Raises InvalidRequest."""
        (path,) = take(options, "path")
        return cls(absolute(path))

    def fetch(self, reference: Reference) -> bytes:
        """The value of the variable that `reference` names. Raises SecretUnavailable."""
        if reference.field:
            raise SecretUnavailable("values of an env-file have no fields", fix="leave the part after # out")
        content = read_private(self._path, MAX_FILE_BYTES)
        try:
            found = _value(content, reference.path.encode())
        finally:
            wipe(content)
        if found is None:
            raise SecretUnavailable(f"{self._path} has no {reference.path}", fix=f"add a line {reference.path}=…")
        return found


def _value(content: bytearray, name: bytes) -> bytes | None:
    """The last line counts, as in a shell."""
    found = None
    for line in content.splitlines():
        key, equals, value = line.removeprefix(b"export ").partition(b"=")
        if equals and key == name and not line.startswith(b"#"):
            found = bytes(value)
    return found


def absolute(text: str) -> Path:
    """A path of the configuration. Raises InvalidRequest."""
    if not text.startswith("/"):
        raise InvalidRequest(f"{text!r} is not an absolute path", fix="begin it with /")
    return Path(text)
