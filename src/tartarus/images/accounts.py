"""Who a user name means in an image: its own /etc/passwd and /etc/group, read with Docker's rules for USER.

Both files are the image's word, so they are bounded, lines that are none are passed over, and no id outside of
the range that sandboxes have is ever handed on.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Final, NamedTuple

from tartarus.images.stackview import StackView
from tartarus.model.errors import ImageRefused, InvalidRequest

MAX_ID: Final = 65535
"""The highest user and group id a sandbox has."""
MAX_BYTES: Final = 4 * 1024 * 1024
MAX_GROUPS: Final = 1024
_MAX_HOME = 4095  # PATH_MAX without its NUL, limits.h


class Account(NamedTuple):
    """Whom a sandbox's processes run as. `name` is empty for an id that /etc/passwd does not know."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str
    name: str


def find_user(view: StackView, spec: str) -> Account:
    """Who `spec` is: ``app``, ``1000``, ``app:staff``, ``1000:1000``, or nothing for root.

    As Docker does: a name must be in /etc/passwd, an id need not; a user without ``:group`` has the group and the
    supplementary groups that the image's files give, one with it has that group alone.

    Raises InvalidRequest for a user or group that isn't there or is out of range, ImageRefused for files that are
    no account files.
    """
    user, colon, group = spec.partition(":")
    if colon and not group:
        raise InvalidRequest(f"user {spec!r} names no group after its colon", fix="write user, or user:group")
    account = _user(view, user)
    if group:
        return account._replace(gid=_group(view, group), groups=())
    return account._replace(groups=_groups_of(view, account.name))


def find_group(view: StackView, group: str) -> int:
    """The id of a group by name or number. Raises as `find_user` does."""
    return _group(view, group)


def _user(view: StackView, wanted: str) -> Account:
    for fields in _lines(view, "/etc/passwd", 6):
        name, uid, gid = fields[0], _number(fields[2]), _number(fields[3])
        if uid is None or gid is None or not _is_meant(wanted or "0", name, uid, by_name=bool(wanted)):
            continue
        _in_range(f"user {name!r}", uid)
        _in_range(f"the group of user {name!r}", gid)
        return Account(uid, gid, (), _home(fields[5]), name)
    number = _number(wanted or "0")
    if number is None:
        raise InvalidRequest(
            f"there is no user {wanted!r}", why="the image's /etc/passwd has none", fix="use one it has, or a number"
        )
    return Account(_in_range(f"user {wanted!r}", number), 0, (), "/", "")


def _group(view: StackView, wanted: str) -> int:
    for fields in _lines(view, "/etc/group", 3):
        gid = _number(fields[2])
        if gid is not None and _is_meant(wanted, fields[0], gid, by_name=True):
            return _in_range(f"group {wanted!r}", gid)
    number = _number(wanted)
    if number is None:
        raise InvalidRequest(
            f"there is no group {wanted!r}", why="the image's /etc/group has none", fix="use one it has, or a number"
        )
    return _in_range(f"group {wanted!r}", number)


def _groups_of(view: StackView, name: str) -> tuple[int, ...]:
    """The groups that list `name` as a member, those out of range left out."""
    if not name:
        return ()
    found: dict[int, None] = {}
    for fields in _lines(view, "/etc/group", 4):
        gid = _number(fields[2])
        if gid is not None and gid <= MAX_ID and name in fields[3].split(","):
            found[gid] = None
    if len(found) > MAX_GROUPS:
        raise ImageRefused(f"user {name!r} is in {len(found)} groups", why=f"at most {MAX_GROUPS} are taken")
    return tuple(found)


def _is_meant(wanted: str, name: str, number: int, *, by_name: bool) -> bool:
    return (by_name and name == wanted) or _number(wanted) == number


def _lines(view: StackView, path: str, fields: int) -> Iterator[list[str]]:
    """The lines of `path` that have at least so many fields; none when there is no such file."""
    try:
        content = view.read(path, MAX_BYTES)
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno in {errno.EFBIG, errno.EINVAL, errno.EISDIR}:
            raise ImageRefused(f"the image's {path} is no account file", why=error.strerror or str(error)) from error
        raise
    for line in content.decode("utf-8", "surrogateescape").split("\n"):
        parts = line.strip().split(":")
        if len(parts) >= fields and parts[0] and "\0" not in line and _is_text(parts[0]):
            yield parts


def _number(text: str) -> int | None:
    # Longer than any id and int() would be slow, or refuse with an error of its own.
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 10 else None


def _in_range(what: str, number: int) -> int:
    if number > MAX_ID:
        raise InvalidRequest(
            f"{what} has the id {number}", why=f"sandboxes have ids 0 to {MAX_ID}", fix="use a lower one"
        )
    return number


def _home(text: str) -> str:
    """A home as an environment can carry it; the root for one that is none, as runc does."""
    return text if text.startswith("/") and len(text) <= _MAX_HOME and _is_text(text) else "/"


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
