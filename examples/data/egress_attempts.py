"""What the sandbox of egress.sh tries."""

import os
import socket

ATTEMPTS = [
    ("shop.example", 8443), ("shop.example", 80), ("evil.example", 8443), ("trick.shop.example", 8443),
    ("203.0.113.99", 8443), ("10.9.9.9", 80), ("169.254.169.254", 80), ("198.51.100.10", 80),
]  # fmt: skip
for host, port in ATTEMPTS:
    try:
        with socket.create_connection((host, port), timeout=5) as connection:
            result = connection.recv(100).decode().strip()
    except socket.gaierror:
        result = "the name does not resolve"
    except OSError as error:
        result = os.strerror(error.errno) if error.errno else str(error)
    print(f"{host}:{port:<6} {result}", flush=True)
