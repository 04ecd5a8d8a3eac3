"""Web servers in a test's namespaces, with certificates of an authority that the test makes, and how to ask them."""

from __future__ import annotations

import contextlib
import datetime as dt
import socket
import ssl
import threading
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from tests.network.servers import PATIENCE_S

from tartarus.network import namespace

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class Authority:
    """Signs for any name. `bundle` is the file that makes it trusted."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a test's authority")])
        certificate = self._signed(self._name, self._key, x509.BasicConstraints(ca=True, path_length=None))
        self.bundle = directory / "authority.pem"
        self.bundle.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))

    def _signed(
        self, name: x509.Name, key: ec.EllipticCurvePrivateKey, *extensions: x509.ExtensionType
    ) -> x509.Certificate:
        now = dt.datetime.now(dt.UTC)
        builder = x509.CertificateBuilder().subject_name(name).issuer_name(self._name).public_key(key.public_key())
        builder = builder.serial_number(x509.random_serial_number())
        builder = builder.not_valid_before(now - dt.timedelta(days=1))
        builder = builder.not_valid_after(now + dt.timedelta(days=1))
        for extension in extensions:
            builder = builder.add_extension(extension, critical=False)
        return builder.sign(self._key, hashes.SHA256())

    def serving(self, *names: str) -> ssl.SSLContext:
        """What a server that is all of these uses."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0])])
        named = x509.SubjectAlternativeName([x509.DNSName(name) for name in names])
        certificate = self._signed(subject, key, named)
        path = self._directory / f"{names[0]}.pem"
        path.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
            + certificate.public_bytes(serialization.Encoding.PEM)
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(path)
        return context

    def trusting(self) -> ssl.SSLContext:
        """What a client uses that trusts it."""
        return ssl.create_default_context(cafile=str(self.bundle))


class WebServer:
    """Reads one piece of each connection, keeps it in `heard`, and answers it; by TLS with a context."""

    def __init__(
        self, where: int, port: int, context: ssl.SSLContext | None = None, answer: bytes = ANSWER,
        address: str = "203.0.113.80",
    ) -> None:  # fmt: skip
        def listen() -> socket.socket:
            sock = socket.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((address, port))
            sock.listen(64)
            return sock

        self.heard: list[bytes] = []
        self.names: list[str | None] = []
        self.answer = answer
        self.accepted = 0
        self._context = context
        if context is not None:
            context.sni_callback = lambda _socket, name, _context: self.names.append(name)
        self._socket = namespace.run_in(where, listen)
        self._threads: list[threading.Thread] = [threading.Thread(target=self._accept)]
        self._open: list[socket.socket] = []
        self._threads[0].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                self.accepted += 1
                connection.settimeout(PATIENCE_S)
                self._open.append(connection)
                thread = threading.Thread(target=self._serve, args=(connection,))
                self._threads.append(thread)
                thread.start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError, ssl.SSLError):
            if self._context is not None:
                connection = self._context.wrap_socket(connection, server_side=True)
                self._open.append(connection)
            while data := connection.recv(65536):
                self.heard.append(data)
                connection.sendall(self.answer)
        connection.close()

    def close(self) -> None:
        for sock in (self._socket, *self._open):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(PATIENCE_S)
        for sock in (self._socket, *self._open):
            sock.close()


def said(address: str, port: int, *pieces: bytes, until: bytes = b"ok") -> bytes:
    """What comes back for these pieces, up to these words; what went wrong, if something did."""
    found = b""
    try:
        with socket.create_connection((address, port), timeout=5) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for piece in pieces:
                connection.sendall(piece)
            while until not in found and (data := connection.recv(65536)):
                found += data
    except OSError as error:
        return found or type(error).__name__.encode()
    return found


def secured(address: str, port: int, name: str | None, context: ssl.SSLContext, data: bytes = b"hello") -> bytes:
    """What a TLS server says to a client that calls it by that name, or what went wrong."""
    context = context if name is not None else ssl._create_unverified_context()
    try:
        with (
            socket.create_connection((address, port), timeout=5) as plain,
            context.wrap_socket(plain, server_hostname=name) as connection,
        ):
            connection.sendall(data)
            return connection.recv(1000)
    except OSError as error:
        return type(error).__name__.encode()


def client_hello(name: str | None, context: ssl.SSLContext | None = None) -> bytes:
    """The first bytes of a TLS client that calls a server by that name."""
    context = context or ssl._create_unverified_context()
    came, goes = ssl.MemoryBIO(), ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(came, goes, server_hostname=name).do_handshake()
    return goes.read()
