"""Templates and snapshots in the client: what people say becomes the right request, and errors come back."""

from __future__ import annotations

import asyncio
import io
import os
import socket
import tarfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.library import EXPORTED
from tests.library_service import Served, served

from tartarus.model.definition import BuildNetwork, Definition
from tartarus.model.errors import (
    BuildFailed,
    DaemonUnavailable,
    FileFailed,
    InvalidRequest,
    NameTaken,
    NoSpace,
    RegistryFailed,
    SnapshotNotFound,
    TartarusError,
    TemplateExists,
    TemplateNotFound,
    Unsupported,
)
from tartarus.model.forking import ForkChild, ForkError, ForkResult
from tartarus.model.library import (
    BuildOutput,
    Credentials,
    DockerfileSource,
    ImageSource,
    Step,
    StepState,
    TemplateBase,
    UploadSource,
)
from tartarus.model.sandbox import Isolation, SandboxRecord, SandboxSpec
from tartarus.model.snapshots import SnapshotKind
from tartarus.model.states import State
from tartarus.sdk import AsyncClient, AsyncSandbox, AsyncSnapshot, AsyncTemplate, Client, Sandbox, Snapshot, Template
from tartarus.sdk.forks import Forks
from tartarus.sdk.library_calls import Following
from tartarus.sdk.packing import Payload
from tartarus.sdk.plans import build_source, default_name, plan


@pytest.fixture(scope="module")
def shared() -> Iterator[Served]:
    with served() as found:
        yield found


@pytest.fixture
def server(shared: Served) -> Served:
    shared.reset()
    return shared


@pytest.fixture
def client(server: Served) -> Client:
    return Client(server.home, start=False)


def test_an_image_becomes_a_template(server, client):
    events: list[Any] = []
    secret = Credentials("example.org", "me", "pw")
    made = Template.create("python:3.11", credentials=[secret], on_progress=events.append, client=client)
    assert (made.name, made.info.base) == ("python-3.11", "python:3.11")
    (request,) = server.service.library.templates.requests
    assert request.source == ImageSource("python:3.11", (secret,))
    assert [event.step for event in events if event.state is StepState.DONE and not event.item] == [
        Step.PULL, Step.ROOTFS, Step.SNAPSHOT,
    ]  # fmt: skip
    assert (events[1].bytes_done, events[1].bytes_total) == (1000, 2000)
    assert Template.get(made.id, client=client).info == made.info == made.refresh()
    assert [template.name for template in Template.list(client=client)] == ["host", "python-3.11"]
    assert made.warm().warm_ms == 9.0
    pushed = made.push("example.org/x:1", credentials=[secret])
    assert (pushed.reference, server.service.library.templates.pushes[0].credentials) == ("example.org/x:1", (secret,))
    assert made.scan(online=True)["report"]["findings"]
    assert made.sbom()["bomFormat"] == "CycloneDX"
    with pytest.raises(TemplateExists):
        Template.create("python:3.11", client=client)
    assert Template.create("python:3.11", replace=True, client=client).info.build == 2
    made.remove()
    with pytest.raises(TemplateNotFound):
        Template.get("python-3.11", client=client)


def test_a_word_is_a_template_if_there_is_one_and_else_an_image(server, client):
    Template.create("python", name="one", client=client)
    Template.create("one", name="two", client=client)
    Template.create("host", name="three", definition=Definition(packages=("numpy",)), client=client)
    sources = [request.source for request in server.service.library.templates.requests]
    assert sources == [ImageSource("python"), TemplateBase("one"), TemplateBase("host")]


def test_a_context_is_sent_without_what_is_ignored(server, client, tmp_path):
    (tmp_path / "Dockerfile").write_text("FROM host\nCOPY a /a\nRUN make\n")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "kept").write_bytes(b"x" * 1000)
    (tmp_path / "a" / "left").write_bytes(b"y")
    (tmp_path / "a" / "hard").hardlink_to(tmp_path / "a" / "kept")
    (tmp_path / "link").symlink_to("/etc/passwd")
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
    events: list[Any] = []
    made = Template.build(
        str(tmp_path), name="built", args={"V": "1"}, target="final", network="open", ca_bundle=True, no_cache=True,
        ignore=lambda path: path in {"a", "a/left"}, on_progress=events.append, client=client,
    )  # fmt: skip
    assert made.name == "built"
    (request,) = server.service.library.templates.requests
    assert isinstance(request.source, DockerfileSource)
    assert (request.source.args, request.source.target, request.source.no_cache) == ({"V": "1"}, "final", True)
    assert (request.network, request.ca_bundle) == (BuildNetwork.OPEN, True)
    members = server.service.library.templates.received[0]["members"]
    assert sorted(members) == ["Dockerfile", "a", "a/hard", "a/kept", "link"]
    assert members["link"].issym()
    assert members["link"].linkname == "/etc/passwd"
    assert members["a/hard"].isreg()
    assert members["a/kept"].size == 1000
    assert {member.uid for member in members.values()} == {0}
    assert any(isinstance(event, BuildOutput) for event in events)
    assert (events[0].step, events[0].state) == (Step.UPLOAD, StepState.DONE)
    assert events[0].bytes_done > 1000
    assert server.uploads == []


