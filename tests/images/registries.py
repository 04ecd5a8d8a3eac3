"""Real registries on loopback, and images to put there; and one registry of our own that can misbehave."""

from __future__ import annotations

import base64
import contextlib
import gzip
import hashlib
import io
import json
import socket
import ssl
import subprocess
import tarfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

from tartarus.images.manifests import OCI_CONFIG, OCI_INDEX, OCI_LAYER, OCI_MANIFEST

USER, PASSWORD = "hades", "per:sephone!"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def sha256(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


class Blob(NamedTuple):
    """What an image is made of: a descriptor's facts and the bytes."""

    kind: str
    content: bytes

    @property
    def digest(self) -> str:
        return sha256(self.content)

    def descriptor(self, **more: Any) -> dict[str, Any]:
        return {"mediaType": self.kind, "digest": self.digest, "size": len(self.content), **more}


class MadeImage(NamedTuple):
    manifest: Blob
    config: Blob
    layers: tuple[Blob, ...]
    diff_ids: tuple[str, ...]

    @property
    def blobs(self) -> tuple[Blob, ...]:
        return (self.config, *self.layers)


def tar_of(files: dict[str, bytes]) -> bytes:
    """An uncompressed tar archive."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return out.getvalue()


def make_image(
    *layers: dict[str, bytes], architecture: str = "amd64", compress: bool = True, **config: Any
) -> MadeImage:
    """An OCI image with a layer for each dict of files."""
    tars = [tar_of(files) for files in layers]
    if compress:
        made = tuple(Blob(f"{OCI_LAYER}+gzip", gzip.compress(content, 1, mtime=0)) for content in tars)
    else:
        made = tuple(Blob(OCI_LAYER, content) for content in tars)
    diff_ids = tuple(sha256(content) for content in tars)
    document = {
        "architecture": architecture, "os": "linux", "config": config,
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    }  # fmt: skip
    config_blob = Blob(OCI_CONFIG, json.dumps(document).encode())
    return MadeImage(manifest_of(config_blob, made), config_blob, made, diff_ids)


def manifest_of(config: Blob, layers: Sequence[Blob]) -> Blob:
    document = {
        "schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config.descriptor(),
        "layers": [layer.descriptor() for layer in layers],
    }  # fmt: skip
    return Blob(OCI_MANIFEST, json.dumps(document).encode())


def index_of(*images: tuple[MadeImage, dict[str, str]]) -> Blob:
    """A multi-platform index."""
    entries = [made.manifest.descriptor(platform=platform) for made, platform in images]
    return Blob(OCI_INDEX, json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}).encode())


def write_layout(place: Path, made: MadeImage, name: str = "latest") -> Path:
    """An OCI image layout in a directory."""
    (place / "blobs" / "sha256").mkdir(parents=True)
    (place / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    for blob in (*made.blobs, made.manifest):
        (place / "blobs" / "sha256" / blob.digest.removeprefix("sha256:")).write_bytes(blob.content)
    notes = {"org.opencontainers.image.ref.name": name}
    index = {"schemaVersion": 2, "manifests": [made.manifest.descriptor(annotations=notes)]}
    (place / "index.json").write_text(json.dumps(index))
    return place


# Debian's docker-registry.


class Running(NamedTuple):
    """A registry; `host` is its name in references."""

    host: str
    directory: Path

    def reference(self, name: str) -> str:
        return f"{self.host}/{name}"


@contextlib.contextmanager
def docker_registry(directory: Path, auth: dict[str, Any] | None = None) -> Iterator[Running]:
    """A real registry on a free port of loopback, with its storage in `directory`."""
    port = free_port()
    config = {
        "version": 0.1,
        "log": {"level": "error", "accesslog": {"disabled": True}},
        "storage": {"filesystem": {"rootdirectory": str(directory / "storage")}, "delete": {"enabled": True}},
        "http": {"addr": f"127.0.0.1:{port}"},
        **({"auth": auth} if auth else {}),
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.yml").write_text(json.dumps(config))
    with open(directory / "log", "wb") as log:
        process = subprocess.Popen(
            ["docker-registry", "serve", str(directory / "config.yml")],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={"OTEL_TRACES_EXPORTER": "none"},
        )  # fmt: skip
    try:
        _wait_for(port, process, directory / "log")
        yield Running(f"127.0.0.1:{port}", directory)
    finally:
        process.kill()
        process.wait()


def _wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.02)
    raise AssertionError(f"docker-registry did not listen: {log.read_text()}")


def htpasswd_auth(directory: Path) -> dict[str, Any]:
    """Basic authentication for USER and PASSWORD."""
    directory.mkdir(parents=True, exist_ok=True)
    entry = subprocess.run(
        ["htpasswd", "-nbB", "-C", "4", USER, PASSWORD], capture_output=True, text=True, check=True
    ).stdout
    (directory / "htpasswd").write_text(entry)
    return {"htpasswd": {"realm": "Tartarus tests", "path": str(directory / "htpasswd")}}


class TokenServer:
    """Grants the tokens that a docker-registry asks for; remembers the scopes and what was refused."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.key, self.certificate = directory / "key.pem", directory / "certificate.pem"
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=tests",
             "-keyout", str(self.key), "-out", str(self.certificate)],
            check=True, capture_output=True,
        )  # fmt: skip
        self.scopes: list[list[str]] = []
        self.refused = 0
        self.identity_tokens: set[str] = set()

    def auth(self, realm: str) -> dict[str, Any]:
        return {"token": {
            "realm": realm, "service": "tests", "issuer": "tartarus-tests", "rootcertbundle": str(self.certificate),
        }}  # fmt: skip

    def answer(self, request: Request) -> Answer:
        form = parse_qs(request.body.decode()) if request.method == "POST" else request.query
        scopes = [scope for value in form.get("scope", []) for scope in value.split()]
        self.scopes.append(scopes)
        basic = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        known = request.headers.get("authorization") == basic
        known |= form.get("refresh_token", [""])[0] in self.identity_tokens
        if not known:
            self.refused += 1
            return Answer(401, b"{}")
        return Answer(200, json.dumps({"token": self._token(scopes), "expires_in": 300}).encode())

    def _token(self, scopes: Sequence[str]) -> str:
        body = "".join(self.certificate.read_text().splitlines()[1:-1])
        access = []
        for scope in scopes:
            kind, name, actions = scope.split(":")
            access.append({"type": kind, "name": name, "actions": actions.split(",")})
        now = int(time.time())
        claims = {
            "iss": "tartarus-tests", "sub": USER, "aud": "tests", "exp": now + 300, "nbf": now - 10, "iat": now,
            "jti": "1", "access": access,
        }  # fmt: skip
        parts = [json.dumps(part).encode() for part in ({"typ": "JWT", "alg": "RS256", "x5c": [body]}, claims)]
        signed = b".".join(base64.urlsafe_b64encode(part).rstrip(b"=") for part in parts)
        signature = subprocess.run(
            ["openssl", "dgst", "-sha256", "-sign", str(self.key)], input=signed, capture_output=True, check=True
        ).stdout
        return (signed + b"." + base64.urlsafe_b64encode(signature).rstrip(b"=")).decode()


