"""Taps: links whose other end is a file, which a virtual machine monitor reads and writes (see the kernel's tuntap)."""

from __future__ import annotations

import fcntl
import os
import struct

from tartarus.network import namespace

_DEVICE = "/dev/net/tun"
_SET_LINK, _SET_INDEX = 0x400454CA, 0x400454DA
_TAP, _NO_HEADER, _OFFLOADS = 0x0002, 0x1000, 0x4000
_REQUEST = struct.Struct("16sH22x")


def create(name: str, index: int = 0) -> int:
    """A tap in the calling thread's network namespace, as an open file that it goes with; it is down. Raises OSError.

    `index`: of the link; 0 leaves it to the kernel.
    """
    file = os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if index:
            fcntl.ioctl(file, _SET_INDEX, struct.pack("=I", index))
        fcntl.ioctl(file, _SET_LINK, _REQUEST.pack(name.encode(), _TAP | _NO_HEADER | _OFFLOADS))
    except BaseException:
        os.close(file)
        raise
    return file


def create_apart() -> int:
    """A tap that leads nowhere, in a network namespace of its own: for a machine that is only to be saved."""
    made = namespace.create()
    try:
        return namespace.run_in(made, lambda: create("nowhere"))
    finally:
        os.close(made)