def test_a_failing_build_raises_what_the_daemon_says_and_leaves_no_upload(server, client, tmp_path):
    (tmp_path / "Dockerfile").write_text("FROM host\nRUN exit 3\n")
    with pytest.raises(BuildFailed, match="step 2 of 2, line 2: RUN exit 3") as caught:
        Template.build(str(tmp_path), name="built", client=client)
    assert "tartarus run -it --template build-x-failed -- sh" in caught.value.fix
    assert server.uploads == []


def test_what_is_refused_early_sends_nothing(server, client, tmp_path):
    (tmp_path / "Dockerfile").write_text("FROM host\n")
    Template.create("python:3.11", name="taken", client=client)
    with pytest.raises(TemplateExists, match="there is a template 'taken' already"):
        Template.build(str(tmp_path), name="taken", client=client)
    with pytest.raises(InvalidRequest):
        Template.build(str(tmp_path), name="../x", client=client)
    assert len(server.service.library.templates.requests) == 1
    assert server.uploads == []
    with pytest.raises(FileFailed, match="No such file"):
        Template.build(str(tmp_path / "nowhere"), name="x", client=client)
    with pytest.raises(InvalidRequest, match="has no name"):
        Template.create(str(tmp_path / "Dockerfile"), client=client)


def test_root_file_systems_keep_their_owners(server, client, tmp_path):
    root = tmp_path / "rootfs"
    (root / "etc").mkdir(parents=True)
    (root / "etc" / "passwd").write_text("root:x:0:0::/:/bin/sh\n")
    (root / "etc" / "again").hardlink_to(root / "etc" / "passwd")
    (root / "odd\udcff").write_text("")
    (root / "bin").symlink_to("usr/bin")
    made = Template.load(str(root), client=client)
    assert made.name == "rootfs"
    (request,) = server.service.library.templates.requests
    assert isinstance(request.source, UploadSource)
    members = server.service.library.templates.received[0]["members"]
    assert sorted(members, key=repr) == sorted(["bin", "etc", "etc/again", "etc/passwd", "odd\udcff"], key=repr)
    assert members["etc/passwd"].islnk()
    assert members["etc/passwd"].linkname == "etc/again"
    assert members["etc"].uid == os.geteuid()


def test_an_archive_is_sent_as_it_is(server, client, tmp_path):
    archive = tmp_path / "saved.tar"
    with tarfile.open(archive, "w") as tar:
        tar.addfile(tarfile.TarInfo("manifest.json"), io.BytesIO())
    made = Template.load(str(archive), reference="app:1", client=client)
    assert made.name == "saved"
    (request,) = server.service.library.templates.requests
    assert isinstance(request.source, UploadSource)
    assert request.source.reference == "app:1"
    with pytest.raises(FileFailed, match="No such file"):
        Template.load(str(tmp_path / "nothing"), client=client)


def test_a_yaml_file(server, client, tmp_path):
    (tmp_path / "my.yaml").write_text("id: mine\ndockerfile: Dockerfile.dev\nnetwork: open\nenv: {A: b}\n")
    (tmp_path / "Dockerfile.dev").write_text("FROM host\n")
    made = Template.create(str(tmp_path / "my.yaml"), client=client)
    assert made.name == "mine"
    (request,) = server.service.library.templates.requests
    assert isinstance(request.source, DockerfileSource)
    assert request.source.dockerfile == "FROM host\n"
    assert (request.network, request.definition.env) == (BuildNetwork.OPEN, {"A": "b"})
    (tmp_path / "bad.yaml").write_text("id: mine\nbase_imag: host\n")
    with pytest.raises(InvalidRequest, match=r"bad\.yaml, line 2: unknown key 'base_imag'.*did you mean 'base_image'"):
        Template.create(str(tmp_path / "bad.yaml"), client=client)


