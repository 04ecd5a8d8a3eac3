"""Ways out of a profile, and out of a recording: each was a door that hardening made."""

from __future__ import annotations

from typing import Any

import pytest
from tests.escape.arena import Arena

from tartarus.model.sandbox import Isolation, SandboxSpec
from tartarus.model.security import SeccompAction, SecurityConfig
from tartarus.node.quarantine.typhon import examiner_security

pytestmark = [pytest.mark.anyio, pytest.mark.needs("root", "cgroups", "system-python")]

FRAME = """
import ctypes, json, os, sys
WORLD = json.loads(sys.stdin.readline())
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
def call(number, *args):
    ctypes.set_errno(0)
    result = libc.syscall(ctypes.c_long(number), *args)
    return "escaped" if result >= 0 else os.strerror(ctypes.get_errno())
def told(work):
    try:
        return work()
    except OSError as error:
        return os.strerror(error.errno)
"""
AROUND = """
found = {}
N = WORLD["numbers"]
found["the call"] = call(N["mlock"], 0, 0)
found["its x32 number"] = call(N["mlock"] | 0x40000000, 0, 0)
found["its number, above 32 bits"] = call(N["mlock"] | 1 << 32, 0, 0)
# A later filter that allows it can't undo an earlier one.
program = (ctypes.c_ubyte * 8)(6, 0, 0, 0, 0, 0, 0xFF, 0x7F)
class Fprog(ctypes.Structure):
    _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.c_void_p)]
libc.prctl(38, 1, 0, 0, 0)
call(N["seccomp"], 1, 0, ctypes.byref(Fprog(1, ctypes.addressof(program))))
found["after a filter that allows all"] = call(N["mlock"], 0, 0)
def agent():
    with open("/proc/1/mem", "r+b", buffering=0) as memory:
        return "escaped"
found["the agent's memory"] = told(agent)
found["the agent, traced"] = call(N["ptrace"], 16, 1, 0, 0)
print(json.dumps(found))
"""
RECORDED = """
N = WORLD["numbers"]
found = {}
def listeners():
    seen = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            fds = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
        except OSError:
            continue
        seen += [link for link in fds if "seccomp" in link]
    return seen
found["a listener to take"] = " ".join(listeners()) and "escaped" or "none"
found["what the level refuses"] = call(N["mount"], 0, 0, 0, 0, 0)
program = (ctypes.c_ubyte * 8)(6, 0, 0, 0, 0, 0, 0xC0, 0x7F)
class Fprog(ctypes.Structure):
    _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.c_void_p)]
found["a listener of its own"] = call(N["seccomp"], 1, 8, ctypes.byref(Fprog(1, ctypes.addressof(program))))
print(json.dumps(found))
"""
OUT = """
import socket
found = {}
for name, family in (("inet", 2), ("inet6", 10), ("unix", 1), ("netlink", 16), ("packet", 17), ("vsock", 40)):
    pid = os.fork()
    if pid == 0:
        try:
            socket.socket(family, socket.SOCK_STREAM if family < 16 else socket.SOCK_RAW)
        except OSError:
            os._exit(1)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    found[name] = "escaped" if status == 0 else "refused"
print(json.dumps(found))
"""


async def answers(arena: Arena, level: Isolation, program: str, **spec: Any) -> dict[str, str]:
    sandbox = await arena.sandbox(level, **spec)
    try:
        return await arena.attack(sandbox, FRAME + program.replace("print(json", "print('@verdict ' + json"))
    finally:
        await sandbox.kill()


@pytest.mark.parametrize("level", [Isolation.CONTAINER, Isolation.PROCESS], ids=lambda level: level.value)
async def test_nothing_leads_around_a_profile(arena: Arena, level: Isolation) -> None:
    security = SecurityConfig(seccomp_profile="ember", seccomp_default=SeccompAction.ERRNO)
    found = await answers(arena, level, AROUND, security=security)
    assert len(found) == 6
    assert "escaped" not in found.values(), found


async def test_a_recorded_sandbox_has_no_hold_on_its_recording(arena: Arena) -> None:
    found = await answers(arena, Isolation.CONTAINER, RECORDED, record_calls=True)
    assert found == {
        "a listener to take": "none", "what the level refuses": "Operation not permitted",
        "a listener of its own": "Device or resource busy",
    }  # fmt: skip


@pytest.mark.needs("runsc")
@pytest.mark.parametrize("level", [Isolation.CONTAINER, Isolation.GVISOR], ids=lambda level: level.value)
async def test_who_examines_evidence_talks_to_nobody(arena: Arena, level: Isolation) -> None:
    found = await answers(arena, level, OUT, security=examiner_security(level))
    assert set(found.values()) == {"refused"}


async def test_a_profile_is_not_found_by_anothers_name(arena: Arena) -> None:
    for name in ("..", "a/b", "%2e%2e", "sbx-x", ""):
        with pytest.raises(Exception, match=r"name|profile"):
            await arena.node.profiles.get("uid-1", name)
    assert SandboxSpec().security is None
