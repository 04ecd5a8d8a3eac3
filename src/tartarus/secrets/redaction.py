"""Known values are taken out of what we write ourselves: logs, errors, messages of records.

In each spelling that our own code could give them: as they are, in JSON, as Python shows bytes, in a URL, in base64.
Values below `SHORTEST` bytes are left alone, since they stand everywhere by chance.
"""

from __future__ import annotations

import base64
import json
from collections import Counter
from urllib.parse import quote

from tartarus.secrets.held import Secret

SHORTEST = 6
MARK = "[secret]"


class Redactor:
    """Knows the values that are held now."""

    def __init__(self) -> None:
        self._known: Counter[tuple[Secret, ...]] = Counter()

    def add(self, value: Secret) -> tuple[Secret, ...]:
        """From now on take `value` out; what is returned is given to `remove`."""
        spellings = tuple(Secret(spelling) for spelling in _spellings(value.reveal()))
        self._known[spellings] += 1
        return spellings

    def remove(self, spellings: tuple[Secret, ...]) -> None:
        """Forget a value."""
        if self._known.pop(spellings, 0):
            for spelling in spellings:
                spelling.close()

    def text(self, text: str) -> str:
        """`text` without any known value."""
        if not self._known:
            return text
        raw = text.encode("utf-8", "surrogateescape")
        found = raw
        for spellings in self._known:
            for spelling in spellings:
                found = spelling.replace_in(found, MARK.encode())
        return text if found is raw else found.decode("utf-8", "surrogateescape")


def _spellings(value: bytes) -> list[bytes]:
    """The longest first, so that a shorter one leaves no end of it."""
    text = value.decode("utf-8", "surrogateescape")
    trimmed = value.strip()
    whole = base64.b64encode(value)
    found = {
        value, trimmed, whole, whole.rstrip(b"="), base64.urlsafe_b64encode(value).rstrip(b"="),
        json.dumps(text)[1:-1].encode("utf-8", "surrogateescape"),
        json.dumps(text, ensure_ascii=False)[1:-1].encode("utf-8", "surrogateescape"),
        repr(value)[2:-1].encode(), repr(text)[1:-1].encode("utf-8", "surrogateescape"),
        quote(value, safe="").encode(),
    }  # fmt: skip
    return sorted((one for one in found if len(one) >= SHORTEST), key=len, reverse=True)
