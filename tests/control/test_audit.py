"""What goes through the API is in the audit log, whoever's handler it is, and however it goes."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from pathlib import Path

import httpx
import msgspec
import pytest
from tests.control.conftest import Service

from tartarus.control.routes import ROUTES
from tartarus.model.audit import AuditPage, AuditQuery

pytestmark = pytest.mark.anyio
# What the node writes down itself, once it knows what was made of it.
_BY_THE_NODE = {
    "/v1/sandboxes",
    "/v1/run",
    "/v1/sandboxes/{sandbox_id:str}/exec",
    "/v1/sandboxes/{sandbox_id:str}/attach",
}


def test_every_handler_that_changes_something_says_what() -> None:
    silent = [
        path
        for route in ROUTES
        for path in route.paths
        if getattr(route, "http_methods", {"WS"}) - {"GET", "HEAD"}
        and not route.opt.keys() & {"audit", "audit_refused"}
        and path not in _BY_THE_NODE
    ]
    assert silent == []


async def found(service: Service, **query: object) -> AuditPage:
    return await service.api.audit.find(msgspec.convert(query, AuditQuery))


async def test_what_was_asked_is_there_with_how_it_went(service: Service, client: httpx.AsyncClient) -> None:
    made = (await client.post("/v1/sandboxes", json={})).json()["id"]
    assert (await client.put(f"/v1/sandboxes/{made}/files", params={"path": "/tmp/a\nb"}, content=b"x")).is_success
    assert (await client.delete("/v1/sandboxes/sbx-none")).status_code == 404
    assert (await client.delete(f"/v1/sandboxes/{made}")).is_success
    page = await found(service, sandbox=made)
    assert [one.action for one in page.entries] == [
        "sandbox.kill", "sandbox.end", "sandbox.file.write", "sandbox.create"
    ]  # fmt: skip
    assert page.entries[2].summary == "path=/tmp/a\nb"
    assert {one.actor for one in page.entries} == {f"uid-{os.geteuid()}", "tartarus"}
    (refused,) = (await found(service, action="sandbox.kill", decision="deny", limit=1)).entries
    assert (refused.target, refused.reason) == ("sbx-none", "HTTP 404")


async def test_pages(service: Service, client: httpx.AsyncClient) -> None:
    for _ in range(5):
        await client.delete("/v1/uploads/up-none")
    first = (await client.get("/v1/audit", params={"limit": 3, "action": "upload"})).json()
    rest = (
        await client.get("/v1/audit", params={"limit": 3, "action": "upload", "before": first["next_before"]})
    ).json()
    assert (len(first["entries"]), len(rest["entries"]), rest.get("next_before")) == (3, 2, None)
    assert first["entries"][2]["sequence"] > rest["entries"][0]["sequence"]
    for wrong in ({"limit": 0}, {"limit": 1001}, {"lmit": 1}):
        assert (await client.get("/v1/audit", params=wrong)).status_code == 400


async def test_verification_and_proof(service: Service, client: httpx.AsyncClient) -> None:
    await client.delete("/v1/uploads/up-none")
    verified = (await client.get("/v1/audit/verification")).json()
    assert (verified["findings"], verified["size"] > 0) == ([], True)
    assert (await client.get("/v1/audit/99999/proof")).status_code == 400


async def test_other_users_see_what_is_theirs(
    service: Service, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    await client.delete("/v1/uploads/up-none")
    from tartarus.control.peers import Peer

    monkeypatch.setattr(Peer, "uid", property(lambda _: 12345), raising=False)
    monkeypatch.setattr(Peer, "tenant", "uid-12345")
    assert (await client.get("/v1/audit", params={"tenant": f"uid-{os.geteuid()}"})).json()["entries"] == []
    for place in ("verification", "0/proof"):
        assert (await client.get(f"/v1/audit/{place}")).status_code == 403
    assert (await client.delete("/v1/policies/p")).status_code == 403
    denied = (await client.get("/v1/audit")).json()["entries"]
    assert [one["action"] for one in denied] == ["policy.delete", "audit.prove", "audit.verify"]
    assert {one["decision"] for one in denied} == {"deny"}


async def test_a_log_that_takes_nothing_stops_what_would_begin(
    service: Service, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tartarus.store.audit import log

    made = (await client.post("/v1/sandboxes", json={})).json()["id"]
    await client.get("/v1/audit")
    monkeypatch.setattr(log, "_MAX_WAITING", 0)
    refused = await client.post("/v1/sandboxes", json={})
    assert (refused.status_code, refused.json()["code"]) == (503, "daemon_unavailable")
    policy = {"text": "id: p\nresources: {max_pids: 1}\n"}
    assert (await client.put("/v1/policies/p", json=policy)).status_code == 503
    # What ends is let end.
    assert (await client.delete(f"/v1/sandboxes/{made}")).is_success
    monkeypatch.undo()
    assert (await client.get("/v1/policies")).json() == []
    gaps = (await client.get("/v1/audit", params={"action": "audit.gap"})).json()["entries"]
    assert sum(int(gap["reason"].split()[0]) for gap in gaps) == 5  # two beginnings, the policy's failure, two ends


async def test_a_database_that_was_put_back_or_written_to_by_others_shows(
    service: Service, client: httpx.AsyncClient
) -> None:
    async def findings() -> list[tuple[str, str]]:
        found = (await client.get("/v1/audit/verification")).json()["findings"]
        return [(one["where"], one["what"].partition(" entry ")[0]) for one in found]

    for policy, pids in (("put-back", 10), ("put-back", 20), ("gone", 10), ("kept", 10)):
        text = f"id: {policy}\nresources: {{max_pids: {pids}}}\n"
        assert (await client.put(f"/v1/policies/{policy}", json={"text": text})).is_success
    assert (await client.delete("/v1/policies/gone")).is_success
    for wrong in ({"text": "id: kept\nx: 1"}, {"text": "id: kept\n", "expected": 7}):
        assert not (await client.put("/v1/policies/kept", json=wrong)).is_success
    assert await findings() == []
    with contextlib.closing(sqlite3.connect(service.settings.database)) as database, database:
        database.execute("DELETE FROM policy_versions WHERE id = 'put-back' AND version = 2")
        database.execute("DELETE FROM policy_versions WHERE id = 'gone' AND version = 2")
        database.execute("UPDATE policy_versions SET text = 'id: kept' WHERE id = 'kept'")
        database.execute(
            "INSERT INTO policy_versions SELECT 'forged', 1, 'id: forged', digest, author, comment, created_at, deleted"
            " FROM policy_versions WHERE id = 'kept'"
        )
    other = "what is in force of it is not what"
    assert await findings() == [
        ("policy 'forged'", "it is in force, and no"), ("policy 'gone'", other), ("policy 'kept'", other),
        ("policy 'put-back'", other),
    ]  # fmt: skip
    with contextlib.closing(sqlite3.connect(service.settings.database)) as database, database:
        database.execute("DELETE FROM policy_versions")


async def test_no_sandbox_is_given_the_log_or_anything_else_of_the_daemons(
    service: Service, client: httpx.AsyncClient, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(service.settings.state_dir / "audit")
    for source in (service.settings.state_dir, tmp_path / "link/log", service.settings.database):
        refused = await client.post("/v1/sandboxes", json={"mounts": [{"source": str(source), "target": "/mnt/own"}]})
        assert (refused.status_code, refused.json()["code"]) == (400, "invalid_request")
        assert "daemon's own files" in refused.json()["why"]
