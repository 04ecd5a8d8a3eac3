"""From what a template is made of (an image, an archive) to the stack of layers that its sandboxes stand on."""

from __future__ import annotations

import asyncio
import hashlib
import tempfile
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from tartarus.images import LayerStore
from tartarus.images.blobs import BlobStore
from tartarus.images.entries import write_tree
from tartarus.images.oci import Descriptor, Image, ImageConfig, host_platform
from tartarus.images.paths import VENV
from tartarus.images.reference import Reference
from tartarus.images.registry import BlobProgress, Credentials, RegistrySettings, pull, push, read_settings
from tartarus.images.stackview import StackView
from tartarus.images.stored import blobs_of, store_image, stored_image
from tartarus.images.systemlayer import system_entries
from tartarus.images.unpack.capture import pack_layer
from tartarus.images.unpack.layers import unpack_layers
from tartarus.images.unpack.merge import merge_layers
from tartarus.model.definition import Definition
from tartarus.model.errors import InvalidRequest, TemplateFailed
from tartarus.model.library import (
    CreateTemplate,
    ImageSource,
    Progress,
    Pushed,
    PushRequest,
    StepProgress,
    StepState,
    TemplateBase,
    TemplateRecord,
    UploadSource,
)
from tartarus.model.library import Credentials as Login
from tartarus.model.library import Step as Part
from tartarus.model.security import combined
from tartarus.model.settings import Settings
from tartarus.model.template import Template, WarmUp
from tartarus.node.offers import Offers
from tartarus.node.uploads import Uploads

Tell = Callable[[Progress], None]
_PIECE_BYTES = 1024**2
_VENV_PATH = f"{VENV}/bin"


class Stack(msgspec.Struct, frozen=True):
    """Layers, top first, and what the image says of how it is run.

    `names` are the layers' in the tenant's store; `image` is the digest of the manifest in the blob store, for one
    that was pulled or loaded as it is.
    """

    layers: tuple[Path, ...]
    names: tuple[str, ...]
    config: ImageConfig = ImageConfig()
    base: str = ""
    size_bytes: int = 0
    image: str = ""

    def details(self, holder: str) -> dict[str, Any]:
        """What the template's record keeps of it."""
        return {
            "holder": holder, "image": self.image, "config": msgspec.to_builtins(self.config),
            "stack": list(self.names),
        }  # fmt: skip


