"""OSV's service as its documentation has it, played by a server of the test's own on loopback; and hostile ones."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tartarus.images.sbom import Distribution, Inventory, Package
from tartarus.images.scan import OsvService, ScanFailed, scan
from tartarus.images.scan import service as service_module
from tartarus.model.errors import InvalidRequest

Answer = Callable[[str, Any], tuple[int, bytes]]

CVE = {
    "id": "CVE-1", "modified": "2026-11-19T00:00:00Z", "summary": "words", "severity": [],
    "affected": [{"package": {"ecosystem": "PyPI", "name": "six"}, "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "2"}]}]}],
}  # fmt: skip
PACKAGES = Inventory(
    Distribution("debian", "12"),
    (
        Package("deb", "debian", "bash", "5.2", source="bash", source_version="5.2"),
        Package("pypi", "", "Six", "1.16"),
    ),
)


class Server:
    def __init__(self, answer: Answer) -> None:
        self.asked: list[tuple[str, Any]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def reply(self) -> None:
                raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                body = json.loads(raw) if raw else None
                outer.asked.append((self.path, body))
                status, content = answer(self.path, body)
                self.send_response(status)
                if status in {301, 302}:
                    self.send_header("Location", content.decode())
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = reply  # noqa: N815 - names that http.server asks for

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def serve() -> Iterator[Callable[[Answer], Server]]:
    servers: list[Server] = []

    def start(answer: Answer) -> Server:
        servers.append(Server(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def documented(path: str, body: Any) -> tuple[int, bytes]:
    """POST /v1/querybatch answers ids, by pages; GET /v1/vulns/{id} the record."""
    if path == "/v1/vulns/CVE-1":
        return 200, json.dumps(CVE).encode()
    results: list[dict[str, Any]] = []
    for query in body["queries"]:
        if query["package"]["name"] != "six":
            results.append({})
        elif "page_token" not in query:
            results.append({"next_page_token": "more"})
        else:
            results.append({"vulns": [{"id": "CVE-1", "modified": "x"}]})
    return 200, json.dumps({"results": results}).encode()


def test_asks_for_names_and_versions_and_reads_the_records(serve: Callable[[Answer], Server]) -> None:
    server = serve(documented)
    report = scan(PACKAGES, OsvService(server.url))
    assert [(f.id, f.package, f.fixed_in) for f in report.findings] == [("CVE-1", "Six", ("2",))]
    assert (report.source, report.database_date, report.checked, report.gaps) == (
        "OSV service 127.0.0.1",
        "2026-11-19",
        2,
        (),
    )
    first, second, third = server.asked
    assert first == (
        "/v1/querybatch",
        {"queries": [
            {"package": {"ecosystem": "Debian:12", "name": "bash"}, "version": "5.2"},
            {"package": {"ecosystem": "PyPI", "name": "six"}, "version": "1.16"},
        ]},
    )  # fmt: skip
    assert second[1] == {
        "queries": [{"package": {"ecosystem": "PyPI", "name": "six"}, "version": "1.16", "page_token": "more"}]
    }
    assert third == ("/v1/vulns/CVE-1", None)


def test_many_packages_are_asked_in_batches(serve: Callable[[Answer], Server]) -> None:
    server = serve(lambda path, body: (200, json.dumps({"results": [{}] * len(body["queries"])}).encode()))
    scan(Inventory(None, tuple(Package("pypi", "", f"p{n}", "1") for n in range(2001))), OsvService(server.url))
    assert [len(body["queries"]) for _, body in server.asked] == [1000, 1000, 1]


def test_making_one_asks_nothing(serve: Callable[[Answer], Server]) -> None:
    server = serve(documented)
    OsvService(server.url)
    scan(Inventory(), OsvService(server.url))
    assert server.asked == []


@pytest.mark.parametrize(
    "url",
    [
        "http://osv.example",
        "ftp://osv.example",
        "osv.example",
        "https://",
        "",
        "http://localhost.example",
        "file:///etc/passwd",
    ],
)
def test_only_https_leaves_the_host(url: str) -> None:
    with pytest.raises(InvalidRequest):
        OsvService(url)


class TestHostileServices:
    def fails(self, serve: Callable[[Answer], Server], answer: Answer, words: str) -> Server:
        server = serve(answer)
        with pytest.raises(ScanFailed, match=words):
            scan(PACKAGES, OsvService(server.url, timeout_s=5))
        return server

    @pytest.mark.parametrize("status", [301, 302, 400, 429, 500])
    def test_anything_but_an_answer(self, serve: Callable[[Answer], Server], status: int) -> None:
        bait = serve(lambda path, body: (200, b"{}"))
        self.fails(serve, lambda path, body: (status, bait.url.encode()), f"answered {status}")
        assert bait.asked == []

    @pytest.mark.parametrize("content", [b"", b"<html>", b"[" * 100_000, b'{"results": 3}', b"\xff"])
    def test_junk(self, serve: Callable[[Answer], Server], content: bytes) -> None:
        self.fails(serve, lambda path, body: (200, content), "does not answer as OSV does")

    def test_half_an_answer(self, serve: Callable[[Answer], Server]) -> None:
        self.fails(serve, lambda path, body: (200, b'{"results": [{}]}'), "answered 1 of 2")

    def test_pages_without_end(self, serve: Callable[[Answer], Server]) -> None:
        def endless(_path: str, body: Any) -> tuple[int, bytes]:
            return 200, json.dumps({"results": [{"next_page_token": "x"}] * len(body["queries"])}).encode()

        self.fails(serve, endless, "more than 50 pages")

    def test_ids_that_are_paths(self, serve: Callable[[Answer], Server]) -> None:
        evil = json.dumps({"results": [{"vulns": [{"id": "../../admin"}]}, {}]}).encode()
        server = self.fails(serve, lambda path, body: (200, evil), "which is no id")
        assert [path for path, _ in server.asked] == ["/v1/querybatch"]

    def test_answers_without_end(self, serve: Callable[[Answer], Server], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(service_module, "_MAX_ANSWER", 1000)
        self.fails(serve, lambda path, body: (200, b" " * 5000), "more than 1000 bytes")

    def test_nobody_there(self) -> None:
        with pytest.raises(ScanFailed, match="can't be reached"):
            scan(PACKAGES, OsvService("http://127.0.0.1:9", timeout_s=5))
