"""The QEMU driver: its `microvm` machine, controlled over QMP.

A monitor gets all it uses as open descriptors: no paths, no network, no rights to make processes. What made saved
machines small and quick to restore: the memory is a file of its own that the saved state leaves out
(`x-ignore-shared`), mapped privately by every clone.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
from typing import Any

from tartarus.guest.binary import agent_binary
from tartarus.guest.channel import channel_pair
from tartarus.model.errors import GuestFailed
from tartarus.runtimes.cgroups import Cgroup
from tartarus.runtimes.microvm import hardened, kernel, versions
from tartarus.runtimes.microvm.driver import Boot, Hardware, Machine, Parts, bind_serial, end
from tartarus.runtimes.microvm.launcher import Ends, Launcher, descriptor
from tartarus.runtimes.microvm.qmp import Qmp
from tartarus.runtimes.nursery import Clone

_CAPABILITIES = [{"capability": "x-ignore-shared", "state": True}, {"capability": "events", "state": True}]
_QMP_TIMEOUT_S = 60.0
_SAVE_SET = 99
_ENDS = {
    "guest-reset": "its machine rebooted, or its kernel panicked",
    "guest-shutdown": "its machine switched itself off",
    "guest-panic": "its machine's kernel panicked",
}
_SCRATCH_OPTIONS = "discard=unmap,cache.no-flush=on"
_COMMAND_LINE = (
    "console=ttyS0 quiet loglevel=4 reboot=t panic=-1 tsc=reliable no_timer_check random.trust_cpu=on "
    f"cryptomgr.notests audit=0 nowatchdog noautogroup psi=0 lsm=landlock,lockdown {hardened.COMMAND_LINE}"
)
_CARD_ADDRESS = "02:00:00:00:00:01"
_SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"


class QemuMachine:
    """One QEMU process, held by its pidfd."""

    def __init__(self, born: Clone, channel: socket.socket, control: socket.socket) -> None:
        self.pid = born.pid
        self.channel = channel
        self._loop = asyncio.get_running_loop()
        self.pidfd = born.pidfd
        self.ended: asyncio.Future[None] = self._loop.create_future()
        self._loop.add_reader(self.pidfd, self._gone)
        self.qmp = Qmp(control)
        self._shutdown = self.qmp.expect("SHUTDOWN")

    @property
    def why_ended(self) -> str:
        """Why its machine ended, when the monitor said so."""
        said = self._shutdown.result() if self._shutdown.done() and not self._shutdown.exception() else None
        reason = said.get("reason") if isinstance(said, dict) else None
        return _ENDS.get(reason, "") if isinstance(reason, str) else ""

    async def pause(self) -> None:
        """Stop its processors."""
        await self.qmp.call("stop")

    async def resume(self) -> None:
        """Let them run."""
        await self.qmp.call("cont")

    async def save(self, device_state: int) -> None:
        """Stop it and write its devices' state."""
        await self.qmp.call("stop")
        await self.qmp.call("migrate-set-capabilities", capabilities=_CAPABILITIES)
        await self.qmp.call("getfd", fds=(device_state,), fdname="state")
        await self.qmp.call("migrate", uri="fd:state")
        await self._migrated()

    async def save_devices(self, device_state: int) -> None:
        """Write its devices' state. Not Xen's alone, whatever it is called: the one command that saves no memory."""
        the_set: dict[str, Any] = {"fdset-id": _SAVE_SET}
        await self.qmp.call("add-fd", fds=(device_state,), **the_set)
        try:
            await self.qmp.call("xen-save-devices-state", filename=f"/dev/fdset/{_SAVE_SET}", live=False)
        finally:
            await self.qmp.call("remove-fd", **the_set)

    async def load(self, device_state: int) -> None:
        """Take a saved state over."""
        await self.qmp.call("migrate-set-capabilities", capabilities=_CAPABILITIES)
        await self.qmp.call("getfd", fds=(device_state,), fdname="state")
        await self.qmp.call("migrate-incoming", uri="fd:state")
        await self._migrated()

    async def console(self) -> str:
        """The end of what its kernel said."""
        return str(await self.qmp.call("ringbuf-read", device="console", size=65536))[-4000:]

    def kill(self) -> None:
        """End the process at once."""
        if self.pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    async def _migrated(self) -> None:
        while True:
            waiter = self.qmp.expect("MIGRATION")
            status = (await self._migration()).get("status")
            if status == "completed":
                return
            if status == "failed":
                raise GuestFailed("the machine's state can't be saved or taken over", why=await self._why())
            await waiter

    async def _why(self) -> str:
        return str((await self._migration()).get("error-desc", "the monitor does not say"))[:500]

    async def _migration(self) -> dict[str, Any]:
        # A monitor that its guest took over may answer anything.
        answer = await self.qmp.call("query-migrate")
        return answer if isinstance(answer, dict) else {}

    def _gone(self) -> None:
        self._loop.remove_reader(self.pidfd)
        os.close(self.pidfd)
        self.pidfd = -1
        self.qmp.close()
        if not self.ended.done():
            self.ended.set_result(None)


