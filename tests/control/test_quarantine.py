"""Whose quarantined sandboxes are: a tenant may have its own held, and nothing more; another's are not there for it."""

from __future__ import annotations

import os

import httpx
import pytest
from tests.control.conftest import Service

from tartarus.control.peers import Peer
from tartarus.model.states import State

pytestmark = [pytest.mark.anyio, pytest.mark.needs("root", "cgroups")]
OWNER, OTHER = f"uid-{os.geteuid()}", "uid-12345"


def become(monkeypatch: pytest.MonkeyPatch, uid: int) -> None:
    monkeypatch.setattr(Peer, "uid", property(lambda _: uid), raising=False)
    monkeypatch.setattr(Peer, "tenant", f"uid-{uid}")


async def test_only_the_owner_lets_go_and_others_do_not_learn_that_it_is_there(
    service: Service, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = (await client.post("/v1/sandboxes", json={})).json()["id"]
    nowhere = await client.get("/v1/quarantine/case-none")
    case = (await client.post(f"/v1/sandboxes/{made}/quarantine", json={"detail": "mine"})).json()["id"]
    with monkeypatch.context() as patched:
        become(patched, 12345)
        assert (await client.post(f"/v1/sandboxes/{made}/quarantine", json={})).status_code == 404
        assert (await client.get("/v1/quarantine")).json() == []
        for name in (case, made):
            there = await client.get(f"/v1/quarantine/{name}")
            assert (there.status_code, there.json()["code"]) == (404, nowhere.json()["code"])
            assert there.json()["detail"].replace(name, "case-none") == nowhere.json()["detail"]
            for method, path in (("POST", "/release"), ("POST", "/examine"), ("DELETE", "")):
                body: dict[str, str] | None = None if method == "DELETE" else {}
                refused = await client.request(method, f"/v1/quarantine/{name}{path}", json=body)
                assert refused.status_code == 403
        own = (await client.post("/v1/sandboxes", json={})).json()["id"]
        held = (await client.post(f"/v1/sandboxes/{own}/quarantine", json={})).json()
        assert [one["id"] for one in (await client.get("/v1/quarantine")).json()] == [held["id"]]
        assert (await client.post(f"/v1/quarantine/{held['id']}/release", json={})).status_code == 403
        assert (await client.delete(f"/v1/sandboxes/{own}")).status_code == 423
        denied = (await client.get("/v1/audit", params={"action": "quarantine", "decision": "deny"})).json()["entries"]
        assert {(one["actor"], one["tenant"]) for one in denied} == {(OTHER, OTHER)}
        assert len(denied) == 8
    assert (await client.get(f"/v1/quarantine/{case}")).json()["status"] == "held"
    assert (await client.get(f"/v1/sandboxes/{made}")).json()["state"] == State.QUARANTINED.value
    for one in (case, held["id"]):
        assert (await client.delete(f"/v1/quarantine/{one}")).is_success
