"""The daemon's log: one JSON object a line, rotated by size; the libraries' own records go the same way."""

from __future__ import annotations

import io
import logging
import os
import sys
from logging.handlers import RotatingFileHandler
from typing import TYPE_CHECKING, Any

import msgspec
import structlog

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_encode = msgspec.json.Encoder(enc_hook=repr, order="deterministic").encode


class _PrivateFile(RotatingFileHandler):
    """Readable by its owner only: the log may name what tenants run."""

    def _open(self) -> io.TextIOWrapper:
        descriptor = os.open(self.baseFilename, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        return open(descriptor, "a", encoding=self.encoding, errors=self.errors)


def _as_it_is(text: str) -> str:
    return text


def configure(
    path: Path | None,
    *,
    max_bytes: int,
    files: int,
    level: int = logging.INFO,
    redact: Callable[[str], str] = _as_it_is,
) -> None:
    """Send every log record to `path` (None: standard error) as JSON lines.

    At `max_bytes` the file becomes ``path.1`` and so on; at most `files` files exist, the current one included.
    `redact` takes out of every line what no log may have.
    """

    def to_json(event: Any, **_: Any) -> str:
        return redact(_encode(event).decode())

    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
        structlog.processors.format_exc_info,
    ]
    handler: logging.Handler
    if path is None:
        handler = logging.StreamHandler(sys.stderr)
    else:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handler = _PrivateFile(
            path, maxBytes=max_bytes, backupCount=max(files - 1, 1), encoding="utf-8", errors="backslashreplace"
        )
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.JSONRenderer(serializer=to_json),
            ],
        )
    )
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
    root.setLevel(level)
    # A line per connection would cost more than the request; the sandboxes' own events say more.
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access", "asyncio", "litestar", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
