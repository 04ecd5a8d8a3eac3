"""Second places for checkpoints: whoever rolls the whole log back would have to roll those back as well."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import structlog

from tartarus.model.errors import InvalidRequest
from tartarus.store.audit import files

_log = structlog.get_logger("tartarus.audit")
_RETRY_S = 1.0
_RETRY_MAX_S = 60.0
_CLOSE_S = 5.0
_TIMEOUT_S = 5.0

Witness = Callable[[bytes], None]
"""Takes each signed checkpoint to a second place. What it raises is logged, and the newest is tried again."""


def witness_of(text: str) -> Witness:
    """The witness that a configuration names: a file's absolute path, an ``https://`` address, or ``syslog``.

    Raises InvalidRequest.
    """
    if text.startswith("/"):
        return file_witness(Path(text))
    if text == "syslog":
        return _syslog
    if text.startswith("https://"):
        return _http_witness(text)
    raise InvalidRequest(
        f"{text!r} is no place for checkpoints", fix="use an absolute path, an https address, or syslog"
    )


def file_witness(path: Path) -> Witness:
    """Appends each checkpoint to a file, which belongs on another disk or host."""

    def witness(note: bytes) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            files.write_all(fd, note + b"\n")
            os.fsync(fd)
        finally:
            os.close(fd)

    return witness


def _http_witness(address: str) -> Witness:
    def witness(note: bytes) -> None:
        import httpx

        answer = httpx.post(address, content=note, headers={"content-type": "text/plain"}, timeout=_TIMEOUT_S)
        answer.raise_for_status()

    return witness


def _syslog(note: bytes) -> None:
    import syslog

    # JSON, since a syslog message is one line.
    message = msgspec.json.encode(note.decode()).decode()
    syslog.syslog(syslog.LOG_AUTHPRIV | syslog.LOG_NOTICE, f"tartarus checkpoint: {message}")


class Witnessing:
    """A thread that tells the witness: a slow one must not hold up the log. Only the newest checkpoint waits."""

    def __init__(self, witness: Witness) -> None:
        self._witness = witness
        self._note: bytes | None = None
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="audit-witness", daemon=True)
        self._thread.start()

    def tell(self, note: bytes) -> None:
        """Have it told, and anything older not any more."""
        with self._changed:
            self._note = note
            self._changed.notify()

    def close(self) -> None:
        """Try the last one once more, and end."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(_CLOSE_S)

    def _work(self) -> None:
        delay_s = _RETRY_S
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._note is not None or self._closing)
                note, closing = self._note, self._closing
            if note is None:
                return
            try:
                self._witness(note)
            except Exception as error:  # noqa: BLE001 - whatever it is, the log goes on, and it is tried again
                _log.error("audit_not_witnessed", error=str(error))
                if closing:
                    return
                with self._changed:
                    self._changed.wait_for(lambda: self._closing, delay_s)
                delay_s = min(2 * delay_s, _RETRY_MAX_S)
                continue
            delay_s = _RETRY_S
            with self._changed:
                if self._note is note:
                    self._note = None
