"""Where the compiled guest agent is, and how to hand it to a guest that must never change it."""

from __future__ import annotations

import os
from pathlib import Path

from tartarus.guest.sealing import seal
from tartarus.model.errors import GuestFailed

_MFD_EXEC = 0x10
_SEAL_ATTEMPTS = 200


def agent_binary() -> Path:
    """The agent that the build put beside this module. Raises GuestFailed when there is none."""
    path = Path(__file__).parent / "bin" / "tartarus-guest"
    if not os.access(path, os.X_OK):
        raise GuestFailed(
            "the guest agent is not built",
            why=f"{path} is missing or not executable",
            fix="reinstall tartarus, or run make in a source checkout",
        )
    return path


def _executable_memfd() -> int:
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        return os.memfd_create("tartarus-guest", flags | _MFD_EXEC)
    except OSError:
        # Kernels before 6.3 refuse the flag; there, every memfd is executable.
        return os.memfd_create("tartarus-guest", flags)


def agent_memfd(path: Path | None = None) -> int:
    """A new descriptor of a sealed memory file holding the agent; the caller closes it.

    All guests execute the same file, so its pages are shared between them, and the seals make
    sure that none of them, whatever it may open, can write to it.
    """
    content = (path or agent_binary()).read_bytes()
    fd = _executable_memfd()
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(fd, view) :]
        os.fchmod(fd, 0o555)
        seal(fd, _SEAL_ATTEMPTS)
    except BaseException:
        os.close(fd)
        raise
    return fd
