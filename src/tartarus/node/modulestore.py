"""One tenant's compiled modules on disk: what they are called, what a tenant may have, how they go.

Each form of a module (with and without fuel; of another version of wasmtime) is a directory of its own. What a tenant
removes is set aside under a name that nothing finds: sandboxes that run it have its files, until the last one is gone.
"""

from __future__ import annotations

import json
import re
import shutil
import uuid
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from tartarus.guest.wasm import HOME
from tartarus.images.store import LayerStore
from tartarus.model.errors import InvalidRequest, ModuleNotFound, NoSpace
from tartarus.model.modules import ModuleInfo
from tartarus.model.sandbox import Wasm

MOST_TENANT_BYTES = 4 * 1024**3
MOST_TENANT_MODULES = 1000
_LEAST_PREFIX = 4
_DIGEST_DIGITS = 64
_ASIDE = ".aside-"
_NAME = re.compile(r"module-(?P<key>[0-9a-f]+-[0-9a-f]+)-(?P<digest>[0-9a-f]{64})(?P<metered>-metered)?")


class Form(NamedTuple):
    """One form of a module: its directory's `name`, what its code depends on (`key`), and what it takes on disk."""

    name: str
    key: str
    digest: str
    kind: str
    size_bytes: int
    disk_bytes: int
    used_at: float


def name_of(key: str, digest: str, *, metered: bool) -> str:
    """How the form of a module is called that `key` says, with fuel if `metered`."""
    return f"module-{key}-{digest}{'-metered' if metered else ''}"


class ModuleStore(LayerStore):
    """A layer store whose layers are modules."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._root = root

    def forms(self) -> list[Form]:
        """Every form of every module, the one that was used last first."""
        found = []
        for name in self.names():
            match = _NAME.fullmatch(name)
            if match is None:
                continue
            try:
                found.append(_form(self._root / name, match, self.manifest(name)))
            except (OSError, ValueError, LookupError):  # it goes at this moment, or is damaged: `find` makes it anew
                continue
        return sorted(found, key=lambda form: -form.used_at)

    def listing(self, key: str) -> list[ModuleInfo]:
        """The modules, the one that was used last first; `key`: what code must depend on to be ready here."""
        modules: dict[str, list[Form]] = {}
        for form in self.forms():
            modules.setdefault(form.digest, []).append(form)
        return [_info(forms, key) for forms in modules.values()]

    def resolve(self, word: str) -> str:
        """The digest that begins so. Raises ModuleNotFound, InvalidRequest."""
        if len(word) == _DIGEST_DIGITS:
            Wasm(module=word)
        if len(word) < _LEAST_PREFIX:
            raise InvalidRequest(f"{word!r} is too short for a module", fix=f"give at least {_LEAST_PREFIX} digits")
        found = {form.digest for form in self.forms() if form.digest.startswith(word)}
        if not found:
            raise ModuleNotFound(f"no module {word!r}", fix="see yours with: tartarus module list")
        if len(found) > 1:
            raise InvalidRequest(f"{word!r} fits several modules", fix="give more digits of the sha256")
        return found.pop()

    def check_room(self, in_use: Collection[str]) -> None:
        """Raise NoSpace when what can't be removed is all that a tenant may have."""
        held = sum(form.disk_bytes for form in self.forms() if form.name in in_use)
        held += sum(map(_bytes_in, self._root.glob(f"{_ASIDE}*")))
        if held >= MOST_TENANT_BYTES:
            raise NoSpace(
                f"the modules that your sandboxes use take {held >> 20} MiB",
                why=f"a tenant may have {MOST_TENANT_BYTES >> 20} MiB of compiled modules",
                fix="end some of those sandboxes",
            )

    def set_aside(self, digest: str) -> list[str]:
        """Take all forms of a module out of sight, each in one step; returns their names."""
        gone = []
        for form in self.forms():
            if form.digest == digest:
                (self._root / form.name).rename(self._root / f"{_ASIDE}{uuid.uuid4().hex[:12]}-{form.name}")
                gone.append(form.name)
        return gone

    def remove_set_aside(self, in_use: Collection[str]) -> None:
        """Remove what was set aside and is not in use; safe to repeat after a death in the middle of it."""
        for place in self._root.glob(f"{_ASIDE}*"):
            if place.name.removeprefix(_ASIDE).partition("-")[2] not in in_use:
                shutil.rmtree(place, ignore_errors=True)

    def thin(self, in_use: Iterable[str]) -> None:
        """Keep the modules below what a tenant may have; the longest unused go first."""
        total, keep = 0, set(in_use)
        for count, form in enumerate(self.forms(), 1):
            total += form.disk_bytes
            if total <= MOST_TENANT_BYTES and count <= MOST_TENANT_MODULES:
                keep.add(form.name)
        self.remove_unused(keep, 0.0)


def _form(place: Path, match: re.Match[str], facts: dict[str, Any]) -> Form:
    source = place / "tree" / HOME.lstrip("/") / "source.wasm"
    return Form(
        name=place.name, key=match["key"], digest=match["digest"],
        kind="component" if str(facts["code"]).startswith("component") else "module",
        size_bytes=0 if match["metered"] else source.stat().st_size, disk_bytes=int(facts["bytes"]),
        used_at=place.stat().st_mtime,
    )  # fmt: skip


def _bytes_in(place: Path) -> int:
    try:
        return int(json.loads((place / "manifest.json").read_text())["bytes"])
    except (OSError, ValueError, LookupError):  # it goes at this moment
        return 0


def _info(forms: list[Form], key: str) -> ModuleInfo:
    return ModuleInfo(
        digest=forms[0].digest, size_bytes=max(form.size_bytes for form in forms), kind=forms[0].kind, compile_ms=0.0,
        disk_bytes=sum(form.disk_bytes for form in forms), used_at=forms[0].used_at,
        ready=any(form.key == key for form in forms),
    )  # fmt: skip
