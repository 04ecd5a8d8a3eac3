"""What a registry's answer means: good, to be tried again, or an error in our words with a little of its own."""

from __future__ import annotations

import contextlib
import datetime as dt
import email.utils
import ssl
import time
from collections.abc import Iterator

import httpx
import msgspec

from tartarus.model.errors import ImageNotFound, RegistryFailed

_MAX_ERROR_BYTES = 16 * 1024
_MAX_WORDS = 200
# Longer than that, a user would rather be told.
_MAX_DELAY_S = 60.0
ANSWER_TIMEOUT_S = 120.0
"""How long a small answer may take as a whole, beside the limit for each silence in it."""
_AGAIN = {408, 425, 429, 500, 502, 503, 504}


class Temporary(Exception):
    """The same request may succeed later. `error` is what to raise when it does not; `delay_s` what was asked for."""

    def __init__(self, error: RegistryFailed, delay_s: float = 0.0) -> None:
        super().__init__(str(error))
        self.error = error
        self.delay_s = delay_s


class _Problem(msgspec.Struct):
    message: str = ""


class _Problems(msgspec.Struct):
    errors: list[_Problem] = []


async def read_at_most(response: httpx.Response, limit: int, what: str) -> bytes:
    """The answer's body, as sent; RegistryFailed when it is longer than `limit` bytes, or compressed unasked."""
    if response.headers.get("Content-Encoding", "identity").lower() not in {"", "identity"}:
        raise RegistryFailed(f"the registry sends {what} compressed", why="it was asked not to")
    pieces = bytearray()
    deadline = time.monotonic() + ANSWER_TIMEOUT_S
    async for chunk in response.aiter_raw():
        pieces += chunk
        if len(pieces) > limit:
            raise RegistryFailed(f"the registry sends too much for {what}", why=f"at most {limit} bytes are taken")
        if time.monotonic() > deadline:
            raise RegistryFailed(f"the registry sends {what} too slowly")
    return bytes(pieces)


async def check(response: httpx.Response, what: str) -> None:
    """Raise what an answer other than success means; `what` is what was asked for."""
    status = response.status_code
    if 200 <= status < 300:
        return
    words = await _words(response)
    host = response.url.host
    why = f"it answered {status}{words and f', {words}'}"
    if status == 404:
        raise ImageNotFound(f"{host} has no {what}", why=words, fix="check the name and the tag")
    if status in {401, 403}:
        raise RegistryFailed(
            f"{host} refuses access to {what}",
            why=why,
            fix="check the name, and log in with docker login if it is private",
        )
    error = RegistryFailed(f"{host} failed at {what}", why=why)
    if status in _AGAIN:
        raise Temporary(error, _retry_after(response.headers.get("Retry-After", "")))
    raise error


async def _words(response: httpx.Response) -> str:
    """What the registry says of its refusal (distribution specification, "Error Codes"), fit to be shown."""
    try:
        content = await read_at_most(response, _MAX_ERROR_BYTES, "its refusal")
        problems = msgspec.json.decode(content, type=_Problems).errors
    except (RegistryFailed, msgspec.MsgspecError, UnicodeDecodeError, RecursionError, httpx.HTTPError):
        return ""
    words = "; ".join(problem.message for problem in problems[:3])
    return "".join(letter for letter in words if letter.isprintable())[:_MAX_WORDS]


def _retry_after(value: str) -> float:
    """Seconds, from a number or a date; no more than a minute."""
    try:
        delay = float(value)
    except ValueError:
        try:
            then = email.utils.parsedate_to_datetime(value)
            delay = (then - dt.datetime.now(then.tzinfo or dt.UTC)).total_seconds()
        except (ValueError, TypeError, OverflowError):
            delay = 0.0
    return min(max(delay, 0.0), _MAX_DELAY_S) if delay == delay else 0.0  # noqa: PLR0124 - a NaN is no delay


@contextlib.contextmanager
def connection_failure(url: httpx.URL) -> Iterator[None]:
    """Turn httpx's errors into ours. No URL's path or query is shown: those of redirects carry signatures."""
    try:
        yield
    except httpx.TransportError as error:
        if _is_certificate(error):
            raise RegistryFailed(
                f"{url.host} has no certificate that we trust",
                why=_certificate_problem(error),
                fix="if it is yours, give its authority's certificate as the registry's ca_file",
            ) from None
        failed = RegistryFailed(
            f"can't talk to {url.host}", why=f"{type(error).__name__}: {error}".rstrip(": "), fix="check the network"
        )
        raise Temporary(failed) from error
    except TimeoutError as error:
        raise Temporary(RegistryFailed(f"{url.host} takes too long to answer", fix="check the network")) from error
    except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError) as error:
        raise RegistryFailed(f"can't talk to {url.host}", why=type(error).__name__) from None


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def _is_certificate(error: BaseException) -> bool:
    return any(isinstance(each, ssl.SSLCertVerificationError) for each in _chain(error))


def _certificate_problem(error: BaseException) -> str:
    found = next((each for each in _chain(error) if isinstance(each, ssl.SSLCertVerificationError)), None)
    return found.verify_message if found is not None else ""
