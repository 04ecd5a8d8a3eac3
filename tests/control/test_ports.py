"""HTTP and WebSockets to sandboxes' ports through the API, with a guest that answers as badly as it can."""

from __future__ import annotations

import asyncio
import contextlib
import posixpath
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.control import wire
from tests.control.conftest import Service
from websockets.exceptions import ConnectionClosed, InvalidStatus

from tartarus.control.gateway.fields import located
from tartarus.model.audit import AuditQuery
from tartarus.model.contract import Contract
from tartarus.model.sandbox import ExecSpec, Isolation, Network, SandboxSpec
from tartarus.node.reaching import MAX_CONNECTIONS
from tartarus.node.sandbox import Sandbox

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(30), pytest.mark.needs("root", "cgroups", "system-python")]
SERVER = Path(__file__).with_name("gateway.py").read_text()
TENANT = "uid-0"


async def serving(service: Service, **fields: object) -> Sandbox:
    command = ExecSpec(argv=("python3", "-c", SERVER))
    spec = SandboxSpec(**{"isolation": Isolation.CONTAINER, "command": command} | fields)  # type: ignore[arg-type]
    sandbox = await service.api.node.create(TENANT, spec)
    assert isinstance(sandbox, Sandbox)
    assert sandbox.main is not None
    assert await sandbox.main.read() == (1, b"ready\n")
    return sandbox


@pytest.fixture(scope="module")
async def guest(shared: Service) -> AsyncIterator[str]:
    """The path of a sandbox's port, in a module of which no test ends sandboxes that are not its own."""
    sandbox = await serving(shared)
    yield f"/v1/sandboxes/{sandbox.record.id}/ports/8080"
    await sandbox.kill()


@pytest.fixture
async def caller(shared: Service) -> AsyncIterator[httpx.AsyncClient]:
    async with shared.client() as client:
        yield client


async def test_a_request_goes_in_whole_and_without_the_callers_credentials(
    caller: httpx.AsyncClient, guest: str
) -> None:
    headers = {
        "authorization": "Bearer key", "cookie": "session=api", "connection": "x-hop", "x-hop": "1", "te": "trailers",
        "x-forwarded-for": "lie", "tartarus-anything": "1", "tartarus-guest-authorization": "Basic inside",
        "tartarus-guest-content-length": "99", "x-mine": "yes", "host": "api.example",
    }  # fmt: skip
    answer = await caller.post(f"{guest}/a%2Fb/%2e%2e/c//d?q=%20&path=x", headers=headers, content=b"body")
    line, _, rest = answer.text.partition("\r\n")
    assert line == "POST /a%2Fb/%2e%2e/c//d?q=%20&path=x HTTP/1.1"
    told = rest.partition("\r\n\r\n")[0].lower().split("\r\n")
    assert {"host: localhost:8080", "x-forwarded-host: api.example", f"x-forwarded-prefix: {guest}"} <= set(told)
    assert {"authorization: basic inside", "x-mine: yes", "content-length: 4", "connection: close"} <= set(told)
    assert not {"cookie", "x-hop", "te", "x-forwarded-for", "tartarus-anything"} & {one.split(":")[0] for one in told}
    assert [one for one in told if one.startswith(("authorization", "content-length"))] == [
        "authorization: basic inside", "content-length: 4"
    ]  # fmt: skip
    assert (await caller.get(guest)).text.startswith("GET / HTTP/1.1")
    assert (await caller.head(guest)).content == b""
    for method in ("PUT", "PATCH", "DELETE", "OPTIONS"):
        assert (await caller.request(method, guest)).text.startswith(method)
    assert (await caller.request("TRACE", guest)).status_code == 405


async def test_bodies_stream_both_ways_at_once(shared: Service, guest: str) -> None:
    reader, writer = await asyncio.open_unix_connection(str(shared.settings.socket))
    head = f"POST {guest}/upper HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    writer.write(head.encode() + b"5\r\nfirst\r\n")
    await reader.readuntil(b"FIRST")  # while the request goes on
    for _ in range(64):
        writer.write(b"7530\r\n" + b"abc" * 10_000 + b"\r\n")
    writer.write(b"0\r\n\r\n")
    said = b""
    while not said.endswith(b"0\r\n\r\n"):
        said += await reader.read(1 << 20)
    assert said.count(b"ABC" * 100) > 64 * 90
    writer.close()


async def test_an_answer_that_breaks_off_while_the_request_goes_on(shared: Service, guest: str) -> None:
    sandbox = shared.api.node.live(TENANT, guest.split("/")[3])
    assert isinstance(sandbox, Sandbox)
    reader, writer = await asyncio.open_unix_connection(str(shared.settings.socket))
    writer.write(f"POST {guest}/short HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\nabc".encode())
    with contextlib.suppress(ConnectionError):
        assert (await reader.read()).endswith(b"abc")
    await until_free(sandbox)
    writer.close()