class Qemu:
    """Starts QEMU. `accelerator`: kvm where a guest was seen to boot with it, else tcg."""

    name = versions.QEMU.name
    modules: tuple[str, ...] = kernel.BOOT
    loads_packed_kernels = True
    stands_ready = True
    maps_files = True
    takes_tap = True

    def __init__(self, launcher: Launcher, accelerator: str = "tcg", program: str | None = None) -> None:
        self._launcher = launcher
        self._accelerator = accelerator
        self._program = program or versions.program_of(versions.QEMU)
        self._ticks_khz = _ticks_khz()
        self.command_line = _COMMAND_LINE if accelerator == "kvm" else f"{_COMMAND_LINE} mitigations=off"

    def _words(self, boot: Boot) -> str:
        """An emulated machine's counter is the host's; on a busy host its kernel measures it wrong, and then hangs."""
        emulated = self._accelerator != "kvm" and self._ticks_khz
        ticks = f" tsc_early_khz={self._ticks_khz}" if emulated else ""
        return f"{self.command_line}{ticks} {boot.words}".rstrip()

    async def version(self) -> str:
        """Its version line. Raises IsolationUnavailable below 7.2, whose microvm was not tried."""
        return await asyncio.to_thread(versions.version_of, self._program, versions.QEMU)

    async def boot(self, parts: Parts, cgroup: Cgroup | None) -> Machine:
        """Start a machine from its kernel."""
        return await self._start(parts, cgroup, incoming=False)

    async def restore(
        self, parts: Parts, device_state: int, cgroup: Cgroup | None, filled: asyncio.Task[None] | None = None
    ) -> Machine:
        """Start a machine where another was saved."""
        machine = await self._start(parts, cgroup, incoming=True)
        try:
            if filled is not None:
                await asyncio.shield(filled)
            await machine.load(device_state)
        except BaseException:
            await end(machine)
            raise
        return machine

    def arguments(
        self, hardware: Hardware, numbers: list[int], *, n_binds: int = 0, share: bool, words: str = ""
    ) -> list[str]:
        """The command line. `numbers` of inherited descriptors: control, memory, root, scratch, binds, the tap of a
        network card, if there is to be one, and, to boot, the kernel and the initramfs; without these it waits for a
        saved state, which has them in its memory. `words`: the kernel's command line.
        """  # noqa: D205
        control, memory_file, root, scratch, *rest = numbers
        binds, rest = rest[:n_binds], rest[n_binds:]
        card, boot = (_card(rest[0]), rest[1:]) if hardware.network else ([], rest)
        accel = f"{self._accelerator},thread=multi,tb-size=64" if self._accelerator == "tcg" else self._accelerator
        memory = f"memory-backend-file,id=mem,size={hardware.memory_bytes},mem-path=/proc/self/fd/{memory_file}"
        argv = [
            self._program, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
            "-M", "microvm,pit=on,pic=off,rtc=off,isa-serial=on,memory-backend=mem", "-accel", accel,
            "-cpu", "host" if self._accelerator == "kvm" else "max",
            "-smp", str(hardware.cpus), "-m", f"{hardware.memory_bytes >> 20}M",
            "-object", f"{memory},share={'on' if share else 'off'}",
            "-chardev", f"socket,id=control,fd={control}", "-mon", "chardev=control,mode=control",
            "-chardev", "ringbuf,id=console,size=65536", "-serial", "chardev:console",
            "-add-fd", f"set=1,fd={root}", "-add-fd", f"set=2,fd={scratch}",
            "-blockdev", "driver=file,node-name=root,filename=/dev/fdset/1,read-only=on,locking=off",
            # What a machine flushes need not survive the host: the disk ends with the machine, or is saved whole.
            "-blockdev", f"driver=file,node-name=scratch,filename=/dev/fdset/2,locking=off,{_SCRATCH_OPTIONS}",
            "-device", "virtio-blk-device,drive=root,serial=tartarus-root",
            "-device", "virtio-blk-device,drive=scratch,serial=tartarus-scratch",
            *(word for index, fd in enumerate(binds) for word in _bind(index, fd)),
            "-device", "virtio-serial-device,max_ports=2",
            "-chardev", f"socket,id=channel,fd={descriptor(0)}",
            "-device", "virtserialport,chardev=channel,name=tartarus.channel",
            "-device", "virtio-rng-device",
            *card,
            # Or a state that was saved without memory, which has none, could not be taken over.
            "-global", "migration.send-configuration=off",
            "-sandbox", _SANDBOX,
        ]  # fmt: skip
        if not boot:
            return [*argv, "-S", "-incoming", "defer"]
        kernel, initramfs = (f"/proc/self/fd/{number}" for number in boot)
        return [*argv, "-kernel", kernel, "-initrd", initramfs, "-append", words]

    async def _start(self, parts: Parts, cgroup: Cgroup | None, *, incoming: bool) -> QemuMachine:
        ends = Ends(*channel_pair())
        control, their_control = socket.socketpair()
        fds = [their_control.fileno(), parts.memory, parts.root, parts.scratch, *parts.binds]
        fds += [] if parts.tap is None else [parts.tap]
        fds += [] if incoming or parts.boot is None else [parts.boot.kernel, parts.boot.initramfs]

        def arguments(numbers: list[int]) -> list[str]:
            words = "" if parts.boot is None else self._words(parts.boot)
            return self.arguments(parts.hardware, numbers, n_binds=len(parts.binds), share=parts.share, words=words)

        try:
            born = await self._launcher.start(arguments, ends, fds, cgroup, reopened=[parts.memory])
        except BaseException:
            ends.ours.close()
            control.close()
            raise
        finally:
            ends.theirs.close()
            their_control.close()
        machine = QemuMachine(born, ends.ours, control)
        try:
            await asyncio.wait_for(machine.qmp.open(), _QMP_TIMEOUT_S)
        except BaseException:
            await end(machine)
            raise
        return machine


def _bind(index: int, fd: int) -> list[str]:
    name = f"bind{index}"
    return [
        "-add-fd", f"set={3 + index},fd={fd}",
        "-blockdev", f"driver=file,node-name={name},filename=/dev/fdset/{3 + index},read-only=on,locking=off",
        "-device", f"virtio-blk-device,drive={name},serial={bind_serial(index)}",
    ]  # fmt: skip


def _card(tap: int) -> list[str]:
    # All have the same hardware address: each is alone with the router on its link.
    card = f"virtio-net-device,netdev=network,mac={_CARD_ADDRESS}"
    return ["-netdev", f"tap,id=network,fd={tap},vhost=off", "-device", card]


def _ticks_khz() -> int:
    """How fast the host's time stamp counter runs, in kHz."""
    said = subprocess.run([agent_binary(), "ticks"], capture_output=True, check=True, timeout=10).stdout
    return int(said)
