"""ClientHellos as they are and as they are forged."""

from __future__ import annotations

import struct

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.network.webs import client_hello

from tartarus.network.egress import hello
from tartarus.network.egress.heads import target_of
from tartarus.network.egress.refusal import REASONS, Refusal
from tartarus.network.egress.tunnels import is_http

HOST = b"\0\0"
ECH = b"\xfe\x0d"


def record(body: bytes, kind: int = 22, version: bytes = b"\3\1") -> bytes:
    return bytes([kind]) + version + struct.pack(">H", len(body)) + body


def message(body: bytes, kind: int = 1) -> bytes:
    return bytes([kind]) + len(body).to_bytes(3) + body


def named(*names: bytes, kind: int = 0) -> bytes:
    listed = b"".join(bytes([kind]) + struct.pack(">H", len(name)) + name for name in names)
    return struct.pack(">H", len(listed)) + listed


def body(*extensions: tuple[bytes, bytes]) -> bytes:
    packed = b"".join(kind + struct.pack(">H", len(content)) + content for kind, content in extensions)
    return b"\3\3" + bytes(32) + b"\0" + b"\0\2\x13\1" + b"\1\0" + struct.pack(">H", len(packed)) + packed


def said(stream: bytes) -> str:
    """The name, or why there is none."""
    try:
        found = hello.server_name(stream)
    except Refusal as refusal:
        return refusal.reason
    return "more" if found is None else found[0]


def test_a_real_hello_however_it_is_cut() -> None:
    whole = client_hello("Shop.Example")
    assert said(whole + b"and more") == "shop.example"
    assert {said(whole[:end]) for end in range(len(whole))} == {"more"}
    inside = whole[5:]
    for size in (1, 7, 100):
        pieces = b"".join(record(inside[at : at + size]) for at in range(0, len(inside), size))
        assert said(pieces) == "shop.example"
    assert said(client_hello(None)) == "no_name"


@pytest.mark.parametrize(
    ("stream", "found"),
    [
        (record(message(body((HOST, named(b"a.example"))))), "a.example"),
        (record(message(body((HOST, named(b"A.Example."))))), "a.example"),
        (record(message(body((HOST, named(b"a.example")), (ECH, b"x")))), "ech"),
        (record(message(body((HOST, named(b"a.example", b"b.example"))))), "malformed"),
        (record(message(body((HOST, named(b"a.example")), (HOST, named(b"b.example"))))), "malformed"),
        (record(message(body((HOST, named(b"a.example", kind=1))))), "malformed"),
        (record(message(body((HOST, named(b"a.example") + b"x")))), "malformed"),
        (record(message(body((HOST, named(b"a.example"))) + b"x")), "malformed"),
        (record(message(body((HOST, named(b"a.example\0.b.example"))))), "malformed"),
        (record(message(body((HOST, named("bücher.example".encode()))))), "malformed"),
        (record(message(body((HOST, named(b"10.0.0.1"))))), "malformed"),
        (record(message(body((HOST, named(b"example.0x7f"))))), "malformed"),
        (record(message(body((HOST, named(b"single"))))), "malformed"),
        (record(message(body((HOST, named(b""))))), "malformed"),
        (record(message(body())), "no_name"),
        (record(message(body((HOST, named(b"a.example"))))[:-1] + b""), "more"),
        (record(message(b"", kind=2)), "malformed"),
        (record(b"x", kind=23), "malformed"),
        (record(b""), "malformed"),
        (record(b"x" * 16385), "malformed"),
        (record(message(bytes(65536))[:16384]), "limit"),
        (b"\x16\2\0\0\1x", "malformed"),
    ],
)
def test_forged_hellos(stream: bytes, found: str) -> None:
    assert said(stream) == found


@given(st.binary(max_size=200))
def test_garbage_is_refused_or_waits(stream: bytes) -> None:
    assert said(b"\x16\3\1" + stream) in {*REASONS, "more"}


@given(st.binary(max_size=60), st.binary(max_size=60), st.sampled_from([None, 80]))
def test_any_head_has_one_meaning_or_none(target: bytes, host: bytes, port: int | None) -> None:
    end = h11.Connection(h11.SERVER)
    end.receive_data(b"GET " + target + b" HTTP/1.1\r\nHost: " + host + b"\r\n\r\n")
    try:
        request = end.next_event()
        if isinstance(request, h11.Request):
            meant = target_of(request, port)
            assert meant.name == meant.name.lower().strip(".")
            assert port in {None, meant.port}
    except (h11.RemoteProtocolError, Refusal):
        return


def test_another_hello_is_noticed() -> None:
    random = hello._RETRY
    assert hello.asks_again(record(message(b"\3\3" + random + b"\0", kind=2))) is True
    assert hello.asks_again(record(message(b"\3\3" + bytes(32) + b"\0", kind=2))) is False
    assert hello.asks_again(record(b"\2\x28", kind=21)) is False
    assert hello.asks_again(b"\x16") is None
    second = record(b"\1", kind=20) + record(message(body((HOST, named(b"a.example")))))
    assert said(second) == "a.example"


@pytest.mark.parametrize(
    ("begun", "is_it"),
    [
        (b"GET / HTTP/1.1\r\n", True), (b"\r\n\nget /\n", True), (b"PRI * HTTP/2.0\r\n", True), (b"X /\thttp/1.0\n", True),
        (b"GE", None), (b"SSH-2.0-x", None), (b"", None),
        (b"SSH-2.0-OpenSSH_9\r\n", False), (b"EHLO a b\r\n", False), (b"\x00\x01", False), (b"a\xff", False),
    ],
)  # fmt: skip
def test_what_could_be_taken_for_a_request(begun: bytes, is_it: bool | None) -> None:
    assert is_http(begun) is is_it
