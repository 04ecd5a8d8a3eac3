"""`swear` with a live sandbox, and what the policies say to it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.cli.kit import refused, text

from tartarus import Sandbox

pytestmark = [pytest.mark.needs("root", "cgroups", "system-python"), pytest.mark.usefixtures("clean")]


def test_a_live_sandbox_is_held_to_another_contract(tmp_path: Path) -> None:
    with Sandbox.create(isolation="container", allow=["203.0.113.0/24:80"]) as sandbox:
        assert text("swear", sandbox.id, "--allow", "198.51.100.0/24:80,443") == (
            f"{sandbox.id} may now reach 198.51.100.0/24:80,443\n"
        )
        file = tmp_path / "contract.yaml"
        file.write_text("allowed_cidrs: [203.0.113.7/32]\nexposed_ports: [80]\n")
        told = json.loads(text("swear", sandbox.id, "--network", str(file), "--json"))
        assert (told["contract"]["allowed_cidrs"], told["contract"]["exposed_ports"]) == (["203.0.113.7/32"], [80])
        assert "--allow or --network" in refused("swear", sandbox.id)
        contract = sandbox.network().contract
        assert contract is not None
        assert contract.allowed_cidrs == ("203.0.113.7/32",)
        assert text("swear", sandbox.id, "--network", "none") == f"{sandbox.id} may now reach nothing\n"
        log = json.loads(text("audit", "list", "--action", "network.swear", "--sandbox", sandbox.id, "--json"))
        assert [entry["decision"] for entry in log] == ["allow"] * 3
    with Sandbox.create() as closed:
        assert "without a network" in refused("swear", closed.id, "--network", "open")
        address = closed.port(8000)
        assert address.url == f"http://tartarus/v1/sandboxes/{closed.id}/ports/8000/"