def test_where_a_yamls_base_leads(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "a.yaml").write_text("id: a\nbase_image: ./root\n")
    made = plan(str(tmp_path / "a.yaml"))
    assert made.payload is not None
    assert Path(made.payload.path).resolve() == tmp_path / "root"
    (tmp_path / "b.yaml").write_text("id: b\nbase_image: ./a.yaml\n")
    with pytest.raises(InvalidRequest, match="another YAML"):
        plan(str(tmp_path / "b.yaml"))
    (tmp_path / "c.yaml").write_text("id: c\npackages: [numpy]\n")
    made = plan(str(tmp_path / "c.yaml"), name="other")
    assert (made.name, made.ask, made.request(is_template=True).source) == ("other", "host", TemplateBase("host"))
    (tmp_path / "d.yaml").write_text("id: d\ndockerfile: build.txt\n")
    (tmp_path / "build.txt").write_text("FROM scratch\n")
    made = plan(str(tmp_path / "d.yaml"), build=build_source({"A": "b"}, "", no_cache=False))
    assert made.source == DockerfileSource("FROM scratch\n", args={"A": "b"})
    assert made.payload == Payload(str(tmp_path))
    with pytest.raises(InvalidRequest, match="no network of a build"):
        plan("python:3.11", network="host")


@pytest.mark.parametrize("key", ["base_image", "dockerfile"])
@pytest.mark.parametrize("path", ["/etc", "../secret", "./link", "./link/x", "./down/../../secret"])
def test_somebody_elses_yaml_sends_nothing_from_outside_its_directory(tmp_path, key, path):
    (tmp_path / "secret").mkdir()
    (tmp_path / "theirs" / "down").mkdir(parents=True)
    (tmp_path / "theirs" / "link").symlink_to(tmp_path / "secret")
    (tmp_path / "theirs" / "a.yaml").write_text(f"id: a\n{key}: {path}\n")
    with pytest.raises(InvalidRequest, match="is not below the file's own directory"):
        plan(str(tmp_path / "theirs" / "a.yaml"))


def test_a_caller_may_close_the_network_that_a_yaml_opens(tmp_path):
    (tmp_path / "a.yaml").write_text("id: a\nnetwork: open\n")
    assert plan(str(tmp_path / "a.yaml")).request().network is BuildNetwork.OPEN
    request = plan(str(tmp_path / "a.yaml"), network="none").request()
    assert (request.network, request.definition.network) == (BuildNetwork.NONE, BuildNetwork.NONE)


@pytest.mark.parametrize(
    ("reference", "name"),
    [
        ("python:3.11", "python-3.11"), ("python:latest", "python"), ("docker.io/library/python", "python"),
        ("localhost:5000/a/b@sha256:00", "b"), ("image.tar.gz", "image"), ("./rootfs/", "rootfs"), ("_x_", "x"),
    ],
)  # fmt: skip
def test_names_for_what_was_given_none(reference, name):
    assert default_name(reference) == name


def test_an_upload_that_breaks_off_is_an_error(tmp_path):
    file = tmp_path / "f"
    file.write_bytes(bytes(1024**2))
    parts = Payload(str(tmp_path)).parts()
    next(parts)
    file.write_bytes(b"x")
    with pytest.raises(FileFailed, match="became shorter"):
        list(parts)


def test_a_stream_that_is_cut_off_is_an_error():
    with pytest.raises(DaemonUnavailable, match="before the work was done"):
        Following(None).template()
    with pytest.raises(DaemonUnavailable):
        Following(None).receive(b'{"type": "nothing we know"}\n')
    with pytest.raises(DaemonUnavailable):
        Following(None).receive(b"]\n")
    with pytest.raises(RegistryFailed):
        Following(None).receive(b'{"type": "problem", "problem": {"code": "registry_failed", "detail": "x"}}\n')


