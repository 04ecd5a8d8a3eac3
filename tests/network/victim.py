"""A process with a network, to be killed: opens a pool, joins the guest whose namespace it was handed, and waits.

With `old`, as on a kernel whose links can't forward IPv6 by themselves.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import structlog

from tartarus.model.contract import Contract
from tartarus.network import forwarding
from tartarus.network.compiled import compiled
from tartarus.network.pool import SlotPool
from tartarus.network.settings import NetworkSettings
from tartarus.node.egress import launch


async def main() -> None:
    if sys.argv[3:] == ["old"]:
        forwarding._LINK = "not_in_this_kernel"
    pool = SlotPool(Path(sys.argv[1]), NetworkSettings(name_servers=("203.0.113.53",)), launch)
    os.write(1, b"starting\n")
    slot = await pool.take()
    await pool.attach(slot, int(sys.argv[2]))
    await pool.take(compiled(Contract(allowed_domains=("public.example",))))  # with a proxy, which lives in the router
    os.write(1, b"joined\n")
    await asyncio.Event().wait()


structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
asyncio.run(main())