async def test_an_answer_has_no_say_about_the_apis_origin(caller: httpx.AsyncClient, guest: str) -> None:
    answer = await caller.get(f"{guest}/hostile")
    headers = answer.headers
    assert not {
        "set-cookie", "strict-transport-security", "access-control-allow-origin", "www-authenticate", "x-hop",
        "service-worker-allowed", "keep-alive",
    } & headers.keys()  # fmt: skip
    assert headers.get_list("content-security-policy") != ["default-src 'self'"]
    assert headers["content-security-policy"].startswith("sandbox ")
    assert (headers["x-content-type-options"], headers["x-kept"], headers["tartarus-port"]) == (
        "nosniff",
        "yes",
        "8080",
    )
    assert headers["tartarus-version"] != "99"
    assert headers["tartarus-guest-set-cookie"] == "session=guest; Path=/"
    assert answer.content == b"<script>alert(1)</script>"
    away = await caller.get(f"{guest}/away")
    assert ("location" in away.headers, away.status_code) == (False, 307)
    assert (await caller.get(f"{guest}/moved")).headers["location"] == f"{guest}/there?a=b"


@given(st.lists(st.sampled_from(
    ["/", "..", ".", "%2e", "%2E.", "\\", "a", "?", "#", ":", "//", "http:", "localhost:8080", "@", "\t", "%2f", ";"]
)).map("".join))  # fmt: skip
def test_no_redirection_leads_out_of_the_port(location: str) -> None:
    prefix = "/v1/sandboxes/sbx-1/ports/8080"
    moved = located(location, "/a/b", prefix, 8080)
    if moved is None:
        return
    seen = urlsplit("".join(moved.split("\t")).replace("\\", "/"))
    assert (seen.scheme, seen.netloc) == ("", "")
    path = posixpath.normpath(seen.path.lower().replace("%2e", "."))
    assert f"{path}/".startswith(f"{prefix}/")


@pytest.mark.parametrize(
    "path", ["split", "control", "two-lengths", "huge", "many", "early-forever", "switch", "odd", "nonsense", "nothing"]
)
async def test_what_is_no_answer_is_a_problem(caller: httpx.AsyncClient, guest: str, path: str) -> None:
    answer = await caller.get(f"{guest}/{path}")
    assert (answer.status_code, answer.json()["code"]) == (502, "port_failed")
    assert "set-cookie" not in answer.headers


async def test_answers_end_where_they_said(caller: httpx.AsyncClient, guest: str) -> None:
    with pytest.raises(httpx.RemoteProtocolError):  # cut: nobody takes it for the whole
        await caller.get(f"{guest}/short")
    assert (await caller.get(f"{guest}/more")).content == b"abc"
    assert (await caller.get(f"{guest}/early")).content == b"ok"
    assert (await caller.get(f"{guest}/both")).content == b""  # chunks count, as RFC 9112 says
    assert (await caller.get(f"{guest}/unchanged")).status_code == 304
    assert (await caller.get(f"{guest}/old")).content == b"until the end"


async def test_an_endless_answer_is_held_back_and_ends_with_its_caller(
    shared: Service, caller: httpx.AsyncClient, guest: str
) -> None:
    sandbox = shared.api.node.live(TENANT, guest.split("/")[3])
    assert isinstance(sandbox, Sandbox)
    async with caller.stream("GET", f"{guest}/forever") as answer:
        pieces = answer.aiter_raw()
        await anext(pieces)
        assert len(sandbox._connections) == 1
        before = sandbox.channel.output_bytes
        await asyncio.sleep(0.1)  # nobody reads: what the daemon holds is bounded
        assert sandbox.channel.output_bytes - before < 64 * 1024**2
    silent = asyncio.create_task(caller.get(f"{guest}/silent"))
    await asyncio.sleep(0.1)
    silent.cancel()
    await asyncio.gather(silent, return_exceptions=True)
    await until_free(sandbox)


async def until_free(sandbox: Sandbox) -> None:
    for _ in range(500):
        if not sandbox._connections:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("a connection is still there")


