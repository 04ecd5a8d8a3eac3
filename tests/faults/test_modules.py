"""kill -9 of the daemon while it has a module compiled: nothing runs on, and nothing half-made is ever run."""

from __future__ import annotations

import contextlib
import signal
import threading

import pytest
from tests.wasm.modules import HELLO

from tartarus.model.errors import TartarusError
from tartarus.sdk import Sandbox

from .place import Place, wait_until

pytestmark = pytest.mark.needs("root", "cgroups", "landlock")


def _number(value: int) -> bytes:
    """LEB128, as modules write their numbers."""
    parts = bytearray()
    while value >= 0x80:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])


def _section(kind: int, content: bytes) -> bytes:
    return bytes([kind]) + _number(len(content)) + content


def slow_to_compile(functions: int = 4000) -> bytes:
    """A module of many functions, each with a long body that depends on its number."""
    bodies = b""
    for index in range(functions):
        code = b"\x01\x01\x7f" + (b"\x20\x00\x41" + _number(index & 63) + b"\x6a\x21\x00") * 300 + b"\x0b"
        bodies += _number(len(code)) + code
    types = _section(1, b"\x01\x60\x00\x00") + _section(3, _number(functions) + bytes(functions))
    return b"\0asm\1\0\0\0" + types + _section(7, b"\x01\x06_start\x00\x00") + _section(10, _number(functions) + bodies)


def test_a_compile_that_is_cut_off_leaves_nothing(home: Place) -> None:
    home.start()
    Sandbox.create(module=HELLO, client=home.client).kill()  # what is made once, is made
    slow = slow_to_compile()

    def send() -> None:
        with contextlib.suppress(TartarusError):
            Sandbox.create(module=slow, client=home.client).kill()

    sending = threading.Thread(target=send)
    sending.start()
    wait_until(
        lambda: list(home.home.glob("cache/tenants/*/modules/.making-*/tree/opt/tartarus/wasm/*.cwasm")), "it began"
    )
    home.end_daemon(signal.SIGKILL)
    sending.join()
    wait_until(lambda: not home.processes(), f"processes went on: {home.processes()}")
    home.restart()
    with Sandbox.create(module=HELLO, client=home.client) as sandbox:
        assert sandbox.run(["hello"]).stdout == "hello\n"
    assert not list(home.home.glob("cache/tenants/*/modules/.making-*"))
