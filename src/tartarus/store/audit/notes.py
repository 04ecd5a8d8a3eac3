"""Signed checkpoints: the size and root of the log, signed with Ed25519, in the format of C2SP's signed notes.

Formats: c2sp.org/signed-note and c2sp.org/tlog-checkpoint.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from pathlib import Path

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from tartarus.durable import sync_directory, write_whole

_ED25519 = b"\1"
_KEY_BYTES = 32
_ID_BYTES = 4
_LINES = 6
_MAX_SIZE = 2**63


class Checkpoint(msgspec.Struct, frozen=True):
    """How far a log had come: its name, the number of entries, and the root of the tree over them."""

    origin: str
    size: int
    root: bytes

    def text(self) -> bytes:
        """What is signed."""
        return f"{self.origin}\n{self.size}\n{base64.b64encode(self.root).decode()}\n".encode()


class Verifier:
    """Knows a log's public key. `text` is its key as notes write it: ``name+id+key``."""

    def __init__(self, text: str) -> None:
        """Raises ValueError for what is no such key."""
        try:
            self.name, key_id, encoded = text.strip().split("+", 2)
            raw = base64.b64decode(encoded, validate=True)
        except (ValueError, binascii.Error) as error:
            raise ValueError(f"not a verifier key: {text[:80]!r}") from error
        if len(raw) != _KEY_BYTES + 1 or raw[:1] != _ED25519:
            raise ValueError("not an Ed25519 verifier key")
        self._id = _key_id(self.name, raw[1:])
        if self._id.hex() != key_id:
            raise ValueError("the verifier key's id is not its key's")
        self._key = Ed25519PublicKey.from_public_bytes(raw[1:])

    def open(self, note: bytes) -> Checkpoint:
        """The checkpoint of a note that this log signed. Raises ValueError."""
        text, blank, signatures = note.partition(b"\n\n")
        text += b"\n"
        if not blank or not any(
            self._signed(text, line) for line in signatures.decode("utf-8", "replace").splitlines()
        ):
            raise ValueError(f"no signature of {self.name} on the checkpoint")
        lines = text.decode("utf-8", "replace").splitlines()
        if not 3 <= len(lines) <= _LINES or lines[0] != self.name or not lines[1].isascii() or not lines[1].isdigit():
            raise ValueError("not a checkpoint of this log")
        size, root = int(lines[1]), base64.b64decode(lines[2], validate=True)
        if size >= _MAX_SIZE or len(root) != hashlib.sha256().digest_size:
            raise ValueError("not a checkpoint")
        return Checkpoint(lines[0], size, root)

    def _signed(self, text: bytes, line: str) -> bool:
        dash, _, rest = line.partition(" ")
        name, _, encoded = rest.partition(" ")
        if dash != "—" or name != self.name:
            return False
        try:
            raw = base64.b64decode(encoded, validate=True)
            if raw[:_ID_BYTES] != self._id:
                return False
            self._key.verify(raw[_ID_BYTES:], text)
        except (InvalidSignature, binascii.Error, ValueError):
            return False
        return True


class Signer:
    """Holds a log's private key. `name` is the log's origin."""

    def __init__(self, name: str, key: Ed25519PrivateKey) -> None:
        self.name = name
        self._key = key
        raw = key.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
        self._id = _key_id(name, raw)
        self.verifier_text = f"{name}+{self._id.hex()}+{base64.b64encode(_ED25519 + raw).decode()}"

    @classmethod
    def at(cls, place: Path, name: str) -> Signer:
        """The key that lies there; a new one is made if there is none. Raises OSError, and ValueError for no key."""
        try:
            content = place.read_bytes()
        except FileNotFoundError:
            key = Ed25519PrivateKey.generate()
            content = key.private_bytes(
                serialization.Encoding.Raw, serialization.PrivateFormat.Raw, serialization.NoEncryption()
            )
            write_whole(place, content)
            sync_directory(place.parent)
        if len(content) != _KEY_BYTES:
            raise ValueError(f"{place} holds no key")
        return cls(name, Ed25519PrivateKey.from_private_bytes(content))

    def sign(self, checkpoint: Checkpoint) -> bytes:
        """The signed note."""
        text = checkpoint.text()
        signature = base64.b64encode(self._id + self._key.sign(text)).decode()
        return text + f"\n— {self.name} {signature}\n".encode()


def _key_id(name: str, key: bytes) -> bytes:
    return hashlib.sha256(name.encode() + b"\n" + _ED25519 + key).digest()[:_ID_BYTES]
