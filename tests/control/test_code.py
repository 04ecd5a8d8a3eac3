"""Code contexts over HTTP: state stays, events stream, what dies is replaced."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest

from .test_requests import problem
from .test_sandboxes import create

if TYPE_CHECKING:
    import httpx

pytestmark = pytest.mark.anyio


@pytest.fixture
async def box(client: httpx.AsyncClient) -> str:
    return f"/v1/sandboxes/{(await create(client, {}))['id']}"


async def cell(client: httpx.AsyncClient, box: str, code: str, **more: Any) -> list[dict[str, Any]]:
    answer = await client.post(f"{box}/code", json={"code": code, **more})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("application/x-ndjson")
    return [json.loads(line) for line in answer.text.splitlines()]


def plain(events: list[dict[str, Any]]) -> list[str]:
    return [event["data"]["text/plain"] for event in events if event["type"] == "result"]


async def test_variables_stay_between_cells_of_the_default_context(client: httpx.AsyncClient, box: str) -> None:
    await cell(client, box, "x = 20")
    events = await cell(client, box, "print('hello'); x + 1")
    assert [event["type"] for event in events] == ["stdout", "result", "done"]
    assert (events[0]["text"], plain(events)) == ("hello\n", ["21"])


async def test_contexts_are_apart(client: httpx.AsyncClient, box: str) -> None:
    first, second = [(await client.post(f"{box}/contexts")).json()["id"] for _ in range(2)]
    await cell(client, box, "x = 1", context=first)
    assert (await cell(client, box, "x", context=second))[0]["name"] == "NameError"
    assert plain(await cell(client, box, "x", context=first)) == ["1"]
    assert (await client.delete(f"{box}/contexts/{first}")).status_code == 204
    problem(await client.post(f"{box}/code", json={"code": "x", "context": first}), 404, "context_not_found")
    problem(await client.delete(f"{box}/contexts/{first}"), 404, "context_not_found")
    problem(await client.post(f"{box}/contexts/none/interrupt"), 404, "context_not_found")


async def test_many_first_cells_at_once_share_one_default_context(client: httpx.AsyncClient, box: str) -> None:
    await asyncio.gather(*(cell(client, box, f"v{number} = {number}") for number in range(6)))
    assert plain(await cell(client, box, "v0 + v1 + v2 + v3 + v4 + v5")) == ["15"]


async def test_an_interrupt_ends_the_cell_and_keeps_the_variables(client: httpx.AsyncClient, box: str) -> None:
    context = (await client.post(f"{box}/contexts")).json()["id"]
    await cell(client, box, "x = 5", context=context)
    request = {"code": "print('on', flush=True)\nwhile True: pass", "context": context}
    async with client.stream("POST", f"{box}/code", json=request) as answer:
        lines = answer.aiter_lines()
        assert json.loads(await anext(lines))["text"] == "on\n"
        assert (await client.post(f"{box}/contexts/{context}/interrupt")).status_code == 204
        rest = [json.loads(line) async for line in lines]
    assert rest[0]["name"] == "KeyboardInterrupt"
    assert plain(await cell(client, box, "x", context=context)) == ["5"]


async def test_a_client_that_leaves_interrupts_its_cell(client: httpx.AsyncClient, box: str) -> None:
    await cell(client, box, "x = 5")
    async with client.stream(
        "POST", f"{box}/code", json={"code": "print('on', flush=True)\nwhile True: pass"}
    ) as answer:
        await anext(answer.aiter_lines())
    assert plain(await cell(client, box, "x")) == ["5"]


async def test_a_cell_has_a_time_limit(client: httpx.AsyncClient, box: str) -> None:
    events = await cell(client, box, "while True: pass", timeout_s=0.2)
    assert [event["type"] for event in events] == ["error", "done"]


async def test_a_default_context_that_died_is_replaced(client: httpx.AsyncClient, box: str) -> None:
    await cell(client, box, "x = 5")
    problem(await client.post(f"{box}/code", json={"code": "import os; os._exit(7)"}), 502, "guest_failed")
    assert (await cell(client, box, "x"))[0]["name"] == "NameError"
    events = await cell(client, box, "print('said', flush=True); import os; os._exit(7)")
    assert events[-1]["type"] == "problem"
    assert events[-1]["problem"]["code"] == "guest_failed"
    assert plain(await cell(client, box, "1")) == ["1"]


async def test_a_closed_default_context_is_replaced(client: httpx.AsyncClient, box: str) -> None:
    await cell(client, box, "1")
    default = (await cell(client, box, "import os; os.getpid()"))[0]["data"]["text/plain"]
    assert plain(await cell(client, box, "os.getpid()")) == [default]
