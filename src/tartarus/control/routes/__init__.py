"""One module per resource; each lists its handlers in `ROUTES`."""

from __future__ import annotations

from tartarus.control.routes import (
    audit,
    checkpoints,
    code,
    endings,
    files,
    forks,
    lamentations,
    logs,
    modules,
    network,
    policies,
    quarantine,
    sandboxes,
    secrets,
    sleep,
    snapshots,
    streams,
    system,
    templates,
    uploads,
)

ROUTES = [
    *system.ROUTES,
    *sandboxes.ROUTES,
    *endings.ROUTES,
    *checkpoints.ROUTES,
    *sleep.ROUTES,
    *secrets.ROUTES,
    *forks.ROUTES,
    *logs.ROUTES,
    *code.ROUTES,
    *files.ROUTES,
    *streams.ROUTES,
    *templates.ROUTES,
    *snapshots.ROUTES,
    *uploads.ROUTES,
    *modules.ROUTES,
    *policies.ROUTES,
    *audit.ROUTES,
    *network.ROUTES,
    *lamentations.ROUTES,
    *quarantine.ROUTES,
]
