"""Identifiers: short, sortable by nothing, safe in file names, URLs and host names."""

from __future__ import annotations

import os
import re

from tartarus.model.errors import InvalidRequest

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
_NAME = re.compile(r"^[a-zA-Z0-9](?:[a-zA-Z0-9_.-]{0,61}[a-zA-Z0-9])?$", re.ASCII)


def new_id(prefix: str) -> str:
    """A fresh id such as ``sbx-3kq9…``: 80 random bits in Crockford's base 32."""
    number = int.from_bytes(os.urandom(10), "big")
    digits = "".join(_ALPHABET[(number >> shift) & 31] for shift in range(75, -1, -5))
    return f"{prefix}-{digits}"


def check_name(name: str) -> str:
    """Return a sandbox or template name, or raise InvalidRequest.

    1 to 63 characters: ASCII letters, digits, ``_``, ``.``, ``-``; letter or digit at both ends;
    not of an id's form, so that names and ids never collide.
    """
    if not _NAME.match(name) or name.startswith("sbx-"):
        raise InvalidRequest(
            f"{name!r} is not a valid name",
            fix="use 1 to 63 letters, digits, '_', '.' or '-', and don't begin with 'sbx-'",
        )
    return name


def check_template_name(name: str) -> str:
    """Return a template's name, or raise InvalidRequest: a name as of a sandbox, and not of a template id's form."""
    return _not_like_an_id(name, "tpl-")


def check_snapshot_name(name: str) -> str:
    """Return a snapshot's name, or raise InvalidRequest: a name as of a sandbox, and not of a snapshot id's form."""
    return _not_like_an_id(name, "snap-")


def _not_like_an_id(name: str, prefix: str) -> str:
    if name.startswith(prefix):
        raise InvalidRequest(f"{name!r} is not a valid name", why=f"ids begin with {prefix!r}", fix="choose another")
    return check_name(name)
