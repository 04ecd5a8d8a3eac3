"""Sandboxes over HTTP: their life, how they are found, and that nobody finds another tenant's."""

from __future__ import annotations

import asyncio
import struct
from typing import TYPE_CHECKING, Any

import pytest

from .conftest import serving
from .test_requests import problem

if TYPE_CHECKING:
    import httpx

pytestmark = pytest.mark.anyio


def sh(script: str, **spec: Any) -> dict[str, Any]:
    return {"command": {"argv": ["sh", "-c", script]}, **spec}


async def create(client: httpx.AsyncClient, spec: dict[str, Any]) -> dict[str, Any]:
    response = await client.post("/v1/sandboxes", json=spec)
    assert response.status_code == 201, response.text
    record: dict[str, Any] = response.json()
    assert response.headers["location"] == f"/v1/sandboxes/{record['id']}"
    return record


def entries(log: bytes) -> list[tuple[int, bytes]]:
    found = []
    while log:
        _, stream, size = struct.unpack_from("<QBI", log)
        found.append((stream, log[13 : 13 + size]))
        log = log[13 + size :]
    return found


def text_of(log: bytes, stream: int) -> bytes:
    return b"".join(data for number, data in entries(log) if number == stream)


async def test_a_command_runs_to_its_end_and_leaves_its_record_and_output(client: httpx.AsyncClient) -> None:
    made = await create(client, sh("echo out; echo err >&2; exit 3", name="job", labels={"team": "red"}))
    assert made["state"] == "running"
    ended = (await client.get("/v1/sandboxes/job/wait")).json()
    assert (ended["id"], ended["state"], ended["exit_code"], ended["reason"]) == (made["id"], "failed", 3, "completed")
    assert ended["started_at"] <= ended["ended_at"]
    log = await client.get("/v1/sandboxes/job/logs")
    assert log.headers["content-type"].startswith("application/vnd.tartarus.log")
    assert text_of(log.content, 1) == b"out\n"
    assert text_of(log.content, 2) == b"err\n"
    assert (await client.get(f"/v1/sandboxes/{made['id']}")).json() == ended


async def test_logs_follow_until_the_end(client: httpx.AsyncClient) -> None:
    made = await create(client, {"command": {"argv": ["sh", "-c", "echo one; sleep 0.2; echo two"]}})
    log = await client.get(f"/v1/sandboxes/{made['id']}/logs", params={"follow": "1"})
    assert text_of(log.content, 1) == b"one\ntwo\n"


async def test_a_name_is_taken_while_its_sandbox_lives(client: httpx.AsyncClient) -> None:
    await create(client, {"name": "web"})
    found = problem(await client.post("/v1/sandboxes", json={"name": "web"}), 409, "name_taken")
    assert "tartarus kill web" in found["fix"]
    assert (await client.delete("/v1/sandboxes/web")).status_code == 204
    await create(client, {"name": "web"})


async def test_ending_is_idempotent(client: httpx.AsyncClient) -> None:
    made = await create(client, {})
    for _ in range(3):
        assert (await client.delete(f"/v1/sandboxes/{made['id']}")).status_code == 204
    ended = (await client.get(f"/v1/sandboxes/{made['id']}")).json()
    assert (ended["state"], ended["reason"]) == ("killed", "user_request")


async def test_what_needs_a_live_sandbox_says_that_it_has_ended(client: httpx.AsyncClient) -> None:
    made = await create(client, {"name": "web"})
    await client.delete("/v1/sandboxes/web")
    for way in ("pause", "resume", "contexts"):
        found = problem(await client.post(f"/v1/sandboxes/{made['id']}/{way}"), 409, "invalid_state")
        assert "killed" in found["detail"]
    problem(await client.get("/v1/sandboxes/web/stats"), 409, "invalid_state")


async def test_waiting_has_a_time_limit(client: httpx.AsyncClient) -> None:
    made = await create(client, {})
    record = (await client.get(f"/v1/sandboxes/{made['id']}/wait", params={"timeout_s": "0.01"})).json()
    assert record["state"] == "running"


async def test_a_waiter_hears_of_the_end(client: httpx.AsyncClient) -> None:
    made = await create(client, {})
    waiting = asyncio.create_task(client.get(f"/v1/sandboxes/{made['id']}/wait"))
    await client.delete(f"/v1/sandboxes/{made['id']}")
    assert (await waiting).json()["state"] == "killed"


async def test_signals_reach_the_main_command(client: httpx.AsyncClient) -> None:
    made = await create(client, {"command": {"argv": ["sleep", "1000"]}})
    assert (await client.post(f"/v1/sandboxes/{made['id']}/signal", json={"signal": 15})).status_code == 204
    ended = (await client.get(f"/v1/sandboxes/{made['id']}/wait")).json()
    assert (ended["state"], ended["exit_signal"]) == ("failed", 15)
    idle = await create(client, {})
    problem(await client.post(f"/v1/sandboxes/{idle['id']}/signal", json={"signal": 15}), 409, "invalid_state")


