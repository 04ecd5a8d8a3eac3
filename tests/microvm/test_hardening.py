"""What a machine's kernel refuses its own root: always, hardened, locked down; and programs that have less than root."""

from __future__ import annotations

import msgspec
import pytest

from tartarus.model.security import CAPABILITIES, Lockdown, SeccompAction
from tartarus.runtimes.base import RootFs
from tartarus.runtimes.confine.profiles import built_in
from tartarus.runtimes.hardening import Hardening
from tartarus.runtimes.microvm.guest import MachineGuest
from tartarus.runtimes.microvm.runtime import MicrovmRuntime
from tartarus.runtimes.microvm.snapshot import MachineSnapshot

from .conftest import sh, start

pytestmark = [pytest.mark.anyio, pytest.mark.needs("root", "busybox", "microvm")]
LOCKED = {
    "kernel/modules_disabled": "1", "kernel/kexec_load_disabled": "1", "kernel/unprivileged_bpf_disabled": "1",
    "kernel/usermodehelper/bset": "0\t0", "kernel/usermodehelper/inheritable": "0\t0",
}  # fmt: skip
SET = {
    "kernel/modprobe": "", "kernel/kptr_restrict": "2", "kernel/dmesg_restrict": "1", "net/core/bpf_jit_harden": "2",
    "fs/protected_symlinks": "1", "fs/protected_fifos": "2", "fs/suid_dumpable": "0", "dev/tty/ldisc_autoload": "0",
}  # fmt: skip
EVERY = (1 << len(CAPABILITIES)) - 1
HELPER = """#!/bin/sh
cat /proc/self/status > /work/helped
"""


async def hardened(runtime: MicrovmRuntime, rootfs: RootFs, **how: object) -> tuple[MachineSnapshot, MachineGuest]:
    made = await runtime.snapshot(msgspec.structs.replace(rootfs, hardening=Hardening(**how)))  # type: ignore[arg-type]
    assert isinstance(made, MachineSnapshot)
    return made, await start(runtime, made, f"machine-hard-{made.rootfs.hardening.digest}")


async def test_what_every_machine_closes_behind_itself(runtime: MicrovmRuntime, snapshot: MachineSnapshot) -> None:
    guest = await start(runtime, snapshot, "machine-usual")
    wanted = LOCKED | SET
    said = await sh(guest, "; ".join(f"cat /proc/sys/{name}" for name in wanted))
    assert dict(zip(wanted, said.split("\n"), strict=False)) == wanted
    for name, value in LOCKED.items():
        await sh(guest, f"echo 0 > /proc/sys/{name}; echo 1 1 > /proc/sys/{name}")
        assert await sh(guest, f"cat /proc/sys/{name}") == f"{value}\n", name
    assert "vsyscall" not in await sh(guest, "cat /proc/self/maps")
    assert await sh(guest, "mkdir /work/d; mount -t debugfs none /work/d 2>/dev/null; ls /work/d") == ""
    # A program that the kernel starts as its root when another crashes has no power.
    await guest.channel.write("/work/helper", HELPER.encode(), mode=0o755)
    crash = (
        "echo '|/work/helper' > /proc/sys/kernel/core_pattern; (ulimit -c unlimited; sh -c 'kill -SEGV $$'); sleep 1"
    )
    await sh(guest, crash)
    helped = dict(line.split(":\t") for line in (await sh(guest, "cat /work/helped")).splitlines() if "Cap" in line)
    assert {name: int(value, 16) for name, value in helped.items()} == dict.fromkeys(helped, 0) != {}
    await guest.destroy()


async def test_a_locked_down_kernel_keeps_its_root_out(runtime: MicrovmRuntime, rootfs: RootFs) -> None:
    made, guest = await hardened(runtime, rootfs, hardened_kernel=True, lockdown=Lockdown.CONFIDENTIALITY)
    words = (await sh(guest, "cat /proc/cmdline")).split()
    assert {"lockdown=confidentiality", "init_on_free=1", "slab_nomerge", "page_alloc.shuffle=1"} <= {*words}
    assert "[confidentiality]" in await sh(
        guest, "mkdir /work/s; mount -t securityfs none /work/s; cat /work/s/lockdown"
    )
    assert await sh(guest, "cat /proc/sys/user/max_user_namespaces; cat /proc/sys/kernel/oops_limit") == "0\n1\n"
    for attempt in ("head -c 1 /dev/mem", "head -c 4096 /proc/kcore", "head -c 1 /dev/port"):
        assert await sh(guest, f"{attempt} 2>/dev/null | wc -c") == "0\n", attempt
    await guest.destroy()
    await made.close()


async def test_programs_have_a_profile_and_no_capabilities(runtime: MicrovmRuntime, rootfs: RootFs) -> None:
    made, guest = await hardened(
        runtime, rootfs, dropped=EVERY, calls=built_in("ember"), default=SeccompAction.KILL
    )  # fmt: skip
    status = await sh(guest, "cat /proc/self/status")
    for name in ("CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert f"{name}:\t0000000000000000" in status
    assert "NoNewPrivs:\t1" in status
    assert "Seccomp_filters:\t1" in status
    assert await sh(guest, "mkdir /work/d; echo text > /work/d/f; ls /work/d; sleep 0.1") == "f\n"
    assert "Bad system call" in await sh(guest, "mount -t tmpfs none /work/d 2>&1; echo")
    for attempt in ("cat /proc/1/environ", "echo x > /proc/1/mem", "kill -9 1 && ls /proc/1/nothing"):
        assert await sh(guest, f"({attempt}) 2>&1 >/dev/null | head -c 1") != "", attempt
    # Neither by what the kernel starts.
    await guest.channel.write("/work/helper", HELPER.encode(), mode=0o755)
    await sh(guest, "echo '|/work/helper' > /proc/sys/kernel/core_pattern; sh -c 'kill -SEGV $$'; sleep 0.5")
    assert "CapEff:\t0000003fffffffff" not in await sh(guest, "cat /work/helped 2>/dev/null")
    # The agent is outside of it: it still sets the clock and switches the machine off.
    await guest.channel.write("/work/g", b"text")
    await guest.destroy()
    await made.close()
