"""The async twin of `templates`."""

from __future__ import annotations

import builtins
import contextlib
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from typing import Any

import anyio.to_thread

from tartarus.model.definition import Definition
from tartarus.model.errors import TartarusError, TemplateNotFound
from tartarus.model.library import Credentials, Pushed, PushRequest, TemplateInfo
from tartarus.sdk import library_calls as calls
from tartarus.sdk.async_client import AsyncClient
from tartarus.sdk.library_calls import Following, OnProgress
from tartarus.sdk.packing import Ignore, Payload, Sending
from tartarus.sdk.plans import Plan, build_plan, build_source, check_database, load_plan, name_taken, plan


class AsyncTemplate:
    """A template; see `Template`, whose names it has. Calls to `on_progress` are made from the event loop."""

    def __init__(self, info: TemplateInfo, client: AsyncClient) -> None:
        self._info = info
        self._client = client

    @classmethod
    async def create(
        cls,
        base: str,
        *,
        name: str = "",
        definition: Definition | None = None,
        network: str = "",
        ca_bundle: bool = False,
        credentials: Iterable[Credentials] = (),
        replace: bool = False,
        on_progress: OnProgress | None = None,
        client: AsyncClient | None = None,
    ) -> AsyncTemplate:
        """Make a template from whatever `base` names.

        Args:
            base: an image such as ``python:3.11``, ``host``, another template's name, or a path that begins with
                ``.`` or ``/``: a Dockerfile or a directory with one, a template's YAML, a root file system, an OCI
                layout, or what ``docker save`` wrote.
            name: what to call it; the YAML's id, or made from `base`, if not given.
            definition: packages, warm-up, limits and whatever else a template's YAML can say.
            network: what a build's steps may reach, ``none`` or ``open``; the definition's if not given.
            ca_bundle: show this host's certificates to a build's steps.
            credentials: logins for the registries that it takes images from.
            replace: put it in the place of one of that name, which serves until the new one is ready.
            on_progress: see the class.
            client: which daemon; the one of your environment if not given.

        Raises:
            InvalidRequest, TemplateExists, ImageNotFound, ImageRefused, RegistryFailed, BuildFailed, NoSpace, and other
            TartarusErrors; nothing is left behind then.
        """
        made = plan(
            base, name=name, definition=definition, network=network, ca_bundle=ca_bundle, credentials=credentials,
            replace=replace,
        )  # fmt: skip
        return await cls.make(made, on_progress=on_progress, client=client)

    @classmethod
    async def load(
        cls,
        path: str,
        *,
        name: str = "",
        reference: str = "",
        replace: bool = False,
        on_progress: OnProgress | None = None,
        client: AsyncClient | None = None,
    ) -> AsyncTemplate:
        """Make a template from a root file system, an OCI layout or a saved image: a directory, a tar, or ``-``.

        `reference` says which image of several, or what to call the image.
        """
        made = load_plan(path, name=name, reference=reference, replace=replace)
        return await cls.make(made, on_progress=on_progress, client=client)

    @classmethod
    async def build(
        cls,
        context: str = ".",
        *,
        name: str,
        dockerfile: str = "",
        args: Mapping[str, str] | None = None,
        target: str = "",
        network: str = "",
        ca_bundle: bool = False,
        no_cache: bool = False,
        definition: Definition | None = None,
        credentials: Iterable[Credentials] = (),
        ignore: Ignore | None = None,
        replace: bool = False,
        on_progress: OnProgress | None = None,
        client: AsyncClient | None = None,
    ) -> AsyncTemplate:
        """Build a template from a Dockerfile; every RUN is a sandbox of its own.

        Args:
            context: the directory that COPY takes files from.
            name: what to call it.
            dockerfile: its path; the context's own ``Dockerfile`` if not given.
            args: build arguments.
            target: the stage to stop at; the last one if not given.
            network: what its steps may reach, ``none`` or ``open``.
            ca_bundle: show this host's certificates to its steps.
            no_cache: run every step, also those that were run before on the same files.
            definition: what a template's YAML can say besides.
            credentials: logins for the registries of its base images.
            ignore: which paths below the context not to send; the daemon goes by .dockerignore in any case.
            replace: as in `create`.
            on_progress: see the class.
            client: which daemon; the one of your environment if not given.
        """
        made = build_plan(
            dockerfile or f"{context}/Dockerfile", name=name, definition=definition, context=context,
            build=build_source(args, target, no_cache=no_cache), ignore=ignore, network=network, ca_bundle=ca_bundle,
            credentials=credentials, replace=replace,
        )  # fmt: skip
        return await cls.make(made, on_progress=on_progress, client=client)

    @classmethod
    async def make(
        cls, made: Plan, *, on_progress: OnProgress | None = None, client: AsyncClient | None = None
    ) -> AsyncTemplate:
        """Carry out a plan of `tartarus.sdk.plans`."""
        client = client or AsyncClient()
        is_template = bool(made.ask) and await cls._exists(made.ask, client)
        upload = ""
        if made.payload is not None:
            if not made.replace and await cls._exists(made.name, client):
                raise name_taken(made.name)  # before gigabytes are sent
            sending = Sending(made.payload, on_progress)
            parts = in_threads(made.payload.parts())
            upload = (await client.transport.call(calls.upload(), (sending.passed(part) async for part in parts))).id
            sending.over()
        call = calls.create_template(made.request(upload, is_template=is_template))
        following = Following(on_progress)
        try:
            async with client.transport.stream(call) as answer:
                async for part in answer:
                    following.receive(part)
        except TartarusError:
            if upload:  # if it was refused before it was used
                with contextlib.suppress(TartarusError):
                    await client.transport.call(calls.remove_upload(upload))
            raise
        return cls(following.template(), client)

    @staticmethod
    async def _exists(name: str, client: AsyncClient) -> bool:
        try:
            await client.transport.call(calls.template(name))
        except TemplateNotFound:
            return False
        return True

    @classmethod
    async def get(cls, name: str, *, client: AsyncClient | None = None) -> AsyncTemplate:
        """The template of that name, id or unique id prefix. Raises TemplateNotFound."""
        client = client or AsyncClient()
        return cls(await client.transport.call(calls.template(name)), client)

    @classmethod
    async def list(cls, *, client: AsyncClient | None = None) -> builtins.list[AsyncTemplate]:
        """Built-in templates and yours."""
        client = client or AsyncClient()
        return [cls(info, client) for info in await client.transport.call(calls.templates())]

    @property
    def id(self) -> str:
        """Its id, such as ``tpl-3kq9…``."""
        return self._info.id

    @property
    def name(self) -> str:
        """What sandboxes ask for it by."""
        return self._info.name

    @property
    def info(self) -> TemplateInfo:
        """What was last heard of it; `refresh` asks again."""
        return self._info

    async def refresh(self) -> TemplateInfo:
        """Ask what is known of it now."""
        self._info = await self._client.transport.call(calls.template(self.id))
        return self._info

    async def warm(self, *, on_progress: OnProgress | None = None) -> TemplateInfo:
        """Make its warm snapshot anew; the old one serves until the new one is proven."""
        following = Following(on_progress)
        async with self._client.transport.stream(calls.warm_template(self.id)) as answer:
            async for part in answer:
                following.receive(part)
        self._info = following.template()
        return self._info

    async def push(
        self, reference: str, *, credentials: Iterable[Credentials] = (), on_progress: OnProgress | None = None
    ) -> Pushed:
        """Push it to a registry as an image."""
        following = Following(on_progress)
        request = PushRequest(reference, tuple(credentials))
        async with self._client.transport.stream(calls.push_template(self.id, request)) as answer:
            async for part in answer:
                following.receive(part)
        return following.pushed()

    async def scan(self, *, database: str = "", online: bool = False, tool: str = "") -> dict[str, Any]:
        """Its known vulnerabilities and the policy's verdict.

        `database` is the path of a zip of OSV's records, which is uploaded; without it the daemon's own is used, or
        with `online` OSV's service, which learns the packages' names. `tool`: trivy or grype, installed where the
        daemon runs, instead.
        """
        upload = ""
        if database:
            check_database(database)
            upload = (await self._client.transport.call(calls.upload(), in_threads(Payload(database).parts()))).id
        return await self._client.transport.call(
            calls.scan_template(self.id, calls.scan_request(upload, online=online, tool=tool))
        )

    async def sbom(self) -> dict[str, Any]:
        """Its packages, as a CycloneDX document."""
        return await self._client.transport.call(calls.template_sbom(self.id))

    async def remove(self: AsyncTemplate | str, *, client: AsyncClient | None = None) -> None:
        """Forget it; sandboxes that live go on. Also ``AsyncTemplate.remove("my-python")``."""
        if isinstance(self, str):
            await (client or AsyncClient()).transport.call(calls.remove_template(self))
        else:
            await (client or self._client).transport.call(calls.remove_template(self.id))

    def __repr__(self) -> str:
        return f"<AsyncTemplate {self.name} {self._info.status.value}>"


async def in_threads(parts: Iterator[bytes]) -> AsyncIterator[bytes]:
    """Pieces that are read from files: each read in a thread."""
    while (part := await anyio.to_thread.run_sync(next, parts, None)) is not None:
        yield part
