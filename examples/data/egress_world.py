"""The world of egress.sh: a name server, and a server at two ports of every address. Simulated, for a demonstration."""

import socket
import threading

NAMES = {"shop.example": "203.0.113.80", "evil.example": "203.0.113.99", "trick.shop.example": "10.9.9.9"}


def answer(query: bytes) -> bytes:
    """One A record, or none."""
    labels, at = [], 12
    while query[at]:
        labels.append(query[at + 1 : at + 1 + query[at]].decode())
        at += 1 + query[at]
    question = query[12 : at + 5]
    address = NAMES.get(".".join(labels).lower())
    is_a = query[at + 1 : at + 3] == b"\0\1"
    count = 1 if address and is_a else 0
    flags = b"\x81\x80" if address else b"\x81\x83"
    head = query[:2] + flags + b"\0\1" + bytes([0, count]) + b"\0\0\0\0"
    record = b"\xc0\x0c\0\1\0\1\0\0\0\x3c\0\4" + socket.inet_aton(address) if count else b""
    return head + question + record


def serve(port: int) -> None:
    """Greet everybody who asks, whatever for."""
    server = socket.create_server(("0.0.0.0", port))
    while True:
        connection, _ = server.accept()
        with connection:
            if connection.recv(65536):
                connection.sendall(f"HTTP/1.0 200 OK\r\n\r\nhello from {connection.getsockname()[0]}\n".encode())


for number in (80, 8443):
    threading.Thread(target=serve, args=(number,), daemon=True).start()
names = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
names.bind(("198.51.100.53", 53))
while True:
    packet, sender = names.recvfrom(4096)
    names.sendto(answer(packet), sender)
