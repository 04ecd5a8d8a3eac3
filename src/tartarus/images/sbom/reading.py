"""Reading records that the image wrote: bounded in bytes, number and form, and no failure passed over in silence."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from tartarus.images.sbom.nouns import Package
from tartarus.images.stackview import StackView
from tartarus.model.errors import ImageRefused

_MAX_GAPS = 100
_MAX_WORD = 256  # a name or a version; PyPI's longest name has 80 characters, Debian's 60
_MAX_PATH = 4096


class Limits(msgspec.Struct, frozen=True):
    """How much of an image is read.

    `database` bytes of a package manager's file, `record` bytes of one package's own, `total` bytes and `packages`
    in all, and `entries` names in the tree. For scale: a status file with 800 packages has 1 MB, and a METADATA
    file holds a whole README.
    """

    database: int = 128 * 1024 * 1024
    record: int = 4 * 1024 * 1024
    total: int = 1024 * 1024 * 1024
    packages: int = 200_000
    entries: int = 2_000_000


class Reader:
    """Reads files of one view within `limits`, collects packages, and remembers what could not be read."""

    def __init__(self, view: StackView, limits: Limits) -> None:
        self.view = view
        self.limits = limits
        self.gaps: list[str] = []
        self._read = 0
        self._found: dict[Package, list[str]] = {}

    def database(self, path: str) -> bytes | None:
        """A package manager's file; None when there is none, or it can't be read (which is a gap)."""
        return self._bytes(path, self.limits.database)

    def record(self, path: str) -> bytes | None:
        """One package's own file; None as above."""
        return self._bytes(path, self.limits.record)

    def names(self, path: str) -> list[str]:
        """The names in a directory, none when there is no such; one that can't be listed is a gap."""
        try:
            return self.view.listdir(path)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            self.gap(path, error.strerror or str(error))
            return []

    def add(self, package: Package, path: str) -> None:
        """Take a package that is recorded at `path`; one whose name or version is none becomes a gap.

        Raises ImageRefused when there are too many.
        """
        for word, what in ((package.name, "name"), (package.version, "version")):
            if not is_word(word):
                self.gap(path, f"{word[:40]!r} is no package {what}")
                return
        self._found.setdefault(package, []).append(shown(path))
        if len(self._found) > self.limits.packages:
            raise ImageRefused(f"the image has more than {self.limits.packages} packages")

    def gap(self, path: str, why: str) -> None:
        """Remember that something at `path` was not read."""
        if len(self.gaps) < _MAX_GAPS:
            self.gaps.append(f"{shown(path)}: {why}")
        elif len(self.gaps) == _MAX_GAPS:
            self.gaps.append("and more")

    def packages(self) -> tuple[Package, ...]:
        """All packages, sorted, each once with every path that records it."""
        return tuple(
            sorted(
                msgspec.structs.replace(package, paths=tuple(sorted(set(paths))))
                for package, paths in self._found.items()
            )
        )

    def _bytes(self, path: str, limit: int) -> bytes | None:
        if self._read > self.limits.total:
            raise ImageRefused(f"the image's package records are more than {self.limits.total} bytes")
        try:
            content = self.view.read(path, limit)
        except FileNotFoundError:
            return None
        except OSError as error:
            self.gap(path, error.strerror or str(error))
            return None
        self._read += len(content)
        return content


def pieces(content: bytes, separator: bytes) -> Iterator[bytes]:
    """As ``content.split(separator)``, one at a time: their list could be many times as large."""
    start = 0
    while (end := content.find(separator, start)) >= 0:
        yield content[start:end]
        start = end + len(separator)
    yield content[start:]


def stanzas(content: bytes, wanted: frozenset[str]) -> Iterator[dict[str, str]]:
    """The paragraphs of a file in Debian's control format, or one like it, with the wanted fields only.

    Of a field that is there twice the first counts; folded lines are not needed for any field we want.
    """
    for paragraph in pieces(content.replace(b"\r\n", b"\n"), b"\n\n"):
        fields: dict[str, str] = {}
        for line in pieces(paragraph, b"\n"):
            name, colon, value = line.partition(b":")
            if not colon or len(name) > 40 or name[:1] in {b" ", b"\t"}:
                continue
            key = name.decode("ascii", "replace")
            if key in wanted:
                fields.setdefault(key, value[:4096].decode("utf-8", "replace").strip())
        if fields:
            yield fields


def is_word(text: str) -> bool:
    """Whether it can be a name or a version: short, and nothing in it that a terminal or a table would stumble over."""
    return 0 < len(text) <= _MAX_WORD and text.isprintable() and " " not in text


def shown(path: str) -> str:
    """A path as text that can go anywhere: odd bytes and control characters as escapes."""
    if path.isascii() and path.isprintable():
        return path[:_MAX_PATH]
    encoded = path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in encoded)[:_MAX_PATH]


def one_line(text: str, limit: int = 200) -> str:
    """Foreign prose as one printable line."""
    return "".join(c if c.isprintable() else " " for c in text[: 4 * limit]).strip()[:limit]