async def test_websockets(shared: Service, guest: str) -> None:
    socket = shared.settings.socket
    async with wire.connect(socket, f"{guest}/ws?a=b") as talk:
        assert "set-cookie" not in talk.response.headers
        await talk.send("text")
        assert await talk.recv() == "TEXT"
        await talk.send(b"b" * 300_000)
        assert await talk.recv() == b"B" * 300_000
        await talk.close(4001, "bye")
    for path, code in {"huge": 1009, "masked": 1002, "not-text": 1007, "gone": 1014}.items():
        async with wire.connect(socket, f"{guest}/ws-{path}") as talk:
            with pytest.raises(ConnectionClosed) as closed:
                await talk.recv()
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == code, path
    async with wire.connect(socket, f"{guest}/ws-pieces") as talk:
        assert await talk.recv() == "ab"
        with pytest.raises(ConnectionClosed) as closed:
            await talk.recv()
        assert closed.value.rcvd is not None
        assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (4000, "no")
    for path, status in {"/ws-refused": 403, "/ws-wrong": 502, "/plain": 200, "/split": 502}.items():
        with pytest.raises(InvalidStatus) as refused:
            async with wire.connect(socket, f"{guest}{path}"):
                pass
        response = refused.value.response
        assert (response.status_code, "set-cookie" in response.headers) == (status, False)
    with pytest.raises(InvalidStatus) as refused:
        async with wire.connect(socket, "/v1/sandboxes/sbx-none/ports/80/ws"):
            pass
    assert refused.value.response.status_code == 404


async def test_who_may_not_and_what_is_written_down(
    shared: Service, caller: httpx.AsyncClient, guest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = guest.split("/")[3]
    root = guest.removesuffix("/8080")
    assert (await caller.get(f"{root}/8081")).json()["code"] == "invalid_state"  # nobody listens
    assert (await caller.get(f"{root}/0")).status_code == 400
    assert (await caller.get(f"{root}/65536")).status_code == 400
    assert (await caller.get(f"/v1/sandboxes/{name}%2Fports%2F8080/ports/8081")).status_code in {400, 404}
    page = await shared.api.audit.find(AuditQuery(sandbox=name, action="port.request", limit=3))
    assert [(one.summary, one.decision) for one in page.entries[1:]] == [
        ("GET port 65536", "error"), ("GET port 0", "error")
    ]  # fmt: skip
    from tartarus.control.peers import Peer

    with monkeypatch.context() as other:
        other.setattr(Peer, "tenant", "uid-12345")
        assert (await caller.get(f"{guest}/")).status_code == 404
    process = await shared.api.node.create(TENANT, SandboxSpec(isolation=Isolation.PROCESS))
    answer = await caller.get(f"/v1/sandboxes/{process.record.id}/ports/22/")
    assert (answer.status_code, answer.json()["code"]) == (501, "unsupported")  # its loopback is the host's
    await process.kill()


async def test_a_new_contract_ends_what_it_does_not_expose(shared: Service, caller: httpx.AsyncClient) -> None:
    first = Contract(exposed_ports=(8080,))
    sandbox = await serving(shared, network=Network.CONTRACT, contract=first)
    root = f"/v1/sandboxes/{sandbox.record.id}/ports/8080"
    assert (await caller.get(root)).is_success
    async with wire.connect(shared.settings.socket, f"{root}/ws") as talk:
        await talk.send("a")
        assert await talk.recv() == "A"
        await shared.api.node.contracts.swear(sandbox, Contract(exposed_ports=()))
        with pytest.raises(ConnectionClosed):
            await talk.recv()
    assert (await caller.get(root)).json()["why"] == "its contract names those that are"
    await shared.api.node.contracts.swear(sandbox, first)
    assert (await caller.get(root)).is_success
    await sandbox.kill()


@pytest.mark.needs("runsc")
async def test_a_sandbox_that_sleeps_wakes_for_a_request(shared: Service, caller: httpx.AsyncClient) -> None:
    sandbox = await serving(shared, isolation=Isolation.GVISOR)
    root = f"/v1/sandboxes/{sandbox.record.id}"
    assert (await caller.post(f"{root}/hibernate", json={})).is_success
    assert (await caller.get(root)).json()["state"] == "hibernated"
    assert (await caller.get(f"{root}/ports/8080/early")).content == b"ok"
    async with wire.connect(shared.settings.socket, f"{root}/ports/8080/ws") as talk:
        await talk.send("before")
        assert await talk.recv() == "BEFORE"
        assert (await caller.post(f"{root}/hibernate", json={})).is_success
        await talk.send("after")  # wakes it, and goes on
        assert await talk.recv() == "AFTER"
    await sandbox.kill()


async def test_neither_paused_nor_without_end(shared: Service, caller: httpx.AsyncClient, guest: str) -> None:
    name = guest.split("/")[3]
    sandbox = shared.api.node.live(TENANT, name)
    await sandbox.pause()
    paused = await caller.get(f"{guest}/early")
    await sandbox.resume()
    assert (paused.status_code, paused.json()["code"]) == (409, "invalid_state")
    async with contextlib.AsyncExitStack() as held:
        for _ in range(MAX_CONNECTIONS):
            await held.enter_async_context(sandbox.connection(8080))
        assert (await caller.get(f"{guest}/early")).json()["detail"] == "too many connections to this sandbox"
    assert (await caller.get(f"{guest}/early")).content == b"ok"
