"""One module per resource; each lists its handlers in `ROUTES`."""

from __future__ import annotations

from tartarus.control.routes import code, files, logs, sandboxes, streams, system

ROUTES = [*system.ROUTES, *sandboxes.ROUTES, *logs.ROUTES, *code.ROUTES, *files.ROUTES, *streams.ROUTES]
