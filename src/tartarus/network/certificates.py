"""The host's trusted certificates, for sandboxes whose network needs them (a proxy with an authority of its own)."""

from __future__ import annotations

import re
import ssl
from collections.abc import Mapping
from pathlib import Path

_MAX_BYTES = 4 * 1024**2
# Debian and Alpine; Fedora and its kin; SUSE; the rest.
_PLACES = (
    "/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/ca-bundle.pem",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem", "/etc/ssl/cert.pem",
)  # fmt: skip
_CERTIFICATE = re.compile(rb"-----BEGIN CERTIFICATE-----\s[A-Za-z0-9+/=\s]+-----END CERTIFICATE-----")


def ca_bundle(environ: Mapping[str, str]) -> bytes | None:
    """The host's bundle in PEM: certificates only, whatever else is in its file; None if the host has none.

    The file that ``SSL_CERT_FILE`` in `environ` names, or else where distributions keep it. One above 4 MiB, or with
    something in it that is not a certificate where one should be, is passed over.
    """
    named = environ.get("SSL_CERT_FILE", "")
    for place in ([named] if named else []) + list(_PLACES):
        bundle = _certificates(Path(place))
        if bundle is not None:
            return bundle
    return None


def _certificates(path: Path) -> bytes | None:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError:
        return None
    found = b"\n".join(_CERTIFICATE.findall(data))
    if not found or len(data) > _MAX_BYTES:
        return None
    try:
        ssl.create_default_context(cadata=found.decode("ascii"))
    except ssl.SSLError:
        return None
    return found + b"\n"
