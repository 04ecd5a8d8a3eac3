"""What the command line writes: bytes to files that may be slow, full or gone, and errors on one line."""

from __future__ import annotations

import os
import select

from tartarus.model.errors import TartarusError

SIGPIPE_STATUS = 141


class Closed(Exception):
    """Nobody reads standard output any more; a command in a pipe would be ended by SIGPIPE."""


def write(fd: int, data: bytes | memoryview) -> None:
    """Write all of `data`. Raises Closed when the reader has gone."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            # Whoever shares this file made it non-blocking.
            poller = select.poll()
            poller.register(fd, select.POLLOUT)
            poller.poll()
        except BrokenPipeError:
            raise Closed from None
        except OSError as error:
            raise TartarusError("can't write the output", why=error.strerror or str(error)) from error


def say(text: str) -> None:
    """One line on standard error; a reader that has gone is no reason to fail."""
    line = text.encode("utf-8", "backslashreplace") + b"\n"
    try:
        write(2, line)
    except (Closed, TartarusError):
        return


def one_line(text: str) -> str:
    """Without line breaks and control characters: a message may repeat what a guest or a user chose."""
    flat = " ".join(text.split())
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in flat)


def error_line(error: TartarusError) -> str:
    """``tartarus: error[code]: what: why (what to do)``."""
    return one_line(f"tartarus: error[{error.code}]: {error}")


def report(error: TartarusError) -> int:
    """Print an error; returns the exit status for it."""
    say(error_line(error))
    return error.exit_status
