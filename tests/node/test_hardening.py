"""What a SecurityConfig does to real sandboxes: filters, profiles, capabilities, ids; and what is refused."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator

import pytest
from tests.node.conftest import TENANT

from tartarus.model.errors import InvalidRequest, ProfileNotFound, RequestRejected, Unsupported
from tartarus.model.sandbox import ExecSpec, Isolation, SandboxSpec
from tartarus.model.seccomp import PutProfile
from tartarus.model.security import IdMapping, SeccompAction, SecurityConfig
from tartarus.node.sandbox import Sandbox
from tartarus.node.service import Node
from tartarus.policy.documents import read_policy
from tartarus.runtimes.idmap import PRIVILEGED_BASE

pytestmark = [pytest.mark.anyio, pytest.mark.needs("root", "cgroups")]
CONTAINER, GVISOR = Isolation.CONTAINER, Isolation.GVISOR
LOCK = "import ctypes; print(ctypes.CDLL(None).mlock(0, 0))"
SIGSYS = 128 + signal.SIGSYS


async def made(node: Node, level: Isolation = CONTAINER, **security: object) -> Sandbox:
    return await node.create(TENANT, SandboxSpec(isolation=level, security=SecurityConfig(**security)))  # type: ignore[arg-type]


async def said(sandbox: Sandbox, *argv: str, tty: bool = False) -> tuple[bytes, int]:
    """What a command in a sandbox wrote, and its status as a shell shows it."""
    process = await sandbox.exec(ExecSpec(argv=argv, tty=tty))
    out = b""
    while (piece := await process.read()) is not None:
        out += piece[1]
    return out, (await process.wait()).shell_status


async def use_every_file_operation(sandbox: Sandbox) -> None:
    """All that the agent does with files."""
    files = sandbox.files

    async def content() -> AsyncIterator[bytes]:
        yield b"x" * 100_000

    await files.mkdir("/tmp/a/b", parents=True)
    await files.write("/tmp/a/b/c", content())
    await files.stat("/tmp/a/b/c")
    await files.list("/tmp/a")
    assert b"".join([piece async for piece in files.read("/tmp/a/b/c")]) == b"x" * 100_000
    await files.move("/tmp/a/b/c", "/tmp/a/d")
    await files.remove("/tmp/a", recursive=True)


@pytest.fixture(scope="module", params=[Isolation.CONTAINER, Isolation.PROCESS, GVISOR], ids=lambda level: level.value)
def level(request: pytest.FixtureRequest) -> Isolation:
    chosen: Isolation = request.param
    return chosen


@pytest.mark.needs("runsc")
async def test_a_profile_refuses_what_it_does_not_name(node: Node, level: Isolation) -> None:
    sandbox = await made(node, level, seccomp_profile="blaze")
    assert await said(sandbox, "python3", "-c", LOCK) == (b"-1\n", 0)
    assert sandbox.record.spec.security == SecurityConfig(seccomp_profile="blaze")
    await sandbox.kill()
    sandbox = await made(node, level, seccomp_profile="blaze", seccomp_default=SeccompAction.TRAP)
    assert await said(sandbox, "python3", "-c", LOCK) == (b"", SIGSYS)
    assert await said(sandbox, "python3", "-c", "print(6*7)") == (b"42\n", 0)
    await sandbox.kill()


@pytest.mark.parametrize("isolation", [CONTAINER, Isolation.PROCESS], ids=lambda level: level.value)
async def test_kill_ends_the_whole_process(node: Node, isolation: Isolation) -> None:
    sandbox = await made(node, isolation, seccomp_profile="blaze", seccomp_default=SeccompAction.KILL)
    threaded = (
        "import ctypes, threading\n"
        "t = threading.Thread(target=ctypes.CDLL(None).mlock, args=(0, 0)); t.start(); t.join(); print('alive')"
    )
    assert await said(sandbox, "python3", "-c", threaded) == (b"", SIGSYS)
    await sandbox.kill()


async def test_killing_without_a_profile_is_for_what_the_level_refuses(node: Node) -> None:
    sandbox = await made(node, seccomp_default=SeccompAction.KILL)
    assert await said(sandbox, "python3", "-c", LOCK) == (b"0\n", 0)
    assert await said(sandbox, "mount", "-t", "tmpfs", "x", "/tmp") == (b"", SIGSYS)
    # glibc tries clone3 first for each thread.
    assert await said(sandbox, "python3", "-c", "import threading; threading.Thread(target=print).start()") == (
        b"\n",
        0,
    )
    await sandbox.kill()


async def test_the_smallest_class_does_everyday_work(node: Node) -> None:
    sandbox = await made(node, seccomp_profile="ember", seccomp_default=SeccompAction.KILL)
    await use_every_file_operation(sandbox)
    work = (
        "set -e; cd /tmp; echo x > f; tar cf t f; tar tf t; cp -p f g; ln -s f l; chmod 600 g; touch g; sort f | wc -l;"
        "find . -name f; grep -q x f; mv g h; rm -r h; sleep 0.01; sha256sum f | cut -c1-4"
    )
    out, status = await said(sandbox, "sh", "-c", work)
    assert (status, out.split()[-1]) == (0, b"73cb")
    assert (await said(sandbox, "sh", "-c", "tty -s && echo yes", tty=True))[0].strip() == b"yes"
    spawn = "import asyncio, subprocess; subprocess.run(['true'], check=True); asyncio.run(asyncio.sleep(0)); print(1)"
    assert await said(sandbox, "python3", "-c", spawn) == (b"1\n", 0)
    out, status = await said(sandbox, "python3", "-c", "import socket; socket.socket()")
    assert b"PermissionError" in out
    await sandbox.kill()


async def test_what_was_recorded_runs_and_nothing_else_does(node: Node) -> None:
    sandbox = await node.create(TENANT, SandboxSpec(isolation=CONTAINER, record_calls=True))
    assert await said(sandbox, "sh", "-c", "mkdir /tmp/d; ls -a /tmp/d | sort") == (b".\n..\n", 0)
    calls = node.profiles.recorded(sandbox).calls
    assert calls["mkdir"] == 1  # of a child, and exactly so often
    assert "mlock" not in calls
    await sandbox.kill()
    await node.profiles.put(TENANT, "listing", PutProfile(tuple(calls)))
    sandbox = await made(node, seccomp_profile="listing", seccomp_default=SeccompAction.KILL)
    assert await said(sandbox, "sh", "-c", "mkdir /tmp/d; ls -a /tmp/d | sort") == (b".\n..\n", 0)
    assert (await said(sandbox, "sh", "-c", "ln -s a /tmp/b"))[1] == SIGSYS
    assert (await said(sandbox, "python3", "-c", LOCK))[1] == SIGSYS
    await sandbox.kill()
    await node.profiles.remove(TENANT, "listing")
    with pytest.raises(ProfileNotFound):
        await made(node, seccomp_profile="listing")


async def test_recording_lets_nothing_through_that_the_level_refuses(node: Node) -> None:
    sandbox = await node.create(TENANT, SandboxSpec(isolation=CONTAINER, record_calls=True))
    assert b"denied" in (await said(sandbox, "sh", "-c", "mount -t tmpfs x /tmp 2>&1"))[0]
    assert "mount" not in node.profiles.recorded(sandbox).calls
    await sandbox.kill()


async def test_profiles_are_a_tenants_own(node: Node) -> None:
    await node.profiles.put(TENANT, "mine", PutProfile(("read",)))
    assert "mine" not in [profile.name for profile in await node.profiles.list("uid-4711")]
    with pytest.raises(ProfileNotFound):
        await node.profiles.get("uid-4711", "mine")
    for name in ("../mine", "ember", ".hidden"):
        with pytest.raises(InvalidRequest):
            await node.profiles.put(TENANT, name, PutProfile(("read",)))
    with pytest.raises(InvalidRequest):
        await node.profiles.put(TENANT, "odd", PutProfile(("no_such_call",)))
    await node.profiles.remove(TENANT, "mine")


@pytest.mark.needs("runsc")
@pytest.mark.parametrize("isolation", [CONTAINER, GVISOR], ids=lambda level: level.value)
async def test_added_capabilities_are_had_and_no_others(node: Node, isolation: Isolation) -> None:
    sandbox = await made(node, isolation, add_capabilities=("CAP_CHOWN",), drop_capabilities=("ALL",))
    assert await said(sandbox, "sh", "-c", "touch /tmp/f; chown 7:8 /tmp/f; stat -c %u:%g /tmp/f") == (b"7:8\n", 0)
    out, _ = await said(sandbox, "sh", "-c", "grep -E 'Cap(Prm|Eff|Bnd)' /proc/self/status | cut -f2 | sort -u")
    assert int(out, 16) == 1
    assert b"not permitted" in (await said(sandbox, "sh", "-c", "chroot / true 2>&1"))[0]
    await sandbox.kill()
    sandbox = await made(node, isolation, drop_capabilities=("ALL",))
    assert (await said(sandbox, "sh", "-c", "touch /tmp/f; chown 7:8 /tmp/f"))[1] != 0
    await sandbox.kill()


@pytest.mark.needs("runsc")
@pytest.mark.parametrize("isolation", [CONTAINER, GVISOR], ids=lambda level: level.value)
async def test_ids_beyond_the_mapping_do_not_exist(node: Node, isolation: Isolation) -> None:
    few = (IdMapping(container_id=0, size=100, host_id=PRIVILEGED_BASE),)
    sandbox = await made(node, isolation, uid_mapping=few, gid_mapping=few, add_capabilities=("SETUID", "SETGID"))
    become = "import os; os.setgroups([]); os.setgid({0}); os.setuid({0}); print(os.getuid())"
    assert await said(sandbox, "python3", "-c", become.format(99)) == (b"99\n", 0)
    assert b"Errno 22" in (await said(sandbox, "python3", "-c", become.format(100)))[0] or isolation is GVISOR
    await sandbox.kill()


async def test_a_profile_of_the_template_can_be_tightened_only(node: Node) -> None:
    with pytest.raises(Unsupported, match="kernel_lockdown"):
        await made(node, kernel_lockdown="integrity")
    with pytest.raises(Unsupported, match="recorded"):
        await node.create(TENANT, SandboxSpec(isolation=Isolation.PROCESS, record_calls=True))


async def test_auto_passes_over_levels_that_cannot_honour_it(node: Node) -> None:
    sandbox = await node.create(TENANT, SandboxSpec(security=SecurityConfig(user_namespace=True)))
    assert sandbox.record.isolation is CONTAINER
    await sandbox.kill()


async def test_a_policy_demands_the_least_hardening(node: Node) -> None:
    text = "id: strict\nsecurity:\n  seccomp_profiles: [ember, flame]\n  seccomp_default: kill\n  allowed_capabilities: []\n"
    node.admission.replace([read_policy(text)])
    try:
        with pytest.raises(RequestRejected, match=r"ember or flame.*seccomp_default: kill"):
            await made(node, add_capabilities=("CHOWN",))
        sandbox = await made(node, seccomp_profile="ember", seccomp_default=SeccompAction.KILL)
        await sandbox.kill()
    finally:
        node.admission.replace([])
