"""Bad requests: refused whole, with a code, what was wrong and what to do; nothing is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tartarus.control.app import MAX_BODY_BYTES
from tartarus.control.decode import decode
from tartarus.control.routes.code import CodeRequest
from tartarus.control.routes.streams import RunRequest
from tartarus.model.errors import InvalidRequest
from tartarus.model.sandbox import ExecSpec, SandboxSpec

if TYPE_CHECKING:
    import httpx

    from .conftest import Service

pytestmark = pytest.mark.anyio


def problem(response: httpx.Response, status: int, code: str = "invalid_request") -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    found: dict[str, Any] = response.json()
    assert found["status"] == status
    assert found["code"] == code
    assert found["type"] == f"urn:tartarus:error:{code}"
    assert found["title"]
    assert found["detail"]
    return found


BAD_SPECS = [
    (b"", "no body", ""),
    (b"{", "not JSON", "UTF-8"),
    (b"\xff\xfe", "not JSON", "UTF-8"),
    (b'{"template":"\\ud800"}', "not JSON", "UTF-8"),
    (b'{"timeout_s":NaN}', "not JSON", ""),
    (b"[]", "Expected `object`", "schema"),
    (b"null", "Expected `object`", "schema"),
    (b"[" * 100_000, "Expected `object`", "schema"),
    (b'{"templat":"host"}', "unknown key 'templat'", "did you mean 'template'?"),
    (b'{"command":{"argv":["a"],"envv":{}}}', "unknown key 'envv' in command", "did you mean 'env'?"),
    (b'{"resources":{"memory":1}}', "unknown key 'memory' in resources", "did you mean 'memory_bytes'?"),
    (b'{"mounts":[{"source":"/a","target":"/b","readonly":1}]}', "mounts[0]", "did you mean 'read_only'?"),
    (b'{"qqqq":1}', "unknown key 'qqqq'", "template"),
    (b'{"isolation":"contaner"}', "'contaner' is not one of the values in isolation", "did you mean 'container'?"),
    (b'{"network":"full"}', "'full' is not one of the values in network", "none"),
    (b'{"timeout_s":"10"}', "got `str` in timeout_s", ""),
    (b'{"timeout_s":-1}', "timeout is out of range", "366d"),
    (b'{"timeout_s":1e400}', "out of range", ""),
    (b'{"env":{"A":1}}', "Expected `str`", ""),
    (b'{"env":{"A=B":"1"}}', "not a variable name", "NAME=value"),
    (b'{"command":{}}', "argv", ""),
    (b'{"command":{"argv":[]}}', "no command", "tartarus run"),
    (b'{"command":{"argv":["a\\u0000b"]}}', "NUL byte", "remove it"),
    (b'{"command":{"argv":["a"],"env":{"A":"\\u0000"}}}', "NUL byte", "remove it"),
    (b'{"workdir":"/a\\u0000"}', "NUL byte", "remove it"),
    (b'{"workdir":"relative"}', "not absolute", "begin it with /"),
    (b'{"name":"sbx-mine"}', "not a valid name", "letters"),
    (b'{"name":"a\\u0000"}', "not a valid name", "letters"),
    (b'{"resources":{"memory_bytes":1}}', "memory is below", "8MiB"),
    (b'{"resources":{"cpu_milli":1.5}}', "Expected `int", ""),
    (b'{"mounts":[{"source":"/","target":"/proc/x"}]}', "would hide", "choose another"),
    (b'{"mounts":[{"source":"/a/../b","target":"/b"}]}', "not an absolute path", "--mount"),
    (b'{"resources":{"memory_bytes":2305843009213693952}}', "memory is out of range", "less than"),
    (b'{"resources":{"disk_bytes":99999999999999999999}}', "out of range", ""),
    (b'{"command":{"argv":["a"],"rows":70000}}', "rows is out of range", "65535"),
    (b'{"command":{"argv":["a"],"cols":0}}', "cols is out of range", "65535"),
    (b'{"command":{"argv":["a"],"timeout_s":0}}', "timeout is out of range", "366d"),
    (b'{"labels":{"a=b":"c"}}', "'a=b' is not a label's key", "key=value"),
    (b'{"labels":{"":"c"}}', "'' is not a label's key", "key=value"),
    (json.dumps({"labels": {"a" * 129: ""}}).encode(), "too long", "128"),
    (json.dumps({"labels": {str(n): "" for n in range(65)}}).encode(), "65 labels", "at most"),
    (json.dumps({"command": {"argv": ["a" * 200_000]}}).encode(), "bytes long", "file"),
    (json.dumps({"command": {"argv": ["a" * 100_000] * 30}}).encode(), "in all", "file"),
]


@pytest.mark.parametrize(("body", "detail", "fix"), BAD_SPECS, ids=[str(body[:40]) for body, _, _ in BAD_SPECS])
async def test_a_bad_spec_is_refused_whole(client: httpx.AsyncClient, body: bytes, detail: str, fix: str) -> None:
    found = problem(await client.post("/v1/sandboxes", content=body), 400)
    assert detail in found["detail"]
    assert fix in found["fix"]
    assert (await client.get("/v1/sandboxes")).json() == {"items": [], "next": None}


async def test_bodies_have_a_cap(client: httpx.AsyncClient, service: Service) -> None:
    problem(await client.post("/v1/sandboxes", content=b" " * (MAX_BODY_BYTES + 1)), 413)

    # Without a length, the cap is on what arrives; who goes on sending is cut off.
    _, writer = await asyncio.open_unix_connection(str(service.settings.socket))
    writer.write(b"POST /v1/sandboxes HTTP/1.1\r\nhost: t\r\ntransfer-encoding: chunked\r\n\r\n")

    async def send_for_ever() -> None:
        while True:
            writer.write(b"10000\r\n" + b" " * 65536 + b"\r\n")
            await writer.drain()

    with pytest.raises(ConnectionError):
        await send_for_ever()
    writer.close()


@pytest.mark.parametrize(
    ("query", "detail", "fix"),
    [
        ("stat=running", "unknown query parameter 'stat'", "did you mean 'state'?"),
        ("state=runing", "no state 'runing'", "did you mean 'running'?"),
        ("label=team", "'team' is not a label", "key=value"),
        ("limit=0", "limit: Expected `int` >= 1", ""),
        ("limit=1001", "limit: Expected `int` <= 1000", ""),
        ("limit=many", "limit", ""),
        ("cursor=@@@", "cursor", "begin again"),
        ("cursor=%00", "cursor", "begin again"),
    ],
)
async def test_a_bad_filter_never_lists_everything(
    client: httpx.AsyncClient, query: str, detail: str, fix: str
) -> None:
    found = problem(await client.get(f"/v1/sandboxes?{query}"), 400)
    assert detail in found["detail"]
    assert fix in found["fix"]


async def test_what_is_not_there(client: httpx.AsyncClient) -> None:
    assert "/v1/schema" in problem(await client.get("/v1/nothing"), 404)["fix"]
    problem(await client.patch("/v1/sandboxes"), 405)
    for path in (
        "/v1/sandboxes/none",
        "/v1/sandboxes/sbx-0000000000000000",
        "/v1/sandboxes/a%00b",
        "/v1/sandboxes/%2e",
    ):
        problem(await client.get(path), 404, "sandbox_not_found")
    for way in ("stats", "wait", "logs", "files?path=/a"):
        problem(await client.get(f"/v1/sandboxes/none/{way}"), 404, "sandbox_not_found")
    problem(await client.post("/v1/sandboxes", json={"template": "no-such"}), 404, "template_not_found")


async def test_missing_and_misspelt_parameters(client: httpx.AsyncClient, service: Service) -> None:
    made = (await client.post("/v1/sandboxes", json={})).json()["id"]
    files = f"/v1/sandboxes/{made}/files"
    assert "path" in problem(await client.get(files), 400)["detail"]
    assert "not absolute" in problem(await client.get(files, params={"path": "etc"}), 400)["detail"]
    assert "NUL" in problem(await client.get(files, params={"path": "/a\0"}), 400)["detail"]
    assert "file mode" in problem(await client.put(files, params={"path": "/a", "mode": "rw"}), 400)["detail"]
    assert "did you mean 'path'" in problem(await client.get(files, params={"pth": "/a"}), 400)["fix"]
    problem(await client.post(f"{files}/mkdir", json={"path": "a"}), 400)
    problem(await client.post(f"{files}/move", json={"source": "/a", "target": "b"}), 400)
    for number in (0, -1, 65, 1.5, "TERM"):
        problem(await client.post(f"/v1/sandboxes/{made}/signal", json={"signal": number}), 400)
    problem(await client.post(f"/v1/sandboxes/{made}/code", json={"code": "1", "timeout_s": 0}), 400)
    problem(await client.post(f"/v1/sandboxes/{made}/code", json={"code": "a\0"}), 400)
    problem(await client.get(f"/v1/sandboxes/{made}/wait", params={"timeout_s": "-1"}), 400)


async def test_garbage_instead_of_http_does_not_disturb_others(client: httpx.AsyncClient, service: Service) -> None:
    for garbage in (
        b"\x16\x03\x01\x02\x00",
        b"GET\r\n\r\n",
        b"A" * 100_000,
        b"POST /v1/sandboxes HTTP/1.1\r\nContent-Le",
    ):
        reader, writer = await asyncio.open_unix_connection(str(service.settings.socket))
        writer.write(garbage)
        writer.write_eof()
        await reader.read()
        writer.close()
    assert (await client.get("/healthz")).status_code == 200


async def test_the_api_describes_itself(client: httpx.AsyncClient) -> None:
    schema = (await client.get("/v1/schema")).json()
    assert schema["openapi"].startswith("3.1")
    body = schema["paths"]["/v1/sandboxes"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["$ref"].endswith("/SandboxSpec")
    assert "argv" in schema["components"]["schemas"]["ExecSpec"]["properties"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
FIELDS = st.sampled_from([*SandboxSpec.__struct_fields__, *ExecSpec.__struct_fields__, "spec", "keep", "code"])


@given(st.binary() | JSON.map(lambda value: json.dumps(value).encode()) | st.dictionaries(FIELDS, JSON).map(
    lambda value: json.dumps(value).encode()
), st.sampled_from([SandboxSpec, ExecSpec, RunRequest, CodeRequest]))  # fmt: skip
def test_any_bytes_are_a_request_or_refused(body: bytes, kind: type) -> None:
    with contextlib.suppress(InvalidRequest):
        assert isinstance(decode(kind, body), kind)
