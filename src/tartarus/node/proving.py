"""A template is in service once a sandbox of it has started here: its nursery, its interpreter, its own check."""

from __future__ import annotations

import asyncio
import time

import msgspec

from tartarus.guest.channel import GuestExec
from tartarus.model.errors import IsolationUnavailable, TartarusError, TemplateFailed
from tartarus.model.ids import new_id
from tartarus.model.sandbox import Isolation, SandboxSpec
from tartarus.node.levels import Levels
from tartarus.node.offers import Offer, Offers
from tartarus.node.pool import SnapshotPool
from tartarus.node.profiles import Profiles
from tartarus.node.selection import choose
from tartarus.node.spares import SparePool
from tartarus.runtimes.base import GuestRequest, Snapshot, base_environment

_CHECK_TIMEOUT_S = 60.0
_OUTPUT_BYTES = 4096


class Proof(msgspec.Struct, frozen=True):
    """When a template was warmed (Unix seconds) and how long that took; nothing of it for one that starts cold."""

    warmed_at: float | None = None
    warm_ms: float | None = None
    warm_error: str = ""


class Prover:
    """Starts templates, and lets go of those that are gone."""

    def __init__(
        self, levels: Levels, pool: SnapshotPool, offers: Offers, spares: SparePool, profiles: Profiles
    ) -> None:
        self._profiles = profiles
        self._levels = levels
        self._pool = pool
        self._offers = offers
        self._spares = spares
        self.one_at_a_time = asyncio.Lock()

    async def prove(self, tenant: str, offer: Offer, check: tuple[str, ...]) -> Proof:
        """Start it at the strongest level there is, warm if it can be. Raises TemplateFailed with what it said.

        What stood before stands as it was then, and what did not is gone.
        """
        rootfs = await self._offers.prepared(tenant, offer, lambda _line: None)
        asked = SandboxSpec(security=offer.template.security)
        try:
            unavailable = self._levels.unavailable | self._profiles.unable(asked, offer.template.user)
            level, _ = choose(asked, unavailable, offer.floor, self._offers.host_floor)
        except IsolationUnavailable as error:
            raise TemplateFailed(
                "no level of this host can start the template", why=error.why, fix=error.fix
            ) from error
        self._profiles.check(asked, offer.template.user, level)
        rootfs = await self._profiles.hardened(tenant, rootfs, level, asked.security)
        stood = self._pool.stands(rootfs, level, warm=False)

        began = time.perf_counter()
        checking_s = 0.0

        async def passes(snapshot: Snapshot) -> None:
            nonlocal checking_s
            checks_at = time.perf_counter()
            if check:
                await self._check(snapshot, level, check)
            checking_s = time.perf_counter() - checks_at

        warm_up = offer.template.warm_up
        warm = warm_up is not None and warm_up.is_cloned
        try:
            await self._pool.renew(rootfs, level, warm=warm, check=passes)
            await self._spares.renew(rootfs, level)
        except BaseException:
            if not stood:
                self.retire(tenant, offer)
            raise
        took = round((time.perf_counter() - began - checking_s) * 1e3, 1)
        return Proof(time.time(), took) if warm_up is not None else Proof()

    async def _check(self, snapshot: Snapshot, level: Isolation, check: tuple[str, ...]) -> None:
        """Run the template's own check in a sandbox of it; it must exit with 0."""
        runtime = self._levels.runtimes[level]
        rootfs = snapshot.rootfs
        name = new_id("chk")
        guest = await runtime.clone(
            snapshot, GuestRequest(id=name, hostname=name, resources=rootfs.template.resources), warm=False
        )
        said = bytearray()
        try:
            async with asyncio.timeout(_CHECK_TIMEOUT_S):
                await guest.ready()
                places = runtime.places(rootfs, name)
                env = base_environment(places.home, rootfs.template.user.name) | rootfs.template.env
                env = {key: places.localize(value) for key, value in env.items()}
                process = guest.channel.exec(GuestExec(argv=check, env=env, cwd=places.workdir))
                while (piece := await process.read()) is not None:
                    said = (said + piece[1])[-_OUTPUT_BYTES:]
                status = await process.wait()
        except TimeoutError:
            raise TemplateFailed(f"the ready check ran longer than {_CHECK_TIMEOUT_S:g} s") from None
        except TemplateFailed:
            raise
        except TartarusError as error:
            raise TemplateFailed("the ready check could not run", why=str(error)) from error
        finally:
            await asyncio.shield(guest.destroy())
        if status.shell_status != 0:
            raise TemplateFailed(
                f"{' '.join(check)[:80]!r} ended with status {status.shell_status}",
                why=said.decode("utf-8", "replace").strip(),
                fix="mend the template, or its ready_check",
            )

    def retire(self, tenant: str, offer: Offer) -> None:
        """The offer is gone: its interpreter ends now, its nursery with the last sandbox of it."""
        rootfs = self._offers.forget(tenant, offer)
        if rootfs is not None:
            self._pool.retire(rootfs.digest)
        self._spares.relieve()
