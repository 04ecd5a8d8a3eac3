"""What tests make templates with, on a real node."""

from __future__ import annotations

import io
import shutil
import tarfile
from collections.abc import AsyncIterator

from tartarus.model.library import (
    BuildOutput,
    CreateTemplate,
    DockerfileSource,
    Done,
    StepProgress,
    TemplateInfo,
)
from tartarus.model.sandbox import ExecSpec, SandboxSpec
from tartarus.node.service import Node

SHELL = """
FROM scratch
COPY busybox /bin/busybox
RUN ["/bin/busybox", "--install", "-s", "/bin"]
RUN mkdir -p /etc /srv/data && echo 'root:x:0:0::/root:/bin/sh' >/etc/passwd && echo 'app:x:33:34::/srv:/bin/sh' >>/etc/passwd
"""


def context(**files: bytes) -> bytes:
    """A build context as clients send it: busybox and these files."""
    busybox = shutil.which("busybox")
    assert busybox
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
        archive.add(busybox, "busybox", filter=lambda member: member.replace(uid=0, gid=0, mode=0o755))
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


async def chunks(data: bytes) -> AsyncIterator[bytes]:
    yield data


class Maker:
    """Makes templates for a tenant."""

    def __init__(self, node: Node, tenant: str) -> None:
        self.node = node
        self.tenant = tenant
        self.said: list[str] = []
        self.steps: list[StepProgress] = []

    async def build(self, name: str, more: str = "", *, base: str = SHELL, **options: object) -> TemplateInfo:
        upload = await self.node.library.uploads.put(self.tenant, chunks(context(file=b"from the context\n")))
        return await self.make(name, DockerfileSource(dockerfile=base + more, context=upload.id), **options)

    async def make(self, name: str, source: object, **options: object) -> TemplateInfo:
        done: TemplateInfo | None = None
        self.said, self.steps = [], []
        request = CreateTemplate(name=name, source=source, **options)  # type: ignore[arg-type]
        async for event in self.node.library.templates.create(self.tenant, request):
            if isinstance(event, BuildOutput):
                self.said.append(event.text)
            elif isinstance(event, StepProgress):
                self.steps.append(event)
            elif isinstance(event, Done):
                done = event.template
        assert done is not None
        return done

    async def out(self, template: str, *argv: str, **options: object) -> str:
        """What a command prints in a sandbox of it."""
        spec = SandboxSpec(template=template, command=ExecSpec(argv=argv), **options)  # type: ignore[arg-type]
        sandbox = await self.node.create(self.tenant, spec)
        assert sandbox.main is not None
        found = bytearray()
        while (piece := await sandbox.main.read()) is not None:
            found += piece[1]
        await sandbox.wait()
        return found.decode()

    async def names(self) -> set[str]:
        return {info.name for info in await self.node.library.templates.list(self.tenant) if not info.builtin}
