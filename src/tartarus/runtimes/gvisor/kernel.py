"""What a guest's own kernel is asked to do, over the socket on which runsc's commands ask it.

Each of those commands takes 15 to 25 ms to start and to end, a question by itself less than one; and only so does a
kernel that was saved go on. What comes from the socket is foreign: whoever breaks into that kernel answers here.
"""

from __future__ import annotations

import array
import asyncio
import base64
import os
import signal
import socket
from collections.abc import Sequence
from typing import Any

import msgspec

from tartarus.model.errors import GuestFailed, Unsupported
from tartarus.runtimes.base import Wire
from tartarus.runtimes.descriptors import close_all
from tartarus.runtimes.gvisor import link
from tartarus.runtimes.gvisor.log import RunscLog
from tartarus.runtimes.gvisor.spec import AGENT

_CALL_TIMEOUT_S = 20.0
_SETTLE_TIMEOUT_S = 3.0
"""Above the second that the agent's program waits at most."""
_MOST_REPLY = 64 * 1024
_MOST_SAID = 1000
_CAP_NET_ADMIN, _CAP_SYS_ADMIN = 1 << 12, 1 << 21
_EXITED_WITH_1 = 1 << 8
_OPENING = "resetConnectionLocked"
"""Where runsc's kernel fails over a connection that is being opened."""
_LOOPBACK = {
    "Name": "lo",
    "Addresses": [{"Address": "127.0.0.1", "PrefixLen": 8}, {"Address": "::1", "PrefixLen": 128}],
    "Routes": [
        {"Destination": {"IP": "127.0.0.0", "Mask": base64.b64encode(bytes([255, 0, 0, 0])).decode()}, "Gateway": ""},
        {"Destination": {"IP": "::1", "Mask": base64.b64encode(bytes([255] * 16)).decode()}, "Gateway": ""},
    ],
}
"""The one network link of a guest, as runsc's commands make it."""


class _Reply(msgspec.Struct):
    success: bool
    err: str = ""
    result: Any = None


