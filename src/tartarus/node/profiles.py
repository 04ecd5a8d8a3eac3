"""System call profiles of a host: the built-in ones, each tenant's own, and what a request's security comes to.

A profile is a small file of its own, replaced in one step; a sandbox has it as it was when the sandbox was made.
"""

from __future__ import annotations

import asyncio
import builtins
import time
from pathlib import Path

import msgspec

from tartarus.durable import sync_directory, write_whole
from tartarus.guest.syscalls import table
from tartarus.model.errors import InvalidRequest, InvalidState, NoSpace, ProfileNotFound, Unsupported
from tartarus.model.ids import check_name
from tartarus.model.sandbox import Isolation, SandboxSpec
from tartarus.model.seccomp import Profile, PutProfile, RecordedCalls
from tartarus.model.security import SecurityConfig
from tartarus.model.template import RunAs
from tartarus.node.sandbox import Sandbox
from tartarus.runtimes import hardening
from tartarus.runtimes.base import RootFs
from tartarus.runtimes.confine.profiles import BUILT_IN, built_in
from tartarus.runtimes.confine.recording import UNSEEN
from tartarus.runtimes.idmap import IdMap

MOST_PROFILES = 256
"""That a tenant may keep."""
_SUFFIX = ".json"


class Profiles:
    """Kept below `root`, which is the daemon's alone."""

    def __init__(self, root: Path, id_map: IdMap) -> None:
        self._root = root
        self._id_map = id_map
        self._writing = asyncio.Lock()

    async def list(self, tenant: str) -> builtins.list[Profile]:
        """The built-in ones, then the tenant's, by name."""
        own = await asyncio.to_thread(lambda: [self._read(path) for path in self._files(tenant)])
        return [*(self._built_in(name) for name in BUILT_IN), *own]

    async def get(self, tenant: str, name: str) -> Profile:
        """One of them. Raises ProfileNotFound."""
        if name in BUILT_IN:
            return self._built_in(name)
        check_name(name)
        try:
            return await asyncio.to_thread(self._read, self._path(tenant, name))
        except FileNotFoundError:
            raise ProfileNotFound(f"no system call profile {name!r}", fix="see: tartarus seccomp list") from None

    async def put(self, tenant: str, name: str, request: PutProfile) -> Profile:
        """Keep one, in the place of one of that name; sandboxes that run have the old one. Raises NoSpace."""
        check_name(name)
        if name in BUILT_IN:
            raise InvalidRequest(f"{name!r} is a built-in profile", fix="choose another name")
        unknown = sorted(set(request.calls) - table().keys())
        if unknown:
            raise InvalidRequest(f"{', '.join(unknown[:5])}: no system call of this machine", fix="see syscalls(2)")
        profile = Profile(
            name=name, calls=tuple(sorted(set(request.calls))), description=request.description, created_at=time.time()
        )
        async with self._writing:
            await asyncio.to_thread(self._write, tenant, profile)
        return profile

    async def remove(self, tenant: str, name: str) -> None:
        """Forget one of the tenant's own. Raises ProfileNotFound."""
        profile = await self.get(tenant, name)
        if profile.builtin:
            raise InvalidRequest(f"{name!r} is a built-in profile", fix="it takes no space")
        await asyncio.to_thread(self._path(tenant, name).unlink, missing_ok=True)

    def check(self, spec: SandboxSpec, user: RunAs, level: Isolation) -> None:
        """Raise Unsupported for what the level can't honour."""
        if spec.security is not None:
            hardening.require(spec.security, level, self._id_map, user)
        if spec.record_calls and level is not Isolation.CONTAINER:
            raise Unsupported(
                f"the calls of a sandbox at the {level.value} level can't be recorded",
                why="only there are they all made to the host's kernel, behind one filter",
                fix="use --isolation container",
            )

    def unable(self, spec: SandboxSpec, user: RunAs) -> dict[Isolation, str]:
        """The levels that `auto` passes over, with why: they can't honour what is asked."""
        if spec.security is None or spec.isolation is not Isolation.AUTO:
            return {}
        found = {
            level: next(hardening.refused(spec.security, level, self._id_map, user), None)
            for level in Isolation
            if level is not Isolation.AUTO
        }
        return {level: f"it can't honour {why[0]}, since {why[1]}" for level, why in found.items() if why is not None}

    async def hardened(self, tenant: str, rootfs: RootFs, level: Isolation, security: SecurityConfig | None) -> RootFs:
        """The root file system for guests that are held so. Raises ProfileNotFound."""
        if security is None:
            return rootfs
        name = security.seccomp_profile
        calls = None
        if name in BUILT_IN:
            calls = built_in(name)
        elif name:
            calls = (await self.get(tenant, name)).calls
        return msgspec.structs.replace(rootfs, hardening=hardening.hardening(security, calls, level))

    def recorded(self, sandbox: Sandbox) -> RecordedCalls:
        """What it has called until now. Raises InvalidState for one whose calls are not recorded."""
        if sandbox.recorder is None:
            raise InvalidState(
                "this sandbox's system calls are not recorded",
                fix="make one with record_calls, as tartarus seccomp record does",
            )
        return RecordedCalls(dict.fromkeys(UNSEEN, 1) | sandbox.recorder.calls)

    def _built_in(self, name: str) -> Profile:
        calls = built_in(name)
        return Profile(
            name=name, calls=tuple(sorted(every_call())) if calls is None else calls, description=BUILT_IN[name][0],
            builtin=True,
        )  # fmt: skip

    def _path(self, tenant: str, name: str) -> Path:
        return self._root / tenant / f"{name}{_SUFFIX}"

    def _files(self, tenant: str) -> builtins.list[Path]:
        place = self._root / tenant
        return sorted(place.glob(f"*{_SUFFIX}")) if place.is_dir() else []

    def _read(self, path: Path) -> Profile:
        return msgspec.json.decode(path.read_bytes(), type=Profile)

    def _write(self, tenant: str, profile: Profile) -> None:
        place = self._path(tenant, profile.name)
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not place.exists() and len(self._files(tenant)) >= MOST_PROFILES:
            raise NoSpace(f"you have {MOST_PROFILES} system call profiles", fix="remove some: tartarus seccomp rm NAME")
        for leftover in place.parent.glob(".*"):  # of a daemon that was killed
            leftover.unlink(missing_ok=True)
        write_whole(place, msgspec.json.encode(profile))
        sync_directory(place.parent)


def every_call() -> frozenset[str]:
    """All that the container level lets programs call, with or without a look at arguments."""
    from tartarus.runtimes.confine.narrowing import is_refused
    from tartarus.runtimes.confine.seccomp import rules_by_name

    return frozenset(name for name, rule in rules_by_name(Isolation.CONTAINER).items() if not is_refused(rule))
