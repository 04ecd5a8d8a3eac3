"""A file of secrets that is encrypted with age: to an identity (a key in a file), or by a passphrase.

Encryption is pyrage's, the age format's Rust implementation. A change is whole or not at all: it is made on a copy
beside the file, under a lock that dies with its holder.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pyrage

from tartarus.model.errors import InvalidRequest, SecretNotFound, SecretUnavailable
from tartarus.model.secrets import MAX_SECRET_BYTES, check_secret_name
from tartarus.secrets.files import read_private, wipe, write_private

MAX_VAULT_BYTES = 16 * 1024**2
_MAX_KEY_BYTES = 64 * 1024


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One secret: its value in base64, when it was set (Unix seconds) and how often."""

    value: str
    changed_at: float
    revision: int = 1


class _Contents(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    values: dict[str, Entry] = {}
    version: int = 1


class IdentityKey:
    """age identities in a file, as ``age-keygen`` writes them; the first is what is encrypted to."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def create(self) -> None:
        """Make the file with a new identity. Raises InvalidRequest when there is one."""
        write_private(self._path, _key_text(pyrage.x25519.Identity.generate()), exclusive=True)

    def encrypt(self, content: bytes) -> bytes:
        """For the first identity."""
        return bytes(pyrage.encrypt(content, [self._identities()[0].to_public()]))

    def decrypt(self, content: bytes) -> bytes:
        """With whichever fits."""
        return bytes(pyrage.decrypt(content, self._identities()))

    @contextlib.contextmanager
    def renewed(self) -> Iterator[IdentityKey]:
        """Within, what is encrypted is for a new identity, and both decrypt; afterwards only the new one is left.

        Whenever this is interrupted, the file still opens the vault, whichever of the two it was encrypted to.
        """
        old = self._identities()
        new = pyrage.x25519.Identity.generate()
        write_private(self._path, _key_text(new, *old))
        yield self
        write_private(self._path, _key_text(new))

    def _identities(self) -> list[pyrage.x25519.Identity]:
        content = read_private(self._path, _MAX_KEY_BYTES)
        try:
            lines = [line for line in content.decode("ascii", "replace").split() if line.startswith("AGE-SECRET-KEY-1")]
            found = [pyrage.x25519.Identity.from_str(line) for line in lines]
        except pyrage.IdentityError:
            found = []
        finally:
            wipe(content)
        if not found:
            raise SecretUnavailable(f"{self._path} has no age identity", fix="give the file that age-keygen wrote")
        return found


class PassphraseKey:
    """A passphrase; `renewal` is the one that `renewed` changes it to."""

    def __init__(self, passphrase: str, renewal: str = "") -> None:
        self._passphrase = passphrase
        self._renewal = renewal

    @classmethod
    def in_file(cls, path: Path, renewal: str = "") -> PassphraseKey:
        """The first line of a private file. Raises SecretUnavailable."""
        content = read_private(path, _MAX_KEY_BYTES)
        try:
            lines = content.decode("utf-8", "surrogateescape").splitlines()
        finally:
            wipe(content)
        if not lines or not lines[0]:
            raise SecretUnavailable(f"{path} has no passphrase", fix="put it in its first line")
        return cls(lines[0], renewal)

    def create(self) -> None:
        """Nothing is to be made."""

    def encrypt(self, content: bytes) -> bytes:
        """With a key derived from it."""
        return bytes(pyrage.passphrase.encrypt(content, self._passphrase))

    def decrypt(self, content: bytes) -> bytes:
        """With a key derived from it."""
        return bytes(pyrage.passphrase.decrypt(content, self._passphrase))

    @contextlib.contextmanager
    def renewed(self) -> Iterator[PassphraseKey]:
        """Within, what is encrypted is for the new one."""
        yield PassphraseKey(self._renewal)


Key = IdentityKey | PassphraseKey


class Vault:
    """One vault. Raises SecretUnavailable for a file that others could touch or that the key does not open."""

    def __init__(self, path: Path, key: Key) -> None:
        self._path = path
        self._key = key

    def create(self) -> None:
        """An empty vault, and its key where that is a file. Raises InvalidRequest when there is one."""
        if self._path.exists():
            raise InvalidRequest(f"{self._path} is there already", fix="use it, or choose another path")
        self._key.create()
        self._write(_Contents(), self._key, exclusive=True)

    def names(self) -> dict[str, Entry]:
        """Every secret's facts, by name, without its value."""
        return {name: msgspec.structs.replace(entry, value="") for name, entry in sorted(self._read().values.items())}

    def get(self, name: str) -> bytes:
        """A value. Raises SecretNotFound."""
        found = self._read().values.get(name)
        if found is None:
            raise SecretNotFound(f"the vault has no secret {name!r}", fix="tartarus secret list shows its names")
        return base64.b64decode(found.value)

    def set(self, name: str, value: bytes) -> int:
        """Put a value, over an older one; returns its revision. Raises InvalidRequest."""
        check_secret_name(name)
        if not 0 < len(value) <= MAX_SECRET_BYTES:
            raise InvalidRequest(f"the value has {len(value)} bytes", fix=f"give 1 to {MAX_SECRET_BYTES}")
        revision = 0

        def put(values: dict[str, Entry]) -> None:
            nonlocal revision
            revision = values[name].revision + 1 if name in values else 1
            values[name] = Entry(base64.b64encode(value).decode(), round(time.time(), 3), revision)

        self._change(put)
        return revision

    def remove(self, name: str) -> None:
        """Forget a secret. Raises SecretNotFound."""

        def take(values: dict[str, Entry]) -> None:
            if values.pop(name, None) is None:
                raise SecretNotFound(f"the vault has no secret {name!r}", fix="tartarus secret list shows its names")

        self._change(take)

    def rotate(self) -> None:
        """Encrypt everything anew with a new key."""
        with self._locked():
            contents = self._read()
            with self._key.renewed() as key:
                self._write(contents, key)

    def _change(self, change: Callable[[dict[str, Entry]], None]) -> None:
        with self._locked():
            values = dict(self._read().values)
            change(values)
            self._write(_Contents(values), self._key)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            fd = os.open(f"{self._path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise SecretUnavailable(f"{self._path} can't be changed", why=error.strerror or "") from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def _read(self) -> _Contents:
        if not self._path.exists():
            raise SecretUnavailable(f"there is no vault at {self._path}", fix="make one: tartarus secret create")
        encrypted = bytes(read_private(self._path, MAX_VAULT_BYTES))
        try:
            return msgspec.json.decode(self._key.decrypt(encrypted), type=_Contents)
        except pyrage.DecryptError as error:
            raise SecretUnavailable(
                f"{self._path} can't be opened", why=str(error)[:200], fix="give its identity file or passphrase"
            ) from None
        except msgspec.MsgspecError:
            raise SecretUnavailable(f"{self._path} is no vault of ours", fix="give the right file") from None

    def _write(self, contents: _Contents, key: Key, *, exclusive: bool = False) -> None:
        encrypted = key.encrypt(msgspec.json.encode(contents))
        if len(encrypted) > MAX_VAULT_BYTES:
            raise InvalidRequest("the vault would be too large", fix=f"use at most {MAX_VAULT_BYTES} bytes in all")
        write_private(self._path, encrypted, exclusive=exclusive)


def _key_text(*identities: pyrage.x25519.Identity) -> bytes:
    return "".join(f"# public key: {one.to_public()}\n{one}\n" for one in identities).encode()