def test_what_on_progress_raises_ends_the_work(server, client):
    server.service.library.templates.cancelled.clear()

    def stop(event: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Template.create("slow:1", on_progress=stop, client=client)
    end = time.monotonic() + 10
    while not server.service.library.templates.cancelled.is_set():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_snapshots(server, client):
    with Sandbox.create(timeout_s=60, isolation="process", client=client) as sandbox:
        taken = sandbox.snapshot(name="before", labels={"a": "b"})
        assert (taken.info.sandbox, taken.info.name, taken.info.labels) == (sandbox.id, "before", {"a": "b"})
        assert Snapshot.get("before", client=client).id == taken.id
        assert [snapshot.id for snapshot in Snapshot.list(client=client)] == [taken.id]
        taken.delete()
        with pytest.raises(SnapshotNotFound):
            Snapshot.delete("before", client=client)


def test_snapshots_of_memory(server, client, tmp_path):
    file = str(tmp_path / "file")
    with Sandbox.create(timeout_s=60, isolation="process", client=client) as sandbox:
        taken = sandbox.snapshot(name="all", memory=True)
        assert (taken.info.kind, taken.info.isolation) == (SnapshotKind.MEMORY, "gvisor")
        taken.export(file)
        with pytest.raises(InvalidRequest, match="already"):
            taken.export(file)
        assert Snapshot.load(file, name="again", labels={"a": "b"}, client=client).info.labels == {"a": "b"}
        with pytest.raises(NameTaken):
            Snapshot.load(file, name="again", client=client)
        with pytest.raises(FileFailed):
            taken.export(str(tmp_path / "no" / "file"))
        with pytest.raises(Unsupported):
            sandbox.fork(2)
        with pytest.raises(InvalidRequest):
            sandbox.fork(0)

    async def go() -> None:
        there = AsyncClient(server.home, start=False)
        again = await AsyncSnapshot.load(file, client=there)
        await again.export(f"{file}.async")
        async with AsyncSandbox.create(timeout_s=60, isolation="process", client=there) as sandbox:
            assert (await sandbox.snapshot(memory=True)).info.kind is SnapshotKind.MEMORY
            with pytest.raises(Unsupported):
                await sandbox.fork()

    asyncio.run(go())
    assert (tmp_path / "file.async").read_bytes() == EXPORTED
    assert server.uploads == []


def test_what_a_fork_made():
    record = SandboxRecord(
        id="sbx-1", tenant="t", name="", template="host", isolation=Isolation.GVISOR, isolation_reason="",
        state=State.RUNNING, spec=SandboxSpec(), created_at=0.0,
    )  # fmt: skip
    failed = ForkError("no_space", "full", "why", "fix")
    result = ForkResult("sbx-0", SnapshotKind.MEMORY, 7.5, (ForkChild(record), ForkChild(error=failed)))
    forks = Forks(msgspec.json.decode(msgspec.json.encode(result), type=ForkResult), lambda made: made.id)
    assert (list(forks), len(forks), forks.paused_ms) == (["sbx-1"], 1, 7.5)
    (error,) = forks.errors
    assert isinstance(error, NoSpace)
    assert (error.what, error.why, error.fix) == ("full", "why", "fix")


@pytest.mark.parametrize("name", ["", ".", ".."])
def test_no_name_leads_to_another_place(client, name):
    for act in (Template.get, Snapshot.get, Template.remove, Snapshot.delete):
        with pytest.raises(TartarusError, match="no name"):
            act(name, client=client)


def test_the_async_twin(server, tmp_path):
    (tmp_path / "Dockerfile").write_text("FROM host\nRUN exit 3\n")

    async def go() -> None:
        client = AsyncClient(server.home, start=False)
        events: list[Any] = []
        made = await AsyncTemplate.create("python:3.11", on_progress=events.append, client=client)
        assert len(events) > 3
        assert (await AsyncTemplate.get("python-3.11", client=client)).info == await made.refresh()
        assert len(await AsyncTemplate.list(client=client)) == 2
        assert (await made.warm()).warm_ms == 9.0
        assert (await made.push("x:1")).reference == "x:1"
        database = tmp_path / "db.zip"
        with zipfile.ZipFile(database, "w"):
            pass
        assert not (await made.scan(database=str(database)))["verdict"]["blocked"]
        assert server.service.library.templates.scans[-1][1] == database.stat().st_size
        with pytest.raises(InvalidRequest, match="no zip"):
            await made.scan(database=str(tmp_path / "Dockerfile"))
        assert (await made.sbom())["bomFormat"] == "CycloneDX"
        with pytest.raises(BuildFailed):
            await AsyncTemplate.build(str(tmp_path), name="built", client=client)
        await AsyncTemplate.load(str(database), name="loaded", client=client)
        with pytest.raises(TemplateExists):
            await AsyncTemplate.load(str(database), name="loaded", client=client)
        await made.remove()
        async with AsyncSandbox.create(timeout_s=60, isolation="process", client=client) as sandbox:
            taken = await sandbox.snapshot()
            assert (await AsyncSnapshot.get(taken.id, client=client)).info == taken.info
            assert len(await AsyncSnapshot.list(client=client)) == 1
            await taken.delete()

    asyncio.run(go())
    assert server.uploads == []
