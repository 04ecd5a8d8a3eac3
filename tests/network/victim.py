"""A process with a network, to be killed: opens a pool, joins the guest whose namespace it was handed, and waits."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from tartarus.network.pool import SlotPool
from tartarus.network.settings import NetworkSettings


async def main() -> None:
    pool = SlotPool(Path(sys.argv[1]), NetworkSettings(name_servers=("203.0.113.53",)))
    os.write(1, b"starting\n")
    slot = await pool.take()
    await pool.attach(slot, int(sys.argv[2]))
    os.write(1, b"joined\n")
    await asyncio.Event().wait()


asyncio.run(main())
