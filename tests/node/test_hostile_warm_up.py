"""Warm-ups that attack the host: the interpreter that a template brings, and what it runs, are foreign code."""

from __future__ import annotations

import asyncio
import os
import time

import pytest

from tartarus.model.definition import Definition
from tartarus.model.errors import TartarusError, TemplateFailed
from tartarus.model.library import TemplateBase
from tartarus.model.sandbox import SandboxSpec
from tartarus.runtimes.cgroups.files import ROOT, number_in, read_text

from .conftest import TENANT
from .making import Maker

pytestmark = [pytest.mark.anyio, pytest.mark.needs("root", "busybox", "cgroups")]

ANSWER = """
import os, socket, stat, struct, sys
found = [int(name) for name in os.listdir('/proc/self/fd')]
def is_socket(fd):
    try:
        return stat.S_ISSOCK(os.fstat(fd).st_mode)
    except OSError:
        return False
host = socket.socket(fileno=os.dup(next(filter(is_socket, found))))
"""
"""The socket on which a parked interpreter answers the daemon."""


async def longest_pause(work: asyncio.Task[object]) -> float:
    """How long, in seconds, the event loop served nobody else until `work` ended."""
    longest = 0.0
    while not work.done():
        began = time.monotonic()
        await asyncio.sleep(0.01)
        longest = max(longest, time.monotonic() - began)
    return longest


async def warmed(maker: Maker, script: str) -> str:
    """What became of a template with that warm-up."""
    try:
        await maker.make("evil", TemplateBase("host"), definition=Definition(warmup_script=script))
    except TemplateFailed as error:
        return str(error)
    return "ready"


@pytest.mark.parametrize(
    "said",
    ["b'x'", "struct.pack('<4sI', b'TRDY', 0)", "struct.pack('<4sIIi', b'TCLD', 1, 0, 7)", "b'x' * 60000"],
    ids=["rubbish", "ready", "answers", "large"],
)
async def test_a_flood_of_packets_holds_up_nobody(maker, said):
    flood = ANSWER + f"said = {said}\nwhile True:\n    host.send(said)\n"
    work = asyncio.create_task(warmed(maker, flood))
    assert await longest_pause(work) < 2
    assert "Bad file" not in await work
    assert await maker.names() <= {"evil"}


@pytest.mark.parametrize(
    "fd",
    ["os.open('/etc/hosts', os.O_RDONLY)", "os.memfd_create('no')", "os.pipe()[0]", "socket.socketpair()[0].fileno()"],
    ids=["file", "memory", "pipe", "socket"],
)
async def test_what_is_no_process_is_no_guest(maker, node, fd):
    lie = (
        ANSWER
        + "host.send(struct.pack('<4sI', b'TRDY', 0))\n"
        + f"fd = {fd}\n"
        + """
while True:
    asked = host.recv(65536)
    if not asked:
        break
    answer = struct.pack('<4sIIi', b'TCLD', struct.unpack_from('<I', asked, 4)[0], 0, 1)
    socket.send_fds(host, [answer], [fd])
"""
    )
    assert await warmed(maker, lie) == "ready"
    with pytest.raises(TartarusError):
        await node.create(TENANT, SandboxSpec(template="evil", timeout_s=20))
    before = await settled_files()
    for _ in range(3):
        with pytest.raises(TartarusError):
            await node.create(TENANT, SandboxSpec(template="evil", timeout_s=20))
    assert await settled_files() <= before + 1
    assert node._levels.hierarchy is not None
    assert [name for name in node._levels.hierarchy.existing() if name.startswith("sbx-")] == []


async def test_an_error_that_is_no_errno(maker, node):
    lie = (
        ANSWER
        + """
host.send(struct.pack('<4sI', b'TRDY', 0))
while (asked := host.recv(65536)):
    host.send(struct.pack('<4sIIi', b'TCLD', struct.unpack_from('<I', asked, 4)[0], 2**32 - 1, 1))
"""
    )
    assert await warmed(maker, lie) == "ready"
    with pytest.raises(TartarusError, match="fork a guest"):
        await node.create(TENANT, SandboxSpec(template="evil", timeout_s=20))


async def test_a_fork_bomb_stays_in_its_group(maker):
    script = """
import os, time
made = 0
try:
    while made < 6000:
        if not os.fork():
            time.sleep(600)
        made += 1
except OSError:
    raise SystemExit(f"{made} processes were made")
"""
    said = await warmed(maker, script)
    assert "processes were made" in said
    assert int(said.split(" processes were made")[0].split()[-1]) < 2100
    assert await maker.names() == set()


async def test_memory_has_an_end(maker, node):
    assert await warmed(maker, "x = 1") == "ready"
    groups = [name for name in node._levels.hierarchy.existing() if name.startswith("nursery-evil-")]
    assert groups
    found = [
        number_in(read_text(str(path)))
        for name in groups
        for limit in ("memory.limit_in_bytes", "memory.max")
        for path in ROOT.glob(f"**/{name}/{limit}")
    ]
    assert found
    assert all(0 < most < 2**40 for most in found)


async def settled_files() -> int:
    """How many, once what is made ahead for the next launches has been made."""
    counts: list[int] = []
    while len(counts) < 5 or len(set(counts[-5:])) > 1:
        await asyncio.sleep(0.1)
        counts.append(open_files())
    return counts[-1]


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))
