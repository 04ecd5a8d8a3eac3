"""Errors on the wire: RFC 9457 problem documents, made from the one error registry."""

from __future__ import annotations

import http

import msgspec

from tartarus.model.errors import TartarusError

MEDIA_TYPE = "application/problem+json"
_encode = msgspec.json.Encoder().encode


class Problem(msgspec.Struct, frozen=True):
    """One error: `code` is the registry's and stable; `detail` what happened, `why`, and `fix` what to do."""

    type: str
    title: str
    status: int
    code: str
    detail: str
    why: str = ""
    fix: str = ""
    retryable: bool = False


def problem_of(error: TartarusError, status: int | None = None) -> Problem:
    """The document for `error`; `status` replaces the registry's HTTP status."""
    title = (type(error).__doc__ or "").strip().partition("\n")[0]
    return Problem(
        type=f"urn:tartarus:error:{error.code}",
        title=title,
        status=error.http_status if status is None else status,
        code=error.code,
        detail=error.what,
        why=error.why,
        fix=error.fix,
        retryable=error.retryable,
    )


def as_tartarus_error(error: Exception) -> TartarusError:
    """`error` itself, or what stands for one that nobody expected (logged with its traceback)."""
    if isinstance(error, TartarusError):
        return error
    import structlog  # late: the listening socket needs this module, and is up before the slow imports

    structlog.get_logger("tartarus.control").error("unexpected_error", exc_info=error)
    return TartarusError(
        "the daemon met an error that it did not expect",
        why=f"{type(error).__name__}: {error}" if str(error) else type(error).__name__,
        fix="see daemon.log in the state directory, and report it",
    )


def refusal_response(error: TartarusError) -> bytes:
    """A whole HTTP response, for a peer that never reaches the server."""
    problem = problem_of(error)
    body = _encode(problem)
    reason = http.HTTPStatus(problem.status).phrase
    head = f"HTTP/1.1 {problem.status} {reason}\r\ncontent-type: {MEDIA_TYPE}\r\ncontent-length: {len(body)}\r\n"
    return head.encode() + b"connection: close\r\n\r\n" + body
