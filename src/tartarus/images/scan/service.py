"""OSV's own service, for whoever asks for it: the names and versions of a template's packages leave the host."""

from __future__ import annotations

import itertools
import urllib.parse
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar

import httpx
import msgspec

from tartarus.images.scan.findings import ScanFailed
from tartarus.images.scan.records import Coordinates, OsvRecord, is_id
from tartarus.model.errors import InvalidRequest

OSV_URL: Final = "https://api.osv.dev"
_BATCH = 1000  # the service's limit of queries in one request
_MAX_PAGES = 50
_MAX_IDS = 20_000
_MAX_ANSWER = 32 * 1024 * 1024  # the service's own limit over HTTP/1.1
_TIMEOUT_S = 30.0
_AT_ONCE = 8

T = TypeVar("T")


class _Named(msgspec.Struct):
    id: str


class _Result(msgspec.Struct):
    vulns: list[_Named] | None = None
    next_page_token: str = ""


class _Results(msgspec.Struct):
    results: list[_Result | None] = []


class OsvService:
    """Asks `url` (OSV's public service) for advisories. Nothing is asked before `find`.

    Only https, or http to this host itself; redirects are not followed. Raises InvalidRequest for another address.
    """

    def __init__(self, url: str = OSV_URL, timeout_s: float = _TIMEOUT_S) -> None:
        parts = urllib.parse.urlsplit(url)
        local = parts.scheme == "http" and parts.hostname in {"127.0.0.1", "::1", "localhost"}
        if not parts.hostname or not (parts.scheme == "https" or local):
            raise InvalidRequest(f"{url!r} is no address of a vulnerability service", fix="use https://…")
        self._url = url.rstrip("/")
        self._timeout_s = timeout_s
        self.source = f"OSV service {parts.hostname}"
        self.newest = ""
        self.missing: set[str] = set()
        self.gaps: list[str] = []

    def find(self, wanted: Collection[Coordinates]) -> Iterator[OsvRecord]:
        """The records that the service has for these packages at their versions. Blocks: call it in a thread.

        Raises ScanFailed when the service does not answer as it should: half an answer is none.
        """
        self.newest, self.gaps = "", []
        # No redirects is httpx's default; proxies of the daemon's environment are used, as its owner set them.
        with httpx.Client(timeout=self._timeout_s) as client, ThreadPoolExecutor(_AT_ONCE) as pool:
            ids: set[str] = set()
            places = sorted(wanted)
            for start in range(0, len(places), _BATCH):
                ids |= self._ids(client, places[start : start + _BATCH])
                if len(ids) > _MAX_IDS:
                    raise ScanFailed(f"{self.source} names more than {_MAX_IDS} vulnerabilities")
            for record in pool.map(lambda name: self._record(client, name), sorted(ids)):
                self.newest = max(self.newest, record.modified[:10])
                yield record

    def _ids(self, client: httpx.Client, places: list[Coordinates]) -> set[str]:
        """The ids for one batch, all pages of each query."""
        found: set[str] = set()
        pending = [(place, "") for place in places]
        for _page in range(_MAX_PAGES):
            if not pending:
                return found
            queries = [
                {"package": {"ecosystem": place.ecosystem, "name": place.name}, "version": place.version}
                | ({"page_token": token} if token else {})
                for place, token in pending
            ]
            answer = self._ask(client, "POST", "/v1/querybatch", _Results, {"queries": queries})
            if len(answer.results) != len(pending):
                raise ScanFailed(f"{self.source} answered {len(answer.results)} of {len(pending)} queries")
            again = []
            for (place, _), result in zip(pending, answer.results, strict=True):
                if result is not None:
                    found.update(each.id for each in itertools.islice(result.vulns or (), _MAX_IDS))
                    if result.next_page_token:
                        again.append((place, result.next_page_token))
            pending = again
        raise ScanFailed(f"{self.source} has more than {_MAX_PAGES} pages for one package")

    def _record(self, client: httpx.Client, name: str) -> OsvRecord:
        if not is_id(name):
            raise ScanFailed(f"{self.source} names a vulnerability {name[:40]!r}, which is no id")
        return self._ask(client, "GET", f"/v1/vulns/{urllib.parse.quote(name, safe='')}", OsvRecord)

    def _ask(self, client: httpx.Client, method: str, path: str, kind: type[T], body: Any = None) -> T:
        content = bytearray()
        try:
            with client.stream(method, self._url + path, json=body) as response:
                if response.status_code != 200:
                    raise ScanFailed(f"{self.source} answered {response.status_code}", why=f"{method} {path}")
                for chunk in response.iter_bytes():
                    content += chunk
                    if len(content) > _MAX_ANSWER:
                        raise ScanFailed(f"{self.source} answered with more than {_MAX_ANSWER} bytes")
        except httpx.HTTPError as error:
            raise ScanFailed(
                f"{self.source} can't be reached", why=str(error) or type(error).__name__, fix="use a database on disk"
            ) from error
        try:
            return msgspec.json.decode(bytes(content), type=kind)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            raise ScanFailed(f"{self.source} does not answer as OSV does", why=str(error)[:200]) from error
