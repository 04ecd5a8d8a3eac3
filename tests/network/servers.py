"""What answers and listens in a test's namespaces: servers, a name server, a spy."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Any

import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset

from tartarus.network import namespace

NAME_SERVER = "203.0.113.53"
PATIENCE_S = 30.0


def wait_until(holds: Callable[[], object], what: str, patience_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + patience_s
    while not holds():
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.005)


def family_of(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


class Server:
    """Answers every TCP connection and datagram with the address that it came from."""

    def __init__(self, where: int, port: int, kind: int, address: str) -> None:
        def listen() -> socket.socket:
            sock = socket.socket(family_of(address), kind)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if ":" in address:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind((address, port))
            if kind == socket.SOCK_STREAM:
                sock.listen(512)
            return sock

        self.heard: list[bytes] = []
        self.socket = namespace.run_in(where, listen)
        self.connections: list[socket.socket] = []
        self.thread = threading.Thread(target=self._streams if kind == socket.SOCK_STREAM else self._datagrams)
        self.thread.start()

    def _streams(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, sender = self.socket.accept()
                self.connections.append(connection)
                with contextlib.suppress(OSError):
                    connection.sendall(sender[0].encode())

    def _datagrams(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                data, sender = self.socket.recvfrom(65536)
                if not sender:
                    return
                self.heard.append(data)
                self.socket.sendto(sender[0].encode() + b" " + data[:64], sender)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.thread.join(PATIENCE_S)
        for sock in (*self.connections, self.socket):
            sock.close()


class NameServer:
    """Knows the names in `answers`: addresses, an rcode, or a function from the query to the whole response."""

    def __init__(self, where: int, answers: dict[str, Any]) -> None:
        self.answers = answers
        self.asked: list[str] = []
        self.open = True

        def listen() -> tuple[socket.socket, socket.socket]:
            datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            streams = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            streams.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            for sock in (datagrams, streams):
                sock.bind((NAME_SERVER, 53))
            streams.listen(16)
            return datagrams, streams

        self.datagrams, self.streams = namespace.run_in(where, listen)
        self.threads = [threading.Thread(target=self._serve_datagrams), threading.Thread(target=self._serve_streams)]
        for thread in self.threads:
            thread.start()

    def respond(self, packet: bytes) -> dns.message.Message | None:
        query = dns.message.from_wire(packet)
        name = query.question[0].name.to_text(omit_final_dot=True).lower()
        kind = query.question[0].rdtype
        self.asked.append(f"{name} {dns.rdatatype.to_text(kind)}")
        response: dns.message.Message = dns.message.make_response(query, recursion_available=True)
        known = self.answers.get(name, dns.rcode.NXDOMAIN)
        if callable(known):
            made: dns.message.Message | None = known(query, response)
            return made
        if isinstance(known, dns.rcode.Rcode):
            response.set_rcode(known)
        elif kind in {dns.rdatatype.A, dns.rdatatype.AAAA} or not isinstance(known, list):
            texts = known if isinstance(known, list) else [known]
            if isinstance(known, list):
                texts = [text for text in known if (":" in text) is (kind == dns.rdatatype.AAAA)]
                if not texts:
                    return response
            response.answer = [dns.rrset.from_text_list(query.question[0].name, 60, "IN", kind, texts)]
        return response

    def _serve_datagrams(self) -> None:
        with contextlib.suppress(OSError):
            while self.open:
                packet, sender = self.datagrams.recvfrom(4096)
                response = self.respond(packet) if packet else None
                if response is not None:
                    wire = response.to_wire(max_size=65535)
                    if len(wire) > 1232:
                        response.answer = []
                        response.flags |= dns.flags.TC
                        wire = response.to_wire()
                    self.datagrams.sendto(wire, sender)

    def _serve_streams(self) -> None:
        with contextlib.suppress(OSError):
            while self.open:
                connection, _ = self.streams.accept()
                with connection, contextlib.suppress(OSError, struct.error):
                    connection.settimeout(PATIENCE_S)
                    (size,) = struct.unpack(">H", connection.recv(2, socket.MSG_WAITALL))
                    response = self.respond(connection.recv(size, socket.MSG_WAITALL))
                    assert response is not None
                    wire = response.to_wire(max_size=65535)
                    connection.sendall(struct.pack(">H", len(wire)) + wire)

    def close(self) -> None:
        self.open = False
        for sock in (self.datagrams, self.streams):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self.threads:
            thread.join(PATIENCE_S)
        for sock in (self.datagrams, self.streams):
            sock.close()


class Sniffer:
    """Everything that arrives in a namespace, on any link."""

    def __init__(self, where: int) -> None:
        self.seen: list[bytes] = []
        self.socket = namespace.run_in(where, lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)))
        self.open = True
        self.wake = os.eventfd(0)
        self.thread = threading.Thread(target=self._listen)
        self.thread.start()

    def _listen(self) -> None:
        while self.open:
            ready, _, _ = select.select([self.socket.fileno(), self.wake], [], [])
            if self.socket.fileno() in ready:
                self.seen.append(self.socket.recv(65536))

    def saw(self, mark: bytes) -> bool:
        return any(mark in packet for packet in list(self.seen))

    def close(self) -> None:
        self.open = False
        os.eventfd_write(self.wake, 1)
        self.thread.join(PATIENCE_S)
        self.socket.close()
        os.close(self.wake)
