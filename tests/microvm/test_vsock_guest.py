"""A real machine whose agent listens on vsock: what a process of the guest can do there, which must be nothing."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tartarus.runtimes.microvm import disks, kernel
from tartarus.runtimes.microvm.driver import Hardware
from tartarus.runtimes.microvm.launcher import Launcher
from tartarus.runtimes.microvm.machinery import Machinery
from tartarus.runtimes.microvm.packing import packing_tool
from tartarus.runtimes.microvm.qemu import Qemu

pytestmark = [pytest.mark.anyio, pytest.mark.needs("root", "microvm", "cc")]
_PATIENCE_S = 90
# Connects over the machine's own loopback and greets as a host does. An agent that took it would greet back.
CLIENT = r"""
#include <stdio.h>
#include <errno.h>
#include <string.h>
#include <unistd.h>
#include <sys/socket.h>
struct address { unsigned short family, reserved; unsigned port, cid; unsigned char rest[4]; };
int main(void)
{
	static const unsigned char hello[16] = {4, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1};
	struct address agent = {40, 0, 1024, 1, {0}}, nobody = {40, 0, 1025, 1, {0}};
	unsigned char answer[64];
	(void)!write(3, "P", 1);
	for (int i = 0; i < 3; i++) {
		int fd = socket(40, SOCK_STREAM, 0);
		int connected = connect(fd, (struct sockaddr *)&agent, sizeof agent);
		if (connected == 0)
			(void)!send(fd, hello, sizeof hello, MSG_NOSIGNAL);
		long got = connected == 0 ? read(fd, answer, sizeof answer) : -2;
		printf("attack %d: connect %d, read %ld\n", i, connected, got);
		close(fd);
	}
	int fd = socket(40, SOCK_STREAM, 0);
	printf("nobody: connect %d\nattacks done\n", connect(fd, (struct sockaddr *)&nobody, sizeof nobody));
	fflush(stdout);
	for (;;)
		pause();
}
"""


class WithLoopback(Qemu):
    """QEMU, with an agent that listens on vsock in a kernel that has it over loopback alone."""

    modules: tuple[str, ...] = (*kernel.BOOT, "vsock_loopback")

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.command_line += " tartarus.channel=vsock:1024"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An image with the attacker in it."""
    files = tmp_path / "root"
    for name in ("bin", "etc", "root", "tmp"):
        (files / name).mkdir(parents=True)
    (tmp_path / "client.c").write_text(CLIENT)
    subprocess.run(["cc", "-static", "-o", files / "bin" / "client", tmp_path / "client.c"], check=True)
    subprocess.run([packing_tool(), "--quiet", tmp_path / "root.erofs", files], check=True, capture_output=True)
    return tmp_path / "root.erofs"


@pytest.fixture
async def machinery(state_dir: Path) -> AsyncIterator[Machinery]:
    """What boots it."""
    place = state_dir / "vsock"
    place.mkdir()
    launcher = await Launcher.open()
    made = Machinery(place, launcher, kernel.default(state_dir / "kernels"), WithLoopback(launcher, "tcg"))
    yield made
    await made.close()


async def test_a_guests_process_can_not_be_the_host(machinery: Machinery, root: Path) -> None:
    """The agent hangs up on whoever is not the host, before it reads a byte; and it goes on."""
    image = os.open(root, os.O_RDONLY)
    files = {"user": b"0 0", "argv": b"/bin/client\0", "env": b"PATH=/bin\0"}
    booting = machinery.booting(image, (), Hardware(192 * 1024**2, 1), disks.MIN_SCRATCH, files)
    async with booting as (machine, _):
        async with asyncio.timeout(_PATIENCE_S):
            while "attacks done" not in (said := await machine.console()):
                assert not machine.ended.done(), said
                await asyncio.sleep(0.1)
        # A connection that is closed unread is reset; nothing comes back in either case.
        attacks = [line for line in said.splitlines() if line.startswith("attack ")]
        assert len(attacks) == 3, said
        for line in attacks:
            assert "connect 0" in line, "the agent does not listen"
            assert line.endswith(("read 0", "read -1")), line
        assert "nobody: connect -1" in said
        assert not machine.ended.done()
    os.close(image)
