"""Removing layers whose files are not the daemon's: a user's daemon that has subordinate ids can't unlink theirs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path

from tartarus.images.unpack.jailed import JailPlace, run_jailed
from tartarus.images.unpack.limits import Limits
from tartarus.model.errors import TartarusError


def remover(uid_base: int | None) -> Callable[[Path], bool]:
    """A function that removes a directory and says whether it is gone, as the ids of `uid_base` may.

    For `LayerStore`. It blocks its caller while a jailed child works, which can reach nothing but that directory.
    """

    def remove(path: Path) -> bool:
        if path.is_dir():
            # A loop of its own, because the caller's may be running in this very thread.
            worker = threading.Thread(target=lambda: asyncio.run(_empty(path, uid_base)))
            worker.start()
            worker.join()
            try:
                path.rmdir()
            except OSError:
                return False
        return not path.exists()

    return remove


async def _empty(path: Path, uid_base: int | None) -> None:
    try:
        await run_jailed("empty", str(path), [JailPlace(str(path), "/target", write=True)], uid_base, Limits())
    except TartarusError:
        return  # what is left says so