# A registry, or any server, that does what a test says.


class Request(NamedTuple):
    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes


class Answer(NamedTuple):
    """`cut`: after so many bytes of the content the connection breaks. `pause_s`: after every 256 KiB."""

    status: int
    content: bytes = b""
    headers: dict[str, str] = {}  # noqa: RUF012 - never changed
    cut: int | None = None
    pause_s: float = 0.0


class Server:
    """Answers each request with what `route` returns for it; remembers the requests."""

    def __init__(self, route: Callable[[Request], Answer], tls: ssl.SSLContext | None = None) -> None:
        self.requests: list[Request] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _serve(self) -> None:
                parts = urlsplit(self.path if self.command != "CONNECT" else f"//{self.path}")
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                headers = {name.lower(): value for name, value in self.headers.items()}
                request = Request(self.command, parts.path or parts.netloc, parse_qs(parts.query), headers, body)
                outer.requests.append(request)
                answer = route(request)
                self.send_response(answer.status)
                for name, value in {"Content-Length": str(len(answer.content)), **answer.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    content = answer.content[: answer.cut]
                    for start in range(0, len(content), 2**18):
                        self.wfile.write(content[start : start + 2**18])
                        time.sleep(answer.pause_s)
                if answer.cut is not None:
                    self.close_connection = True

            do_GET = do_HEAD = do_POST = do_PUT = do_CONNECT = _serve  # noqa: N815 - the names that http.server calls

            def log_message(self, *_: Any) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: Any) -> None:  # connections that our client breaks off
                pass

        self._server = Quiet(("127.0.0.1", 0), Handler)
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True, do_handshake_on_connect=False)
        self.host = f"127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    def __enter__(self) -> Server:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def asked(self, *words: str) -> list[Request]:
        """The requests whose method or path has all these words."""
        return [each for each in self.requests if all(word in f"{each.method} {each.path}" for word in words)]


class Shelf:
    """What a registry would serve of some images, to be spoilt by a test: `route` is for Server."""

    def __init__(self, *images: MadeImage, tags: dict[str, Blob] | None = None) -> None:
        self.blobs = {blob.digest: blob for made in images for blob in made.blobs}
        manifests = [made.manifest for made in images]
        self.tags = dict(tags or {})
        if images:
            self.tags.setdefault("latest", images[0].manifest)
        self.tags |= {blob.digest: blob for blob in (*manifests, *self.tags.values())}

    def route(self, request: Request) -> Answer:
        last = request.path.rpartition("/")[2]
        if "/manifests/" in request.path and last in self.tags:
            blob = self.tags[last]
            return Answer(200, blob.content, {"Content-Type": blob.kind, "Docker-Content-Digest": blob.digest})
        if "/blobs/" in request.path and last in self.blobs:
            content = self.blobs[last].content
            start = request.headers.get("range", "").removeprefix("bytes=").removesuffix("-")
            if start:
                rest = content[int(start) :]
                return Answer(206, rest, {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"})
            return Answer(200, content)
        return Answer(404, b'{"errors":[{"code":"NAME_UNKNOWN","message":"no such \\u001b[31mthing"}]}')


def upload(host: str, repository: str, tag: str, made: MadeImage, authorization: str = "") -> None:
    """Put an image into a real registry, by its own protocol and none of our code."""

    def send(method: str, url: str, content: bytes = b"", kind: str = "application/octet-stream") -> Any:
        request = urllib.request.Request(url, data=content, method=method, headers={"Content-Type": kind})
        if authorization:
            request.add_header("Authorization", authorization)
        with urllib.request.urlopen(request) as answer:
            return answer.headers

    base = f"http://{host}/v2/{repository}"
    for blob in made.blobs:
        place = send("POST", f"{base}/blobs/uploads/")["Location"]
        mark = "&" if "?" in place else "?"
        send("PUT", f"{place}{mark}digest={blob.digest}", blob.content)
    send("PUT", f"{base}/manifests/{tag}", made.manifest.content, made.manifest.kind)
