"""One HTTP/1.1 exchange without any I/O: what to send for a call, and what its answer says.

Framing is h11's (taken, 6 ms of import beside msgspec; httpx would be 70), so the blocking and the async
transport differ only in how bytes move. One exchange uses one connection: on a Unix socket a
connection costs 0.05 ms, and there is no pool to share between threads, forks or event loops.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Generic, NamedTuple, TypeVar
from urllib.parse import quote, urlencode

import h11
import msgspec

from tartarus import __version__
from tartarus.model.errors import DaemonUnavailable, InvalidRequest, TartarusError, from_code
from tartarus.sdk.streams import VERSION_HEADER, check_version
from tartarus.sdk.websocket import broken

T = TypeVar("T")
_MAX_PROBLEM_BYTES = 1024**2
_VERSION = VERSION_HEADER.encode()


class Problem(msgspec.Struct):
    """The members of the daemon's problem documents that a client needs."""

    code: str
    detail: str
    why: str = ""
    fix: str = ""

    def error(self) -> TartarusError:
        """The exception it stands for."""
        return from_code(self.code, self.detail, why=self.why, fix=self.fix)


def problem_error(status: int, body: bytes) -> TartarusError:
    """The error in a refusal's body, or one that says what came instead."""
    try:
        return msgspec.json.decode(body, type=Problem).error()
    except msgspec.MsgspecError:
        return DaemonUnavailable(f"the daemon answered with HTTP status {status}", fix="see its log, daemon.log")


class Call(NamedTuple, Generic[T]):
    """One request of the API and how to read its answer.

    `patience_s`: how long the daemon may be silent; None for calls that last as long as what they wait for.
    """

    method: str
    target: str
    decode: Callable[[bytes], T]
    body: bytes | None = None
    patience_s: float | None = 60.0

    def read(self, body: bytes) -> T:
        """Decode the whole answer. Raises DaemonUnavailable when it is not what this call is answered with."""
        try:
            return self.decode(body)
        except msgspec.MsgspecError as error:
            raise broken(str(error)) from error


def target(*parts: str, **query: Any) -> str:
    """``/v1/…`` from path parts (quoted) and query parameters; None and "" are left out, lists repeat."""
    path = "/v1/" + "/".join(quote(part, safe="") for part in parts)
    pairs: list[tuple[str, str]] = []
    for name, value in query.items():
        for item in value if isinstance(value, list) else [value]:
            if item is None or item == "":
                continue
            pairs.append((name, str(item).lower() if isinstance(item, bool) else str(item)))
    try:
        return f"{path}?{urlencode(pairs)}" if pairs else path
    except UnicodeEncodeError as error:
        raise InvalidRequest("a path or name is not UTF-8 text", fix="rename it") from error


class Exchange:
    """One request and its answer: `request` and `body_part` make bytes, `receive` takes them.

    `status` is 0 until the whole head has come; `done` is true at the answer's end.
    """

    def __init__(self, *, any_version: bool = False) -> None:
        self._any_version = any_version
        self._h11 = h11.Connection(h11.CLIENT)
        self.status = 0
        self.done = False
        self._heard = False
        self._problem = bytearray()

    @property
    def accepted(self) -> bool:
        """Whether the answer is known to be no refusal (which is raised at its end)."""
        return 0 < self.status < 400

    def request(self, call: Call[Any], *, streamed: bool = False) -> bytes:
        """The request's head, with `call.body`; when `streamed`, the body follows through `body_part`."""
        headers = [("host", "tartarus"), ("connection", "close"), ("user-agent", f"tartarus-sdk/{__version__}")]
        if streamed:
            headers.append(("transfer-encoding", "chunked"))
        elif call.body is not None:
            headers += [("content-type", "application/json"), ("content-length", str(len(call.body)))]
        elif call.method in {"POST", "PUT"}:
            headers.append(("content-length", "0"))
        data = self._send(h11.Request(method=call.method, target=call.target, headers=headers))
        if streamed:
            return data
        return data + self.body_part(call.body or b"") + self.body_end()

    def body_part(self, data: bytes | memoryview) -> bytes:
        """Bytes that send one more part of the body."""
        return self._send(h11.Data(data=bytes(data))) if data else b""

    def body_end(self) -> bytes:
        """Bytes that end the body."""
        return self._send(h11.EndOfMessage())

    def receive(self, data: bytes) -> Iterator[bytes]:
        """Take bytes (empty: the daemon closed) and yield the answer's body as it comes.

        Raises the error that the daemon answered with, VersionMismatch, or DaemonUnavailable.
        """
        if not data and not self._heard:
            raise DaemonUnavailable("the daemon went away before it answered", fix="try again")
        self._heard = True
        try:
            self._h11.receive_data(data)
            while True:
                event = self._h11.next_event()
                if event is h11.NEED_DATA or event is h11.PAUSED:
                    return
                if isinstance(event, h11.Response):
                    self._head(event)
                elif isinstance(event, h11.Data):
                    if self.status < 400:
                        yield bytes(event.data)
                    elif len(self._problem) < _MAX_PROBLEM_BYTES:
                        self._problem += event.data
                elif isinstance(event, h11.EndOfMessage):
                    self.done = True
                    if self.status >= 400:
                        raise problem_error(self.status, bytes(self._problem))
                    return
        except h11.RemoteProtocolError as error:
            raise DaemonUnavailable("the daemon's answer broke off", why=str(error), fix="see its log") from error

    def _head(self, response: h11.Response) -> None:
        self.status = response.status_code
        told = next((value.decode("latin-1") for name, value in response.headers if name == _VERSION), None)
        # A refusal at the door comes without one, and says more than a comparison of versions could.
        if not self._any_version and (told is not None or self.status < 400):
            check_version(told)

    def _send(self, event: h11.Event) -> bytes:
        return self._h11.send(event) or b""
