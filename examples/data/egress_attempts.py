"""What the sandbox of egress.sh tries."""

import os
import socket

ATTEMPTS = [
    ("shop.example", 8443), ("shop.example", 80), ("evil.example", 8443), ("trick.shop.example", 8443),
    ("203.0.113.99", 8443), ("10.9.9.9", 80), ("169.254.169.254", 80), ("198.51.100.10", 80),
    ("shop.example", 8443, "evil.example"),
]  # fmt: skip
for host, port, *called in ATTEMPTS:
    name = (called or [host])[0]
    try:
        with socket.create_connection((host, port), timeout=5) as connection:
            connection.sendall(f"GET / HTTP/1.0\r\nHost: {name}:{port}\r\n\r\n".encode())
            *_, result = connection.makefile().read().strip().splitlines()
    except socket.gaierror:
        result = "the name does not resolve"
    except OSError as error:
        result = os.strerror(error.errno) if error.errno else str(error)
    print(f"{host}:{port:<6} {f'(as {name}) ' if called else ''}{result}", flush=True)