class Stacks:
    """Makes stacks for tenants, each in stores of its own."""

    def __init__(self, settings: Settings, offers: Offers, uploads: Uploads) -> None:
        self._settings = settings
        self._offers = offers
        self._uploads = uploads

    def blobs(self, tenant: str) -> BlobStore:
        """The tenant's blob store."""
        place = self._settings.cache_dir / "tenants" / tenant
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        return BlobStore(place / "blobs")

    def release(self, tenant: str, holder: str) -> None:
        """Nothing of `holder`'s needs its blobs any more."""
        self.blobs(tenant).release(holder)

    @staticmethod
    def nothing(base: str) -> Stack:
        """For a template that stands on the host's own files."""
        return Stack((), (), base=base)

    @staticmethod
    def key(template: Template, layers: tuple[str, ...]) -> str:
        """A digest of all that decides what its sandboxes find."""
        return hashlib.sha256(msgspec.msgpack.encode((layers, template))).hexdigest()[:32]

    async def make(self, tenant: str, holder: str, request: CreateTemplate, tell: Tell) -> Stack:
        """The stack that a request asks for. Raises what its source can't give, as TartarusError."""
        source = request.source
        if isinstance(source, ImageSource):
            return await self.pulled(tenant, holder, source.reference, source.credentials, tell)
        if isinstance(source, UploadSource):
            return await self._loaded(tenant, holder, source, tell)
        assert isinstance(source, TemplateBase)  # Dockerfiles are the builder's
        return await self.of_template(tenant, source.template)

    async def pulled(self, tenant: str, holder: str, name: str, logins: tuple[Login, ...], tell: Tell) -> Stack:
        """An image of a registry."""
        reference = Reference.parse(name)
        tell(StepProgress(step=Part.PULL, state=StepState.STARTED, text=str(reference)))
        blobs = await asyncio.to_thread(self.blobs, tenant)
        settings = self._registries(logins)
        image = await pull(reference, blobs, settings, _moving(tell, Part.PULL))
        await asyncio.to_thread(blobs.hold, holder, blobs_of(image))
        tell(StepProgress(step=Part.PULL, state=StepState.DONE, text="Pulled image"))
        return await self._unpacked(tenant, image, blobs, name, tell)

    async def _loaded(self, tenant: str, holder: str, source: UploadSource, tell: Tell) -> Stack:
        from tartarus.images.sources import load

        tell(StepProgress(step=Part.IMPORT, state=StepState.STARTED, text="reading the archive"))
        blobs = await asyncio.to_thread(self.blobs, tenant)
        async with self._uploads.claimed(tenant, source.upload) as path:
            image = await load(path, blobs, _moving(tell, Part.IMPORT), reference=source.reference)
        await asyncio.to_thread(blobs.hold, holder, blobs_of(image))
        tell(StepProgress(step=Part.IMPORT, state=StepState.DONE, text="Imported image"))
        return await self._unpacked(tenant, image, blobs, source.reference or "an archive", tell)

    async def _unpacked(self, tenant: str, image: Image, blobs: BlobStore, base: str, tell: Tell) -> Stack:
        store = await asyncio.to_thread(self._offers.layers, tenant)
        uid_base = self._offers.unpack_base
        tell(StepProgress(step=Part.ROOTFS, state=StepState.STARTED, text=f"unpacking {len(image.layers)} layers"))
        wanted = []
        for layer, diff_id in zip(image.layers, image.diff_ids, strict=True):
            blob = await asyncio.to_thread(blobs.find, layer.digest)
            if blob is None:
                raise TemplateFailed(f"blob {layer.digest} is gone", fix="pull the image again")
            wanted.append((blob, layer, diff_id))

        def unpacked(diff_id: str, count: int) -> None:
            tell(StepProgress(step=Part.ROOTFS, state=StepState.UPDATED, item=diff_id, bytes_done=count))

        layers = tuple(reversed(await unpack_layers(store, wanted, uid_base, progress=unpacked)))
        layers = tuple(await merge_layers(store, layers, uid_base))
        return make_stack(store, layers, image.config, base, image.digest)

    async def of_template(self, tenant: str, name: str) -> Stack:
        """The stack of another template of the tenant's, without the sandbox's own files on top."""
        record = await self._offers.record(tenant, name)
        store = await asyncio.to_thread(self._offers.layers, tenant)
        found = [store.find(part) for part in record.details.get("stack", ())]
        layers = tuple(path for path in found if path is not None)
        if len(layers) != len(found) or not layers:
            raise TemplateFailed(f"template {name!r} lacks files on disk", fix="make it again, with --replace")
        config = msgspec.convert(record.details["config"], ImageConfig)
        return make_stack(store, layers, config, name, str(record.details.get("image", "")))

    async def system_layer(self, tenant: str, template: Template, view: StackView) -> str:
        """The name of the layer with the sandbox's own files, made if need be."""
        entries = await asyncio.to_thread(system_entries, template, view)
        uid_base = self._offers.uid_base
        store = await asyncio.to_thread(self._offers.layers, tenant)
        digest = hashlib.sha256(msgspec.msgpack.encode((entries, uid_base))).hexdigest()[:32]
        name = f"system-{digest}"

        async def build(tree: Path, lock: int) -> dict[str, Any]:
            del lock
            await asyncio.to_thread(write_tree, tree, entries, uid_base)
            return {"template": template.id}

        await store.get(name, build)
        return name

    @staticmethod
    def over_host(name: str, base: Template, said: Definition) -> Template:
        """A template on the host's own programs, with what its definition adds."""
        packages = tuple(dict.fromkeys((*base.python_packages, *said.packages)))
        env = dict(base.env)
        warm_up = base.warm_up
        if packages and not base.python_packages:
            env |= {"PATH": f"{_VENV_PATH}:{env['PATH']}", "VIRTUAL_ENV": VENV, "MPLBACKEND": "Agg"}
            warm_up = WarmUp(interpreter=f"{_VENV_PATH}/python3")
        if warm_up is not None:
            warm_up = msgspec.structs.replace(warm_up, script=said.warmup_script)
        return Template(
            id=name, name=said.name or name, base="host", python_packages=packages, env=env | said.env,
            workdir=said.workdir or base.workdir, resources=said.resources.defaults, warm_up=warm_up,
            description=said.description, stop_signal=said.stop_signal, stop_grace_s=said.stop_grace_s,
            security=combined(base.security, said.security),
        )  # fmt: skip

    async def push(self, record: TemplateRecord, request: PushRequest, tell: Tell) -> None:
        """Push a template's image, as it was pulled or, for one built here, made of its layers."""
        reference = Reference.parse(request.reference)
        blobs = await asyncio.to_thread(self.blobs, record.tenant)
        tell(StepProgress(step=Part.PUSH, state=StepState.STARTED, text=str(reference)))
        image = await self._image(record, blobs)
        settings = self._registries(request.credentials)
        digest = await push(image, reference, blobs, settings, _moving(tell, Part.PUSH))
        tell(StepProgress(step=Part.PUSH, state=StepState.DONE, text="Pushed image"))
        tell(Pushed(reference=str(reference), digest=digest))

    async def _image(self, record: TemplateRecord, blobs: BlobStore) -> Image:
        if digest := record.details.get("image"):
            return await asyncio.to_thread(stored_image, blobs, str(digest))
        names = list(record.details.get("stack", ()))
        if not names:
            raise InvalidRequest(f"template {record.name!r} stands on this host's own files, and is no image")
        store = await asyncio.to_thread(self._offers.layers, record.tenant)
        packed = []
        for name in reversed(names):
            path = store.find(name)
            if path is None:
                raise TemplateFailed(f"template {record.name!r} lacks files on disk", fix="make it again")
            packed.append(await self._packed(path, blobs))
        config = msgspec.convert(record.details["config"], ImageConfig)
        layers, diff_ids = tuple(layer for layer, _ in packed), tuple(diff_id for _, diff_id in packed)
        return await store_image(blobs, config, layers, diff_ids, host_platform())

    def _registries(self, logins: tuple[Login, ...]) -> RegistrySettings:
        """What the administrator says, read anew each time, and the request's logins."""
        said = read_settings(self._settings.state_dir / "registries.toml")
        credentials = {
            login.registry: Credentials(login.username, login.password, identity_token=login.token) for login in logins
        }
        return msgspec.structs.replace(said, credentials=credentials)

    async def _packed(self, layer: Path, blobs: BlobStore) -> tuple[Descriptor, str]:
        """A layer directory as a blob: its descriptor and diff id."""
        with tempfile.TemporaryFile(dir=self._settings.cache_dir) as file:
            packed = await pack_layer(layer, self._offers.unpack_base, file.fileno())
            descriptor = Descriptor(media_type=packed.media_type, digest=packed.digest, size=packed.size)
            await blobs.ingest(descriptor, lambda offset: _pieces(file, offset))
        return descriptor, packed.diff_id


async def _pieces(file: BinaryIO, offset: int) -> AsyncGenerator[bytes, None]:
    await asyncio.to_thread(file.seek, offset)
    while data := await asyncio.to_thread(file.read, _PIECE_BYTES):
        yield data


def make_stack(store: LayerStore, layers: tuple[Path, ...], config: ImageConfig, base: str, image: str) -> Stack:
    """A stack of layers that lie in a tenant's store."""
    names = tuple(layer.parent.name for layer in layers)
    size = sum(int(store.manifest(name).get("bytes", 0)) for name in names)
    return Stack(layers, names, config, base, size, image)


def _moving(tell: Tell, part: Part) -> Callable[[BlobProgress], None]:
    def moved(progress: BlobProgress) -> None:
        state = {"moving": StepState.UPDATED, "done": StepState.DONE, "there": StepState.CACHED}[progress.state]
        tell(
            StepProgress(
                step=part, state=state, item=progress.digest, bytes_done=progress.done_bytes,
                bytes_total=progress.total_bytes,
            )
        )  # fmt: skip

    return moved
