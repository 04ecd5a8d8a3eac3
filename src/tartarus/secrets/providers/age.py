"""Values in a vault of our own (`tartarus secret`), opened by an identity file.

Not by a passphrase: whoever could read its file could read an identity as well, and each opening would take the second
and the GiB of memory that age makes of guessing one.
"""

from __future__ import annotations

from tartarus.model.errors import SecretNotFound, SecretUnavailable
from tartarus.model.secrets import Reference
from tartarus.secrets.providers import take
from tartarus.secrets.providers.envfile import absolute
from tartarus.secrets.vault import IdentityKey, Vault


class AgeVault:
    """Opens the vault anew each time, and its key with it: neither is kept in memory."""

    def __init__(self, options: dict[str, str]) -> None:
        path, identity = take(options, "path", "identity_file")
        self._vault = Vault(absolute(path), IdentityKey(absolute(identity)))

    def fetch(self, reference: Reference) -> bytes:
        """The value of that name. Raises SecretUnavailable."""
        if reference.field:
            raise SecretUnavailable("values of a vault have no fields", fix="leave the part after # out")
        try:
            return self._vault.get(reference.path)
        except SecretNotFound as error:
            raise SecretUnavailable(error.what, fix=error.fix) from None
