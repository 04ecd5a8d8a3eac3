"""What a template holds, which of it is known to be vulnerable, and whether the host's policy lets it be used.

The host's owner puts OSV's records below ``osv`` in the state directory and a policy in ``scan-policy.json`` beside
it; without records templates are made unchecked, and say so.
"""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from tartarus.images.stackview import StackView
from tartarus.model.errors import InvalidRequest, TartarusError
from tartarus.model.library import Progress, ScanRequest, Step, StepProgress, StepState
from tartarus.model.settings import Settings
from tartarus.node.uploads import Uploads
from tartarus.runtimes.base import RootFs

if TYPE_CHECKING:
    from tartarus.images.sbom import Inventory
    from tartarus.images.scan import OsvDatabase, OsvService, ScanPolicy, ScanReport

Tell = Callable[[Progress], None]
_MAX_POLICY_BYTES = 1024**2


class Scanner:
    """Inventories and scans stacks of layers."""

    def __init__(self, settings: Settings, uploads: Uploads, uid_base: Callable[[], int | None]) -> None:
        self._database = settings.state_dir / "osv"
        self._policy = settings.state_dir / "scan-policy.json"
        self._uploads = uploads
        self._uid_base = uid_base

    async def check(self, layers: Sequence[Path], tell: Tell) -> tuple[str, dict[str, Any]]:
        """Why a template of these layers may not be used (nothing if it may), and what its record keeps of the scan.

        A policy that can't be read, and a database that can't be asked while a policy blocks something, block.
        """
        policy = await asyncio.to_thread(self.policy)
        from tartarus.images.scan import OsvDatabase, judge

        if not layers or not (self._database.exists() or policy.can_block):
            return "", {"checked": False}
        tell(StepProgress(step=Step.SCAN, state=StepState.STARTED, text="looking for known vulnerabilities"))
        try:
            report = await asyncio.to_thread(self._scan, layers, OsvDatabase(self._database))
        except InvalidRequest as error:
            if not policy.can_block:
                return "", {"checked": False, "error": str(error)}
            return f"it could not be checked: {error}", {"checked": False, "error": str(error)}
        verdict = judge(report, policy, dt.datetime.now(tz=dt.UTC).date())
        counts = {str(level): count for level, count in report.counts().items()}
        tell(StepProgress(step=Step.SCAN, state=StepState.DONE, text=f"Scanned {report.packages} packages"))
        return "; ".join(verdict.reasons) if verdict.blocked else "", {"checked": True, "counts": counts}

    def policy(self) -> ScanPolicy:
        """The host's policy; one that blocks nothing if there is none. Raises InvalidRequest for a broken one."""
        from tartarus.images.scan import ScanPolicy

        try:
            with self._policy.open("rb") as file:
                content = file.read(_MAX_POLICY_BYTES)
        except FileNotFoundError:
            return ScanPolicy()
        except OSError as error:
            raise InvalidRequest(f"the scan policy {self._policy} can't be read", why=str(error)) from error
        try:
            return msgspec.json.decode(content, type=ScanPolicy)
        except msgspec.MsgspecError as error:
            raise InvalidRequest(
                f"the scan policy {self._policy} is not one", why=str(error), fix="see docs/scanning.md"
            ) from error

    async def scan(self, rootfs: RootFs, request: ScanRequest, tenant: str) -> dict[str, Any]:
        """A template's findings and the policy's verdict, as JSON can carry it."""
        layers = rootfs.layers
        from tartarus.images.scan import OsvDatabase, OsvService, judge

        policy = await asyncio.to_thread(self.policy)
        if request.tool:
            from tartarus.images.scan import scan_with_tool

            inventory = await asyncio.to_thread(self._inventory, layers)
            report = await scan_with_tool(request.tool, inventory, network=request.online)
        elif request.database:
            async with self._uploads.claimed(tenant, request.database) as path:
                report = await asyncio.to_thread(self._scan, layers, OsvDatabase(path))
        else:
            source = OsvService() if request.online else OsvDatabase(self._database)
            report = await asyncio.to_thread(self._scan, layers, source)
        verdict = judge(report, policy, dt.datetime.now(tz=dt.UTC).date())
        return {
            "template": rootfs.template.id,
            "report": msgspec.to_builtins(report),
            "counts": {str(level): count for level, count in report.counts().items()},
            "verdict": msgspec.to_builtins(verdict),
        }

    async def sbom(self, rootfs: RootFs) -> bytes:
        """A template's packages, as a CycloneDX document."""
        from tartarus.images.sbom import cyclonedx

        inventory = await asyncio.to_thread(self._inventory, rootfs.layers)
        return msgspec.json.encode(cyclonedx(inventory, name=rootfs.template.id), order="sorted")

    def _inventory(self, layers: Sequence[Path]) -> Inventory:
        from tartarus.images.sbom import take_inventory

        with StackView(layers, self._uid_base()) as view:
            try:
                return take_inventory(view)
            except OSError as error:
                raise TartarusError("the template's files can't be read", why=str(error)) from error

    def _scan(self, layers: Sequence[Path], advisories: OsvDatabase | OsvService) -> ScanReport:
        from tartarus.images.scan import scan

        return scan(self._inventory(layers), advisories)
