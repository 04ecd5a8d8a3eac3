"""A server for the inside of a sandbox that answers well at most paths, and as a hostile guest would at others."""

import base64
import contextlib
import hashlib
import socket
import sys
import threading
import time

GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
OK = b"HTTP/1.1 200 OK\r\n"
RAW = {
    b"/hostile": OK + b"Set-Cookie: session=guest; Path=/\r\nStrict-Transport-Security: max-age=1\r\n"
    b"Access-Control-Allow-Origin: *\r\nWWW-Authenticate: Basic realm=api\r\nService-Worker-Allowed: /\r\n"
    b"Tartarus-Version: 99\r\nConnection: close, X-Hop\r\nX-Hop: 1\r\nKeep-Alive: 5\r\nX-Kept: yes\r\n"
    b"Content-Security-Policy: default-src 'self'\r\nContent-Type: image/png\r\n"
    b"Content-Length: 25\r\n\r\n<script>alert(1)</script>",
    b"/split": OK + b"X-A: 1\r\nX-B: a\rSet-Cookie: b\r\nContent-Length: 0\r\n\r\n",
    b"/control": OK + b"X-A: a\x01b\r\nContent-Length: 0\r\n\r\n",
    b"/two-lengths": OK + b"Content-Length: 3\r\nContent-Length: 30\r\n\r\nabc",
    b"/both": OK + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"/huge": OK + b"X-Long: " + b"a" * 1_000_000,
    b"/many": OK + b"A: b\r\n" * 100_000,
    b"/early": b"HTTP/1.1 103 Early Hints\r\n\r\n" * 3 + OK + b"Content-Length: 2\r\n\r\nok",
    b"/early-forever": b"HTTP/1.1 103 Early Hints\r\n\r\n" * 1000,
    b"/switch": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
    b"/odd": b"HTTP/1.1 999 What\r\nContent-Length: 0\r\n\r\n",
    b"/nonsense": b"\0\1\2 SSH-2.0\r\n\r\n",
    b"/short": OK + b"Content-Length: 100\r\n\r\nabc",
    b"/more": OK + b"Content-Length: 3\r\n\r\nabcHTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nevil!",
    b"/unchanged": b"HTTP/1.1 304 Not Modified\r\nContent-Length: 7\r\n\r\n",
    b"/old": b"HTTP/1.0 200 OK\r\n\r\nuntil the end",
    b"/nothing": b"",
    b"/away": b"HTTP/1.1 307 T\r\nLocation: /%2e%2e/%2e%2e/sandboxes\r\nContent-Length: 0\r\n\r\n",
    b"/moved": b"HTTP/1.1 302 T\r\nLocation: ../there?a=b\r\nContent-Length: 0\r\n\r\n",
}


def main() -> None:
    server = socket.create_server(("127.0.0.1", 8080), backlog=128)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while True:
        threading.Thread(target=answer, args=(server.accept()[0],), daemon=True).start()


def answer(connection: socket.socket) -> None:
    with connection, contextlib.suppress(OSError):
        exchange(connection)


def exchange(connection: socket.socket) -> None:
    data = b""
    while b"\r\n\r\n" not in data:
        more = connection.recv(65536)
        if not more:
            return
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    path = head.split(b" ", 2)[1]
    name = path.partition(b"?")[0]
    lines = (line.split(b": ", 1) for line in head.split(b"\r\n")[1:] if b": " in line)
    fields = {name.lower(): value for name, value in lines}
    if name in RAW:
        connection.sendall(RAW[name])
    elif name == b"/forever":
        connection.sendall(OK + b"\r\n")
        while True:
            connection.sendall(b"x" * 65536)
    elif name == b"/silent":
        connection.recv(1)
    elif name.startswith(b"/ws"):
        talk(connection, name, fields)
    elif name == b"/upper":
        connection.sendall(OK + b"Transfer-Encoding: chunked\r\n\r\n")
        while True:
            if body:
                connection.sendall(b"%x\r\n%b\r\n" % (len(body), body.upper()))
            if b"0\r\n\r\n" in body:
                break
            body = connection.recv(65536)
        connection.sendall(b"0\r\n\r\n")
    else:
        length = int(fields.get(b"content-length", b"0"))
        while len(body) < length:
            body += connection.recv(65536)
        said = head + b"\r\n\r\n" + body
        connection.sendall(OK + b"Content-Length: %d\r\n\r\n" % len(said) + said)


def talk(connection: socket.socket, name: bytes, fields: dict[bytes, bytes]) -> None:
    if name == b"/ws-refused":
        connection.sendall(b"HTTP/1.1 403 No\r\nSet-Cookie: a=b\r\nContent-Length: 5\r\n\r\nno ws")
        return
    original = fields[b"sec-websocket-key"].strip()
    token = base64.b64encode(hashlib.sha1(original + GUID).digest())
    if name == b"/ws-wrong":
        token = b"x" + token[1:]
    chosen = fields.get(b"sec-websocket-protocol", b"")
    connection.sendall(
        b"HTTP/1.1 101 S\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSet-Cookie: a=b\r\nSec-WebSocket-Accept: "
        + token
        + (b"\r\nSec-WebSocket-Protocol: " + chosen.split(b",")[0] if chosen else b"")
        + b"\r\n\r\n"
    )
    if name == b"/ws-huge":
        connection.sendall(b"\x82\x7f" + (1 << 40).to_bytes(8, "big") + b"x" * 1000)
    elif name == b"/ws-masked":
        connection.sendall(b"\x82\x81\0\0\0\0a")
    elif name == b"/ws-not-text":
        connection.sendall(b"\x81\x01\xff")
    elif name == b"/ws-pieces":
        connection.sendall(b"\x01\x01a" + b"\x00\x00" * 20_000 + b"\x80\x01b" + b"\x88\x04\x0f\xa0no")
    elif name == b"/ws-gone":
        return
    if name != b"/ws":
        time.sleep(0.2)
        return
    while frame := receive(connection):
        kind, data = frame
        if kind == 8:
            connection.sendall(b"\x88\x02" + data[:2])
            return
        size = bytes([len(data)]) if len(data) < 126 else b"\x7f" + len(data).to_bytes(8, "big")
        connection.sendall(bytes([0x80 | kind]) + size + data.upper())


def receive(connection: socket.socket) -> tuple[int, bytes] | None:
    """One unfragmented frame of the host's, which masks it."""
    head = connection.recv(2, socket.MSG_WAITALL)
    if len(head) < 2:
        return None
    size = head[1] & 127
    if size > 125:
        size = int.from_bytes(connection.recv(2 if size == 126 else 8, socket.MSG_WAITALL), "big")
    mask = connection.recv(4, socket.MSG_WAITALL)
    data = connection.recv(size, socket.MSG_WAITALL) if size else b""
    pattern = (mask * (len(data) // 4 + 1))[: len(data)]
    plain = int.from_bytes(data, "big") ^ int.from_bytes(pattern, "big")
    return head[0] & 15, plain.to_bytes(len(data), "big")


main()
