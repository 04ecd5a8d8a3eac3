"""A real sandbox on an open network: what it reaches, and that it has no say in its own network namespace."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from tests.faults.place import Place, place
from tests.network import topology
from tests.network.topology import HOST, METADATA, NEIGHBOUR, PRIVATE, PUBLIC, World, joined, off

pytestmark = pytest.mark.needs("root", "nft", "ip", "cgroups", "system-python")

# One line for each attempt: its name, and what came of it.
ATTEMPTS = """
import ctypes, fcntl, os, socket, struct, subprocess
def attempt(name, work):
    try:
        result = work()
    except OSError as error:
        result = os.strerror(error.errno) if error.errno else type(error).__name__
    print(name, result, sep=": ")
def ask(address, port=80):
    with socket.create_connection((address, port), timeout=5) as connection:
        return connection.recv(100).decode()
def change(request, data):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        return fcntl.ioctl(sock, request, struct.pack("16s", b"eth0") + data.ljust(24, b"\\0"))
def write(path, text):
    with open(path, "w") as file:
        return file.write(text)
for address in ADDRESSES:
    attempt(address, lambda: ask(address))
attempt("host", lambda: ask(HOST, 8080))
attempt("raw", lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW))
attempt("raw icmp", lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP))
attempt("frames", lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW))
attempt("link down", lambda: change(0x8914, struct.pack("H", 0)))
attempt("address", lambda: change(0x8916, struct.pack("HH4s", 2, 0, bytes([8, 8, 8, 8]))))
attempt("hardware", lambda: change(0x8924, struct.pack("H6s", 1, bytes(6))))
attempt("ipv6", lambda: write("/proc/sys/net/ipv6/conf/eth0/disable_ipv6", "0"))
attempt("forward", lambda: write("/proc/sys/net/ipv4/ip_forward", "1"))
attempt("mark", lambda: socket.socket().setsockopt(socket.SOL_SOCKET, 36, 1))
attempt("another namespace", lambda: ctypes.CDLL(None).unshare(0x40000000))
attempt("any source", lambda: socket.socket().setsockopt(socket.SOL_IP, 19, 1))
"""
ADDRESSES = (PUBLIC, *PRIVATE, METADATA[0], NEIGHBOUR)
REFUSED = {"Operation not permitted", "Permission denied", "Read-only file system", "-1",
           "Address family not supported by protocol", "Protocol not supported"}  # fmt: skip


def test_a_real_sandbox(tmp_path: Path) -> None:
    with topology.world(tmp_path) as world, place() as home:
        world.in_host(home.start)
        _try_everything(world, home)
        assert home.end_daemon(signal.SIGTERM) == 0


def _try_everything(world: World, home: Place) -> None:
    sandbox = home.create("sleep", "600")
    process = os.pidfd_open(home.inside(sandbox)[0])
    code = f"ADDRESSES, HOST = {ADDRESSES!r}, {HOST!r}\n{ATTEMPTS}"

    async def scenario() -> None:
        async with joined(world.pool()) as pool:
            slot = await pool.take()
            await pool.attach(slot, process)
            done = await off(lambda: sandbox.run(["python3", "-c", code]))
            answers = dict(line.split(": ", 1) for line in done.stdout.splitlines())
            assert answers.pop(PUBLIC) == HOST, done.stderr
            for closed in (*PRIVATE, METADATA[0], NEIGHBOUR, "host"):
                assert answers.pop(closed) == "No route to host"
            assert len(answers) == 11
            assert not {name: answer for name, answer in answers.items() if answer not in REFUSED}
            await pool.give_back(slot)
            again = await off(lambda: sandbox.run(["python3", "-c", code]))
            assert f"{PUBLIC}: Network is unreachable" in again.stdout

    try:
        world.run(scenario)
    finally:
        os.close(process)