class Kernel:
    """One guest's. `state`: the directory in which its runsc has the socket, as this process finds it."""

    def __init__(self, state: str, name: str) -> None:
        self._path = f"{state}/runsc-{name}.sock"
        self._name = name

    async def add_links(self, wire: Wire | None, before: Sequence[str] = ()) -> None:
        """Make its network, which is not saved: before a guest is restored into it. Raises GuestFailed, OSError.

        Without a wire it is its loopback. `before`: the addresses that the guest had elsewhere, which it has until
        `rename` takes them away: its kernel ends when a socket's address is not there as that is restored.
        """
        options: dict[str, Any] = {"LoopbackLinks": [_LOOPBACK]}
        passed: list[int] = []
        if wire is not None:
            packets, described = await asyncio.to_thread(link.take_over, wire, before)
            passed, options = [packets], options | described
        try:
            await self._call("CreateLinksAndRoutes", options, "runsc did not start", passed, manager="Network")
        finally:
            close_all(passed)

    async def pause(self) -> None:
        """Stop every program in it. Raises GuestFailed."""
        await self._call("Pause", None, "the sandbox can't be stopped for a moment")

    async def resume(self) -> None:
        """Let them go on. Raises GuestFailed."""
        await self._call("Resume", None, "the sandbox does not go on")

    async def save(self, files: Sequence[int], timeout_s: float) -> None:
        """Write it to open files (`layout.IMAGE_FILES`); it is afterwards as it was, less its connections to others.

        Raises GuestFailed, and Unsupported for one that opens a connection.
        """
        options = {
            "metadata": {"compression": "none"},
            "MemoryFileSaveOpts": {"ExcludeCommittedZeroPages": True},
            "have_pages_file": True,
            "Resume": True,
        }
        try:
            await self._call("Checkpoint", options, "the sandbox can't be saved", files, timeout_s)
        except GuestFailed as error:
            if _OPENING in error.why:
                raise _opening() from error
            raise

    async def restore(self, files: Sequence[int], device: int | None, timeout_s: float) -> None:
        """Become the guest that was saved to open files; `device`: what the platform needs. Raises GuestFailed."""
        options = {"HavePagesFile": True, "HaveDeviceFile": device is not None}
        passed = [*files] if device is None else [*files, device]
        await self._call("Restore", options, "runsc did not restore the sandbox", passed, timeout_s)

    async def settle(self) -> None:
        """Wait until no connection is being opened in it. Raises Unsupported when that takes long, and GuestFailed."""
        status, said = await self._run(["settle"], 0, "the sandbox can't be saved", _SETTLE_TIMEOUT_S)
        if status == _EXITED_WITH_1 and not said:
            raise _opening()
        if status != 0:
            raise GuestFailed("the sandbox can't be saved", why=said or "what looks at its connections was ended")

    async def rename(self, hostname: str, before: Sequence[str] = ()) -> None:
        """Give a restored guest a host name, and take away the addresses that it had before. Raises GuestFailed."""
        what = "the restored sandbox can't be named"
        status, said = await self._run(["name", hostname, *before], _CAP_SYS_ADMIN | _CAP_NET_ADMIN, what)
        if status != 0:
            raise GuestFailed(what, why=said or f"status {status!r:.20}", fix="tartarus doctor")

    async def _run(
        self, words: Sequence[str], capabilities: int, what: str, timeout_s: float = _CALL_TIMEOUT_S
    ) -> tuple[Any, str]:
        """Run the agent's program in it: its status, and what it said. Raises GuestFailed.

        Nothing else in a guest has these capabilities.
        """
        sets = {f"{kind}Caps": capabilities for kind in ("Permitted", "Inheritable", "Effective", "Bounding")}
        log = RunscLog()
        try:
            process = await self._call("ExecuteAsync", {
                "argv": [AGENT, *words], "envv": [], "wd": "/", "KUID": 0, "KGID": 0, "ExtraKGIDs": [],
                "Capabilities": {**sets, "AmbientCaps": 0}, "GuestFDs": [0, 1, 2], "ContainerID": self._name,
            }, what, [log.fileno()] * 3)  # fmt: skip
            try:
                status = await self._call("WaitPID", {"PID": process, "CID": self._name}, what, timeout_s=timeout_s)
            except BaseException:
                # The guest's root can stop it, and nobody could be restored from what is saved while it is there.
                await asyncio.shield(self._call("Signal", {
                    "CID": self._name, "PID": process, "Signo": signal.SIGKILL, "Mode": 0,
                }, what))  # fmt: skip
                raise
            return status, _shown(log.text())
        finally:
            log.close()

    async def _call(
        self,
        method: str,
        argument: Any,
        what: str,
        fds: Sequence[int] = (),
        timeout_s: float = _CALL_TIMEOUT_S,
        *,
        manager: str = "containerManager",
    ) -> Any:
        try:
            async with asyncio.timeout(timeout_s):
                reply = await self._ask(f"{manager}.{method}", argument, fds)
        except TimeoutError:
            raise GuestFailed(what, why=f"runsc did not answer within {timeout_s:g} s") from None
        except OSError as error:
            raise GuestFailed(what, why=f"runsc has ended ({os.strerror(error.errno or 0)})") from None
        except EOFError:
            raise GuestFailed(what, why="runsc ended meanwhile") from None
        if not reply.success:
            raise GuestFailed(what, why=_shown(reply.err), fix="tartarus doctor")
        return reply.result

    async def _ask(self, method: str, argument: Any, fds: Sequence[int]) -> _Reply:
        loop = asyncio.get_running_loop()
        question = msgspec.json.encode({"method": method, "arg": argument})
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asked:
            asked.setblocking(False)
            await loop.sock_connect(asked, self._path)
            # At once, and nothing behind it: what is answered may be hung up on.
            if asked.sendmsg([question], rights) < len(question):
                raise EOFError
            answer = b""
            while len(answer) < _MOST_REPLY:
                # Plain recv: descriptors that somebody sends along are not taken.
                if not (data := await loop.sock_recv(asked, _MOST_REPLY)):
                    break
                answer += data
                try:
                    return msgspec.json.decode(answer, type=_Reply)
                except msgspec.MsgspecError:
                    continue  # not all of it yet
        raise EOFError


def _opening() -> Unsupported:
    return Unsupported(
        "the sandbox can't be saved at this moment",
        why="a program in it is opening a connection, which gVisor can't write down",
        fix="try again when it stands or has failed, or use a microVM",
    )


def _shown(said: str) -> str:
    return said[:_MOST_SAID].encode("ascii", "backslashreplace").decode().strip()