async def test_pause_and_resume(client: httpx.AsyncClient) -> None:
    made = await create(client, {})
    assert (await client.post(f"/v1/sandboxes/{made['id']}/pause")).json()["state"] == "paused"
    problem(await client.post(f"/v1/sandboxes/{made['id']}/pause"), 409, "invalid_state")
    assert (await client.get(f"/v1/sandboxes/{made['id']}")).json()["state"] == "paused"
    assert (await client.post(f"/v1/sandboxes/{made['id']}/resume")).json()["state"] == "running"
    assert (await client.get(f"/v1/sandboxes/{made['id']}/stats")).json()["pids"] >= 0


async def test_listing_filters_and_pages(client: httpx.AsyncClient) -> None:
    made = [await create(client, {"labels": {"n": str(number), "team": "red"}}) for number in range(5)]
    await client.delete(f"/v1/sandboxes/{made[0]['id']}")

    async def ids(**query: Any) -> list[str]:
        return [record["id"] for record in (await client.get("/v1/sandboxes", params=query)).json()["items"]]

    newest_first = [record["id"] for record in reversed(made)]
    assert await ids() == newest_first
    assert await ids(state="running") == newest_first[:4]
    assert await ids(state=["killed", "lost"]) == newest_first[4:]
    assert await ids(label="n=3") == [made[3]["id"]]
    assert await ids(label=["n=3", "team=red"]) == [made[3]["id"]]
    assert await ids(label=["n=3", "team=blue"]) == []
    seen, query = [], {"limit": "2"}
    while True:
        page = (await client.get("/v1/sandboxes", params=query)).json()
        seen += [record["id"] for record in page["items"]]
        if page["next"] is None:
            break
        query["cursor"] = page["next"]
    assert seen == newest_first


async def test_a_unique_id_prefix_is_enough(client: httpx.AsyncClient) -> None:
    made = await create(client, {})
    assert (await client.get(f"/v1/sandboxes/{made['id'][:14]}")).json()["id"] == made["id"]
    assert (await client.post(f"/v1/sandboxes/{made['id'][:14]}/pause")).status_code == 200


async def test_a_failed_start_leaves_a_record_that_says_so(client: httpx.AsyncClient) -> None:
    spec = {"command": {"argv": ["/no/such/program"]}, "name": "bad"}
    problem(await client.post("/v1/sandboxes", json=spec), 422, "command_not_found")
    record = (await client.get("/v1/sandboxes/bad")).json()
    assert (record["state"], record["reason"]) == ("failed", "start_failed")
    await create(client, {"name": "bad"})


async def test_metrics_count_under_the_roadmaps_names(client: httpx.AsyncClient) -> None:
    async def counts() -> dict[str, float]:
        response = await client.get("/metrics")
        assert response.headers["content-type"].startswith("text/plain; version=")
        lines = [line for line in response.text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}

    before = await counts()
    made = await create(client, sh("exit 0"))
    await client.get(f"/v1/sandboxes/{made['id']}/wait")
    await create(client, {})
    after = await counts()
    grown = {name: value - before.get(name, 0.0) for name, value in after.items()}
    assert grown['tartarus_sandbox_launch_duration_seconds_count{node="test",template="host"}'] == 2
    assert grown['tartarus_sandbox_active_count{node="test",template="host"}'] == 1
    assert grown['tartarus_sandbox_total{status="succeeded",template="host"}'] == 1
    hits = grown.get('tartarus_snapshot_cache_hits_total{template="host"}', 0)
    assert hits + grown.get('tartarus_snapshot_cache_misses_total{template="host"}', 0) == 2


async def test_the_daemon_says_who_it_is(client: httpx.AsyncClient) -> None:
    version = (await client.get("/v1/version")).json()
    assert version["api"] == 1
    assert version["pid"] > 0
    assert {(await client.get(way)).status_code for way in ("/healthz", "/readyz", "/v1/templates", "/v1/levels")} == {
        200
    }


async def test_shutdown_ends_the_sandboxes_and_then_the_server() -> None:
    async with serving() as service, service.client() as client:
        made = await create(client, {})
        waiting = asyncio.create_task(client.get(f"/v1/sandboxes/{made['id']}/wait"))
        await asyncio.sleep(0.05)
        assert (await client.post("/v1/shutdown")).status_code == 202
        ended = (await waiting).json()
        assert (ended["state"], ended["reason"]) == ("killed", "node_drain")
