"""`examples/egress.sh`: one domain at one port and nothing else, counted, audited, punished; and nothing of it is left."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from tests.project.test_examples import TARTARUS
from tests.project.test_project import ROOT

pytestmark = pytest.mark.needs("root", "nft", "ip", "cgroups", "system-python")


def test_one_domain_and_nothing_else() -> None:
    done = subprocess.run(
        [str(ROOT / "examples" / "egress.sh")], capture_output=True, text=True, timeout=240, check=False,
        env={**os.environ, "TARTARUS": TARTARUS, "PYTHON": sys.executable},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["shop.example:8443", "hello", "from", "203.0.113.80"] in lines
    assert done.stdout.count("hello from") == 1
    assert ["network", "cut", "yes"] in lines
    assert ["contract", "contract.json"] in [words[:2] for words in lines]
    assert done.stdout.count("No route to host") == 5
    assert done.stdout.count("the name does not resolve") == 2
    counted = {words[0]: int(words[1]) for words in lines if len(words) == 2 and words[1].isdecimal()}
    assert counted["opened"] == 2
    assert (counted["proxied"], counted["refused_proxy_name"]) == (1, 1)
    assert "(as evil.example) tartarus: refused by the egress proxy" in done.stdout
    assert done.stdout.count("proxy.refuse") == done.stdout.count("proxy.connect") == 1
    assert counted["refused_contract"] == 2
    assert {counted[f"refused_{reason}"] for reason in ("host", "metadata", "private")} == {1}
    assert "network.refused" in done.stdout
    assert "egress" not in subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
