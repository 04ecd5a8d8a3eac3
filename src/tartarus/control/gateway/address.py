"""What a path such as ``/v1/sandboxes/ID/ports/8000/a/b?c`` asks of which port."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import unquote

from tartarus.model.errors import InvalidRequest

_TARGET = re.compile(rb"[!-~]*")
_PARTS = 6
_MAX_PORT = 65535


class Address(NamedTuple):
    """`target` is what the guest is asked for, as the caller wrote it; `prefix` is what stood before it."""

    port: int
    prefix: str
    target: str

    @property
    def host(self) -> str:
        """What the guest is at its own loopback."""
        return f"localhost:{self.port}"

    @property
    def path(self) -> str:
        """The target without its query."""
        return self.target.partition("?")[0]

    @classmethod
    def of(cls, scope: Mapping[str, Any], sandbox: str, port: int) -> Address:
        """Read from the path as it was sent, since decoding would change it. Raises InvalidRequest.

        `sandbox` and `port` are what the router found in the decoded path; a path of which both readings differ is
        refused.
        """
        raw, query = bytes(scope["raw_path"]), bytes(scope["query_string"])
        if not 0 < port <= _MAX_PORT:
            raise InvalidRequest(f"{port} is no port", fix="ports are 1 to 65535")
        parts = raw.partition(b"?")[0].split(b"/", _PARTS)
        read = [unquote(part.decode("latin-1")) for part in parts[1:_PARTS]]
        if not (_TARGET.fullmatch(raw) and _TARGET.fullmatch(query)) or read != [
            "v1", "sandboxes", sandbox, "ports", str(port)
        ]:  # fmt: skip
            raise InvalidRequest("the path is not one of a port", fix="/v1/sandboxes/ID/ports/PORT/…, in plain ASCII")
        rest = b"/" + (parts[_PARTS] if len(parts) > _PARTS else b"")
        target = rest + (b"?" + query if query else b"")
        return cls(port, b"/".join(parts[:_PARTS]).decode("ascii"), target.decode("ascii"))
