"""kill -9 while templates are made: nothing half-made is offered afterwards, and nothing that was sent stays."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from tartarus.model.definition import Definition
from tartarus.model.errors import TartarusError
from tartarus.model.library import TemplateStatus
from tartarus.sdk import Sandbox, Template
from tartarus.sdk import library_calls as calls

from .place import Place, wait_until

pytestmark = pytest.mark.needs("root", "cgroups", "landlock")


def sent(place: Place) -> list[int]:
    """The sizes of the uploads that lie in its cache."""
    return [path.stat().st_size for path in (place.home / "cache" / "uploads").glob("*")]


def endless(stop: threading.Event) -> Iterator[bytes]:
    while not stop.wait(0.01):
        yield bytes(256 * 1024)


def test_an_upload_ends_with_the_daemon(home: Place) -> None:
    home.start()
    stop = threading.Event()
    outcome: list[Exception] = []

    def send() -> None:
        try:
            home.client.transport.call(calls.upload(), endless(stop))
        except TartarusError as error:
            outcome.append(error)

    sender = threading.Thread(target=send)
    sender.start()
    wait_until(lambda: any(size > 1024**2 for size in sent(home)), "some of it is there")
    home.end_daemon(signal.SIGKILL)
    stop.set()
    sender.join(60)
    assert [error.code for error in outcome if isinstance(error, TartarusError)] == ["daemon_unavailable"]
    assert sent(home)
    home.start()
    assert sent(home) == []


def test_an_upload_ends_with_its_client(up: Place) -> None:
    program = (
        "import sys, time; from tartarus.sdk import Client; from tartarus.sdk import library_calls as calls\n"
        "def parts():\n while True:\n  yield bytes(2**18); time.sleep(0.01)\n"
        "Client(sys.argv[1], start=False).transport.call(calls.upload(), parts())"
    )
    client = subprocess.Popen([sys.executable, "-c", program, str(up.home)])
    wait_until(lambda: any(size > 1024**2 for size in sent(up)), "some of it is there")
    os.kill(client.pid, signal.SIGKILL)
    client.wait()
    wait_until(lambda: sent(up) == [], "it is gone")


@pytest.mark.parametrize("attempt", range(3))
def test_a_template_is_there_whole_or_not_at_all(home: Place, attempt: int) -> None:
    home.start()
    moment = random.Random(attempt).uniform(0.0, 0.4)
    said = Definition(env={"GREETING": "hello"}, warmup_script="import decimal")

    def make() -> None:
        for number in range(100):
            try:
                Template.create("host", name=f"own-{number}", definition=said, client=home.client)
            except TartarusError:
                return

    maker = threading.Thread(target=make)
    maker.start()
    time.sleep(moment)
    home.end_daemon(signal.SIGKILL)
    maker.join(60)
    home.start()
    own = [found for found in Template.list(client=home.client) if not found.info.builtin]
    assert {found.info.status for found in own} <= {TemplateStatus.READY}
    Template.create("host", name="phoenix", definition=said, client=home.client)
    for found in [*own[-1:], Template.get("phoenix", client=home.client)]:
        with Sandbox.create(found.name, timeout_s=60, client=home.client) as sandbox:
            shown = sandbox.run(["python3", "-c", "import os; print(os.environ['GREETING'])"], check=True)
            assert shown.stdout == "hello\n"
