"""Framing: whatever is cut anywhere comes out whole; a real WebSocket library agrees; broken bytes are refused."""

from __future__ import annotations

import itertools
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.frames import Frame, Opcode
from websockets.http11 import Request
from websockets.server import ServerProtocol

from tartarus.model.errors import DaemonUnavailable
from tartarus.sdk import websocket
from tartarus.sdk.websocket import BINARY, CLOSE, PING, TEXT, Decoder, Head

payloads = st.one_of(
    st.binary(max_size=300), st.integers(65530, 65540).map(bytes), st.integers(120, 130).map(lambda size: b"x" * size)
)
messages = st.lists(st.tuples(st.sampled_from([TEXT, BINARY]), payloads), max_size=8)


def server_frame(opcode: int, payload: bytes, *, final: bool = True) -> bytes:
    return Frame(Opcode(opcode), payload, final).serialize(mask=False)


def cut(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(position % (len(data) + 1) for position in cuts)})
    return [data[start:end] for start, end in itertools.pairwise(edges)]


@given(messages, st.lists(st.integers(0, 10**6), max_size=20))
def test_messages_come_out_as_they_went_in_however_the_bytes_are_cut(sent, cuts):
    data = b"".join(server_frame(opcode, payload) for opcode, payload in sent)
    decoder = Decoder()
    received = [(opcode, bytes(payload)) for part in cut(data, cuts) for opcode, payload in decoder.receive(part)]
    assert received == sent


@given(st.lists(st.binary(max_size=200), min_size=1, max_size=6), st.sampled_from([TEXT, BINARY]))
def test_fragments_become_one_message_with_pings_in_between(parts, opcode):
    decoder = Decoder()
    received = []
    for index, part in enumerate(parts):
        kind = opcode if index == 0 else 0
        received += decoder.receive(server_frame(kind, part, final=index == len(parts) - 1))
        if index < len(parts) - 1:
            received += decoder.receive(server_frame(PING, b"?"))
    assert [(kind, bytes(payload)) for kind, payload in received] == [(PING, b"?")] * (len(parts) - 1) + [
        (opcode, b"".join(parts))
    ]


@given(st.sampled_from([TEXT, BINARY, PING, CLOSE]), payloads, st.binary(min_size=4, max_size=4))
def test_a_real_server_reads_our_frames(opcode, payload, mask):
    if opcode == CLOSE:
        payload = (1000).to_bytes(2, "big") + payload[:100].hex().encode()[:123]
    elif opcode == PING:
        payload = payload[:125]
    elif opcode == TEXT:
        payload = payload.hex().encode()
    server = ServerProtocol()
    server.receive_data(websocket.handshake("/", websocket.new_key()))
    (request,) = server.events_received()
    assert isinstance(request, Request)
    server.send_response(server.accept(request))
    server.receive_data(websocket.encode(opcode, payload, mask))
    (frame,) = server.events_received()
    assert isinstance(frame, Frame)
    assert (frame.opcode, bytes(frame.data)) == (opcode, payload)


def test_a_real_server_shakes_our_hand():
    key = websocket.new_key()
    server = ServerProtocol()
    server.receive_data(websocket.handshake("/v1/run", key, (("X-Extra", "1"),)))
    (request,) = server.events_received()
    assert isinstance(request, Request)
    assert request.path == "/v1/run"
    assert request.headers["X-Extra"] == "1"
    server.send_response(server.accept(request))
    head = Head.parse(b"".join(server.data_to_send()) + b"first bytes")
    assert head is not None
    assert head.status == 101
    websocket.check_upgrade(head, key)
    assert head.rest == b"first bytes"
    with pytest.raises(DaemonUnavailable, match="another request"):
        websocket.check_upgrade(head, websocket.new_key())


def test_the_example_of_the_rfc():
    assert websocket.accept_token(b"dGhlIHNhbXBsZSBub25jZQ==") == b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
    assert websocket.encode(TEXT, b"Hello", bytes.fromhex("37fa213d")) == bytes.fromhex("818537fa213d7f9f4d5158")


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (bytes([0xC2, 0]), "reserved bit"),
        (bytes([0x82, 0x80, 0, 0, 0, 0]), "masked"),
        (bytes([0x83, 0]), "unknown opcode"),
        (bytes([0x80, 0]), "out of order"),
        (bytes([0x02, 0, 0x82, 0]), "out of order"),
        (bytes([0x09, 0]), "control frame"),
        (bytes([0x89, 126, 0, 126]), "control frame"),
        (bytes([0x82, 127]) + (2**40).to_bytes(8, "big"), "over"),
    ],
)
def test_broken_frames_are_refused(data, why):
    with pytest.raises(DaemonUnavailable, match=why):
        Decoder().receive(data)


def test_fragments_can_not_outgrow_the_cap(monkeypatch):
    monkeypatch.setattr(websocket, "MAX_MESSAGE_BYTES", 100)
    decoder = Decoder()
    decoder.receive(server_frame(BINARY, bytes(60), final=False))
    with pytest.raises(DaemonUnavailable, match="over"):
        decoder.receive(server_frame(0, bytes(60)))


@given(st.binary(max_size=200))
def test_noise_is_decoded_or_refused_but_never_crashes(noise):
    try:
        Decoder().receive(noise)
        Head.parse(noise + b"\r\n\r\n")
    except DaemonUnavailable:
        pass


def test_a_large_message_in_small_pieces():
    payload = os.urandom(3_000_000)
    decoder = Decoder()
    data = server_frame(BINARY, payload)
    received = [
        message for start in range(0, len(data), 65536) for message in decoder.receive(data[start : start + 65536])
    ]
    assert [bytes(part) for _, part in received] == [payload]
