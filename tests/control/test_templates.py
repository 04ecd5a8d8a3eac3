"""Templates, snapshots and uploads over HTTP: streams of progress, hang-ups, other tenants, and hostile clients."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import tarfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tartarus.control.decode import decode
from tartarus.model.definition import Definition
from tartarus.model.errors import InvalidRequest, NoSpace, UploadNotFound
from tartarus.model.library import CreateSnapshot, CreateTemplate, DockerfileSource, PushRequest, ScanRequest
from tartarus.node import uploads as uploads_module
from tartarus.node.uploads import MAX_UPLOADS, TooLarge, Uploads

from .conftest import serving
from .test_requests import problem

if TYPE_CHECKING:
    from .conftest import Service

pytestmark = pytest.mark.anyio
IMAGE = {"name": "mine", "source": {"type": "image", "reference": "python:3.11"}}


@pytest.fixture(autouse=True)
async def empty(service: Service) -> None:
    """The module's server, without templates and snapshots of an earlier test."""
    service.library.templates.own.clear()
    service.library.templates.requests.clear()
    service.library.templates.received.clear()
    service.library.snapshots.own.clear()


def lines(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("application/x-ndjson")
    return [json.loads(line) for line in response.text.splitlines()]


def tar(**files: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


async def upload(client: httpx.AsyncClient, data: bytes) -> str:
    response = await client.put("/v1/uploads", content=data)
    assert response.status_code == 201, response.text
    made = response.json()
    assert made["size_bytes"] == len(data)
    assert response.headers["location"] == f"/v1/uploads/{made['id']}"
    return str(made["id"])


async def test_a_template_is_made_and_found(client: httpx.AsyncClient) -> None:
    events = lines(await client.post("/v1/templates", json=IMAGE))
    assert [event["type"] for event in events[:-1]] == ["step"] * (len(events) - 1)
    assert events[0] | {"text": ""} == {
        "type": "step", "step": "pull", "state": "started", "text": "", "item": "", "bytes_done": None,
        "bytes_total": None,
    }  # fmt: skip
    done = events[-1]
    assert (done["type"], done["template"]["name"], done["template"]["base"]) == ("done", "mine", "python:3.11")
    by_name = (await client.get("/v1/templates/mine")).json()
    assert by_name == (await client.get(f"/v1/templates/{by_name['id']}")).json() == done["template"]
    assert [item["name"] for item in (await client.get("/v1/templates")).json()] == ["host", "mine"]
    assert (await client.delete("/v1/templates/mine")).status_code == 204
    problem(await client.get("/v1/templates/mine"), 404, "template_not_found")


async def test_a_taken_name_and_a_built_in_one_are_refused_before_the_stream(client: httpx.AsyncClient) -> None:
    lines(await client.post("/v1/templates", json=IMAGE))
    problem(await client.post("/v1/templates", json=IMAGE), 409, "template_exists")
    problem(await client.post("/v1/templates", json=IMAGE | {"name": "host"}), 409, "template_exists")
    again = lines(await client.post("/v1/templates", json=IMAGE | {"replace": True}))
    assert again[-1]["template"]["build"] == 2


async def test_a_failure_in_the_stream_is_its_last_line(client: httpx.AsyncClient) -> None:
    source = {"type": "image", "reference": "broken:1"}
    events = lines(await client.post("/v1/templates", json=IMAGE | {"source": source}))
    assert [event["type"] for event in events] == ["step", "problem"]
    found = events[-1]["problem"]
    assert (found["code"], found["why"], found["fix"]) == ("registry_failed", "half-way", "try again")
    problem(await client.get("/v1/templates/mine"), 404, "template_not_found")


async def test_a_bug_in_the_stream_is_a_problem_too(client: httpx.AsyncClient) -> None:
    source = {"type": "image", "reference": "sudden:1"}
    events = lines(await client.post("/v1/templates", json=IMAGE | {"source": source}))
    assert events[-1]["problem"]["code"] == "internal"


async def test_hanging_up_ends_the_work(service: Service) -> None:
    service.library.templates.cancelled.clear()
    async with service.client() as client:
        body = IMAGE | {"source": {"type": "image", "reference": "slow:1"}}
        async with client.stream("POST", "/v1/templates", json=body) as response:
            async for line in response.aiter_lines():
                assert json.loads(line)["state"] == "started"
                break
            assert not service.library.templates.cancelled.is_set()
    async with asyncio.timeout(10):
        await service.library.templates.cancelled.wait()


async def test_hanging_up_before_the_first_word_ends_the_work_too(service: Service) -> None:
    service.library.templates.cancelled.clear()
    reader, writer = await asyncio.open_unix_connection(str(service.settings.socket))
    body = json.dumps(IMAGE | {"source": {"type": "image", "reference": "mute:1"}}).encode()
    writer.write(b"POST /v1/templates HTTP/1.1\r\nhost: t\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
    async with asyncio.timeout(10):
        while not service.library.templates.requests:
            await asyncio.sleep(0.01)
        assert not service.library.templates.cancelled.is_set()
        writer.close()
        await service.library.templates.cancelled.wait()
    del reader


KEYS = st.sampled_from([
    *CreateTemplate.__struct_fields__, *DockerfileSource.__struct_fields__, *Definition.__struct_fields__, "type",
])  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9)
    | st.sampled_from(["image", "upload", "dockerfile", "template", "open", "python:3.11"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@pytest.mark.parametrize("kind", [CreateTemplate, PushRequest, ScanRequest, CreateSnapshot])
@given(body=st.binary(max_size=60) | VALUES.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_a_request_or_refused(kind: type, body: bytes) -> None:
    with contextlib.suppress(InvalidRequest):
        assert isinstance(decode(kind, body), kind)


async def test_a_build_with_its_context(client: httpx.AsyncClient, service: Service) -> None:
    context = await upload(client, tar(**{"a.txt": b"hello"}))
    source = {
        "type": "dockerfile", "dockerfile": "FROM host\nRUN echo hi\n", "context": context, "args": {"V": "1"},
        "target": "", "no_cache": True,
    }  # fmt: skip
    body = {"name": "built", "source": source, "network": "open", "ca_bundle": True, "definition": {"env": {"A": "b"}}}
    events = lines(await client.post("/v1/templates", json=body))
    assert {"type": "output", "text": "running RUN echo hi\n\x1b[31mred\x1b[0m\n", "item": "2/2"} in events
    assert list(service.library.templates.received[0]["members"]) == ["a.txt"]
    problem(await client.post("/v1/templates", json=body | {"name": "again"}), 404, "upload_not_found")


async def test_warm_scan_sbom_and_push(client: httpx.AsyncClient, service: Service) -> None:
    lines(await client.post("/v1/templates", json=IMAGE))
    assert lines(await client.post("/v1/templates/mine/warm"))[-1]["template"]["warm_ms"] == 9.0
    report = (await client.post("/v1/templates/mine/scan", json={})).json()
    assert report["report"]["findings"][0]["severity"] == "high"
    database = await upload(client, b"zip")
    assert (await client.post("/v1/templates/mine/scan", json={"database": database})).status_code == 200
    assert service.library.templates.scans[-1][1] == 3
    problem(await client.post("/v1/templates/mine/scan", json={"database": "x", "online": True}), 400)
    sbom = await client.get("/v1/templates/mine/sbom")
    assert sbom.headers["content-type"].startswith("application/vnd.cyclonedx+json")
    assert sbom.json()["bomFormat"] == "CycloneDX"
    secret = {"registry": "example.org", "username": "me", "password": "hunter2"}
    body = {"reference": "example.org/mine:1", "credentials": [secret]}
    assert lines(await client.post("/v1/templates/mine/push", json=body))[-1]["type"] == "pushed"
    assert service.library.templates.pushes[-1].credentials[0].password == "hunter2"
    for path in ("warm", "push", "scan", "sbom"):
        json_body = {"push": {"reference": "x"}, "scan": {}}.get(path)
        method = "GET" if path == "sbom" else "POST"
        problem(await client.request(method, f"/v1/templates/nobody/{path}", json=json_body), 404, "template_not_found")


BAD = [
    ({}, "missing required field `name`"),
    ({"name": "mine"}, "missing required field `source`"),
    ({"name": "../x", "source": {"type": "template", "template": "host"}}, "not a valid name"),
    ({"name": "tpl-x", "source": {"type": "template", "template": "host"}}, "not a valid name"),
    ({"name": "x" * 64, "source": {"type": "template", "template": "host"}}, "not a valid name"),
    ({"name": "mine", "source": {"type": "path", "path": "/etc"}}, "Invalid value 'path'"),
    ({"name": "mine", "source": {"type": "upload", "path": "/etc/shadow"}}, "path"),
    ({"name": "mine", "source": {"type": "image", "reference": ""}}, "no image given"),
    ({"name": "mine", "source": {"type": "image", "reference": "a\0b"}}, "NUL"),
    ({"name": "mine", "source": {"type": "image", "reference": "a" * 5000}}, "too long"),
    ({"name": "mine", "source": {"type": "dockerfile", "dockerfile": "F" * 1024**2 + "x"}}, "bytes long"),
    ({"name": "mine", "source": {"type": "dockerfile", "dockerfile": "", "args": {"A=B": "c"}}}, "build argument"),
    (IMAGE | {"definition": {"warmup_scrip": "x"}}, "unknown key 'warmup_scrip' in definition"),
    (IMAGE | {"definition": {"packages": ["--index-url=http://evil"]}}, "is not a package"),
    (IMAGE | {"definition": {"resources": {"max_cpu": 0}}}, "out of range"),
    (IMAGE | {"network": "host"}, "'host' is not one of the values in network"),
    (IMAGE | {"tenant": "uid-1"}, "unknown key 'tenant'"),
    (IMAGE | {"labels": {}}, "unknown key 'labels'"),
]


@pytest.mark.parametrize(("body", "what"), BAD, ids=[what for _, what in BAD])
async def test_bad_requests_change_nothing(
    client: httpx.AsyncClient, service: Service, body: dict[str, Any], what: str
) -> None:
    assert what in problem(await client.post("/v1/templates", json=body), 400)["detail"]
    assert service.library.templates.requests == []


async def test_unknown_parameters_are_refused(client: httpx.AsyncClient) -> None:
    for path in ("/v1/templates", "/v1/templates/host", "/v1/snapshots"):
        problem(await client.get(path, params={"tenant": "uid-1"}), 400)
        problem(await client.get(path, params={"template_id": "uid-1"}), 400)


async def test_secrets_are_not_logged(client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture, capfd: Any) -> None:
    secret = {"registry": "example.org", "username": "me", "password": "hunter2", "token": "t0ken"}
    source = {"type": "image", "reference": "sudden:1", "credentials": [secret]}
    text = (await client.post("/v1/templates", json=IMAGE | {"source": source})).text
    text += (await client.post("/v1/templates", json=IMAGE | {"source": source | {"x": 1}})).text
    output = capfd.readouterr()
    for said in (text, caplog.text, output.out, output.err):
        assert "hunter2" not in said
        assert "t0ken" not in said


async def test_snapshots(client: httpx.AsyncClient) -> None:
    made = await client.post("/v1/snapshots", json={"sandbox": "sbx-1", "name": "before", "labels": {"a": "b"}})
    assert made.status_code == 201
    info = made.json()
    assert made.headers["location"] == f"/v1/snapshots/{info['id']}"
    assert (await client.get("/v1/snapshots/before")).json() == info
    assert (await client.get("/v1/snapshots")).json() == [info]
    problem(await client.post("/v1/snapshots", json={"sandbox": "sbx-1", "name": "before"}), 409, "name_taken")
    for body in ({}, {"sandbox": ""}, {"sandbox": "x", "name": "snap-1"}, {"sandbox": "x", "name": "a/b"}):
        problem(await client.post("/v1/snapshots", json=body), 400)
    assert (await client.delete("/v1/snapshots/before")).status_code == 204
    problem(await client.delete("/v1/snapshots/before"), 404, "snapshot_not_found")


async def test_another_tenants_things_are_not_found(client: httpx.AsyncClient, service: Service) -> None:
    library = service.library
    other = "uid-424242"
    request = msgspec.convert(IMAGE | {"name": "theirs"}, CreateTemplate)
    async for _ in library.templates.create(other, request):
        pass
    theirs = [library.templates.own[other, "theirs"].id, "theirs"]
    for name in theirs:
        attempts: list[tuple[str, str, dict[str, str] | None]] = [
            ("GET", "", None), ("DELETE", "", None), ("POST", "/warm", None), ("POST", "/scan", {}),
            ("GET", "/sbom", None), ("POST", "/push", {"reference": "x"}),
        ]  # fmt: skip
        for method, path, asked in attempts:
            problem(await client.request(method, f"/v1/templates/{name}{path}", json=asked), 404, "template_not_found")

    async def one() -> AsyncIterator[bytes]:
        yield b"their secrets"

    stolen = (await library.uploads.put(other, one())).id
    problem(await client.delete(f"/v1/uploads/{stolen}"), 404, "upload_not_found")
    body = {"name": "mine", "source": {"type": "upload", "upload": stolen}}
    problem(await client.post("/v1/templates", json=body), 404, "upload_not_found")
    async with library.uploads.claimed(other, stolen) as file:
        assert file.read_bytes() == b"their secrets"


async def test_an_upload_that_breaks_off_leaves_nothing(service: Service) -> None:
    reader, writer = await asyncio.open_unix_connection(str(service.settings.socket))
    writer.write(b"PUT /v1/uploads HTTP/1.1\r\nhost: t\r\ntransfer-encoding: chunked\r\n\r\n")
    writer.write(b"100000\r\n" + b"x" * 0x100000 + b"\r\n")
    await writer.drain()
    place = service.settings.cache_dir / "uploads"
    async with asyncio.timeout(10):
        while not any(path.stat().st_size for path in place.glob("*")):
            await asyncio.sleep(0.01)
    writer.close()
    del reader
    async with asyncio.timeout(10):
        while list(place.glob("*")):
            await asyncio.sleep(0.01)


async def test_paths_are_not_uploads(client: httpx.AsyncClient) -> None:
    for name in ("../../state.db", "/etc/passwd", "..", "", "."):
        body = {"name": "mine", "source": {"type": "upload", "upload": name}}
        problem(await client.post("/v1/templates", json=body), 404, "upload_not_found")
    answer = await client.delete("/v1/uploads/..%2F..%2Fstate.db")
    assert answer.status_code == 404


async def test_uploads_have_caps(anyio_backend: str) -> None:
    async with serving(most_bytes=1000, tenant_bytes=1500) as service, service.client() as client:
        assert "larger than 1000 bytes" in problem(await client.put("/v1/uploads", content=b"x" * 1001), 413)["detail"]
        first = await upload(client, b"x" * 1000)
        assert "wait to be used" in problem(await client.put("/v1/uploads", content=b"x" * 600), 413)["detail"]
        assert (await client.delete(f"/v1/uploads/{first}")).status_code == 204
        for _ in range(MAX_UPLOADS):
            await upload(client, b"")
        assert "waiting" in problem(await client.put("/v1/uploads", content=b""), 400)["detail"]
        assert len(list((service.settings.cache_dir / "uploads").iterdir())) == MAX_UPLOADS
    assert not (service.settings.cache_dir / "uploads").exists()


async def parts(*data: bytes) -> AsyncIterator[bytes]:
    for part in data:
        yield part


async def test_an_upload_is_used_once_or_expires(tmp_path: Path) -> None:
    store = Uploads(tmp_path / "u", kept_s=0.05)
    store.open()
    made = await store.put("a", parts(b"1", b"2"))
    assert made.expires_at <= time.time() + 0.05
    async with store.claimed("a", made.id) as path:
        assert path.read_bytes() == b"12"
        assert path.stat().st_mode & 0o777 == 0o600
        with pytest.raises(UploadNotFound):
            await store.remove("a", made.id)
    assert not path.exists()
    made = await store.put("a", parts(b"x"))
    async with asyncio.timeout(10):
        while list((tmp_path / "u").glob("*")):
            await asyncio.sleep(0.01)
    with pytest.raises(UploadNotFound):
        await store.remove("a", made.id)


async def test_what_a_killed_daemon_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "u").mkdir()
    (tmp_path / "u" / "upl-old").write_bytes(b"x")
    store = Uploads(tmp_path / "u")
    store.open()
    assert list((tmp_path / "u").glob("*")) == []
    store.close()


async def test_a_full_disk_refuses_and_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Uploads(tmp_path / "u")
    store.open()
    # What is kept free is made larger than any disk instead of filling this one.
    monkeypatch.setattr(uploads_module, "_KEEP_FREE_BYTES", 2**62)
    monkeypatch.setattr(uploads_module, "_KEEP_FREE_FRACTION", 2.0)
    with pytest.raises(NoSpace, match="free some disk"):
        await store.put("a", parts(b"x"))
    assert os.listdir(tmp_path / "u") == []


async def test_a_cancelled_upload_keeps_nothing(tmp_path: Path) -> None:
    store = Uploads(tmp_path / "u", most_bytes=10)
    store.open()
    begun = asyncio.Event()

    async def endless() -> AsyncIterator[bytes]:
        yield b"x"
        begun.set()
        await asyncio.sleep(1000)

    putting = asyncio.create_task(store.put("a", endless()))
    await begun.wait()
    putting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await putting
    with pytest.raises(TooLarge):
        await store.put("a", parts(b"x" * 11))
    assert os.listdir(tmp_path / "u") == []
    for _ in range(MAX_UPLOADS):
        await store.put("b", parts(b""))
    with pytest.raises(InvalidRequest, match="waiting"):
        await store.put("b", parts(b""))
    store.close()
    assert list((tmp_path / "u").glob("*")) == []
