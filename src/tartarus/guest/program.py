"""Syscall programs: what a new guest does to itself, decided on the host and executed blindly.

A box (namespaces, mounts, limits, filters) is set up by a list of system calls. The host writes
the list here, as data; two small executors run it: `agent/program.c` for plain guests and
`runner.py` for clones of a warmed interpreter. So the confinement is decided, tested and read in
one place, and both kinds of guest get the same one.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from tartarus.guest.syscalls import number

_HEADER = struct.Struct("<4sHHI")
_OP = struct.Struct("<BBHiiI6B2x6Q")
_MAGIC = b"TPRG"
_VERSION = 1
_SYSCALL, _RELOC = 0, 1
_IMM, _BLOB, _FD, _LOAD = 0, 1, 2, 3
_U64 = 0xFFFF_FFFF_FFFF_FFFF
MAX_ENCODED = 160 * 1024
"""Bytes: a program travels in one packet, whose size the default socket buffer (208 KiB) limits."""


@dataclass(frozen=True, slots=True)
class Fd:
    """An argument: the n-th file descriptor passed along with the program (0 is the channel)."""

    index: int


@dataclass(frozen=True, slots=True)
class Slot:
    """Four bytes in the program's memory that hold the result of an earlier call."""

    offset: int


@dataclass(frozen=True, slots=True)
class Ref:
    """Bytes in the program's memory; as an argument, their address."""

    offset: int
    size: int


Argument = int | str | bytes | Fd | Slot | Ref


class Program:
    """Builds one program. `steps` names each step, so that a guest's failure report can be read."""

    def __init__(self) -> None:
        self._ops: list[bytes] = []
        self._blob = bytearray()
        self._strings: dict[bytes, int] = {}
        self.steps: list[str] = []

    def blob(self, data: bytes) -> Ref:
        """Place bytes in the program's memory, aligned for any C structure."""
        while len(self._blob) % 8:
            self._blob.append(0)
        offset = len(self._blob)
        self._blob += data
        return Ref(offset, len(data))

    def slot(self) -> Slot:
        """Reserve four bytes for a call's result; place it inside a structure with `slot_at`."""
        return Slot(self.blob(b"\xff\xff\xff\xff").offset)

    def slot_at(self, ref: Ref, at: int) -> Slot:
        """A slot that overlays four bytes of a structure already placed with `blob`."""
        return Slot(ref.offset + at)

    def reloc(self, target: Ref, *, into: Ref, at: int) -> None:
        """Write the address of `target` into the structure `into`, `at` bytes from its start."""
        self._op(_RELOC, 0, (_IMM, _IMM), (target.offset, into.offset + at), step="")

    def syscall(self, name: str, *args: Argument, step: str = "", store: Slot | None = None, ok: int = 0) -> None:
        """Add a call. `step` says in words what it is for; `ok` is an errno that counts as success."""
        tags: list[int] = []
        values: list[int] = []
        for arg in args:
            tag, value = self._argument(arg)
            tags.append(tag)
            values.append(value)
        self._op(_SYSCALL, number(name), tags, values, step=step or name, store=store, ok=ok)

    def encode(self) -> bytes:
        """The program as one byte string."""
        encoded = _HEADER.pack(_MAGIC, _VERSION, len(self._ops), len(self._blob))
        encoded += b"".join(self._ops) + bytes(self._blob)
        if len(encoded) > MAX_ENCODED:
            raise ValueError(f"program of {len(encoded)} bytes is over {MAX_ENCODED}")
        return encoded

    def _argument(self, arg: Argument) -> tuple[int, int]:
        if isinstance(arg, int):
            return _IMM, arg & _U64
        if isinstance(arg, Fd):
            return _FD, arg.index
        if isinstance(arg, Slot):
            return _LOAD, arg.offset
        if isinstance(arg, Ref):
            return _BLOB, arg.offset
        text = arg if isinstance(arg, bytes) else arg.encode("utf-8", "surrogateescape")
        if b"\0" in text:
            raise ValueError(f"{text!r} has a NUL byte")
        if text not in self._strings:
            self._strings[text] = len(self._blob)
            self._blob += text + b"\0"
        return _BLOB, self._strings[text]

    def _op(
        self,
        kind: int,
        nr: int,
        tags: list[int] | tuple[int, ...],
        values: list[int] | tuple[int, ...],
        *,
        step: str,
        store: Slot | None = None,
        ok: int = 0,
    ) -> None:
        padding = 6 - len(tags)
        self._ops.append(
            _OP.pack(
                kind,
                0,
                ok,
                nr,
                -1 if store is None else store.offset,
                len(self.steps),
                *tags,
                *([0] * padding),
                *values,
                *([0] * padding),
            )
        )
        self.steps.append(step)
