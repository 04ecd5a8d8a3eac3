"""Signals by name or number, as people and images write them."""

from __future__ import annotations

import re
import signal as signals

from tartarus.model.errors import InvalidRequest

_FROM_MINIMUM = re.compile(r"RTMIN\+(\d{1,2})", re.ASCII)
_FROM_MAXIMUM = re.compile(r"RTMAX-(\d{1,2})", re.ASCII)
_HIGHEST = int(signals.SIGRTMAX)


def signal_number(text: str) -> int:
    """A signal from its number or name, with or without ``SIG``: TERM, SIGINT, 15, RTMIN+3. Raises InvalidRequest."""
    name = text.upper().removeprefix("SIG")
    if name.isascii() and name.isdigit() and len(name) < 3:
        number = int(name)
    elif found := _FROM_MINIMUM.fullmatch(name):
        number = int(signals.SIGRTMIN) + int(found[1])
    elif found := _FROM_MAXIMUM.fullmatch(name):
        number = _HIGHEST - int(found[1])
    else:
        number = int(getattr(signals.Signals, f"SIG{name}", 0))
    if not 1 <= number <= _HIGHEST:
        raise InvalidRequest(f"{text!r} is not a signal", fix="use a name or number, such as TERM or 15")
    return number
