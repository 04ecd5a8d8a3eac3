"""Forwarding of IPv6 on the host: of single links where the kernel can (6.17 and later), else of all of them at once.

What turns it on for all would have the host ignore its routers' advertisements, which it goes on to take where it did.
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv6Network
from pathlib import Path

from tartarus.network.links import UNICAST, Route
from tartarus.network.rules import UPLINK_PREFIX

CONF = Path("/proc/sys/net/ipv6/conf")
ALL = "all/forwarding"
_LINK = "force_forwarding"
_ADVERTISEMENTS, _ALSO_WHEN_FORWARDING = "accept_ra", "2"
_LEAST_MTU = 1280  # RFC 8200

Settings = tuple[tuple[str, str], ...]
"""Names below `CONF`, and what they were before us; in the order in which they are changed."""


def why_not(routes: Iterable[Route], mtu: int) -> str:
    """Why sandboxes can't have IPv6 on this host, in words; nothing if they can."""
    if not CONF.exists():
        return "the host's kernel has no IPv6"
    if mtu < _LEAST_MTU:
        return f"the host's ways out carry packets of {mtu} bytes, and IPv6 takes {_LEAST_MTU}"
    everywhere = IPv6Network("::/0")
    if not any(route.destination == everywhere and route.kind == UNICAST for route in routes):
        return "the host has no default route for IPv6"
    return ""


def wanted(ways: Iterable[str], before: Settings) -> Settings:
    """What has to be changed so that those links forward, with what was changed already.

    Nothing where somebody else has all links forward, who then answers for it.
    """
    forwarded = [name for name, _ in before]
    if ALL in forwarded:
        return before
    if read(ALL) == "1":
        return ()
    if read(f"default/{_LINK}"):
        names = [f"{way}/{_LINK}" for way in ways]
        return tuple(sorted({*before, *((name, "0") for name in names if read(name) == "0")}))
    links = sorted(
        path.name for path in CONF.iterdir() if path.name != "all" and not path.name.startswith(UPLINK_PREFIX)
    )
    listening = [f"{link}/{_ADVERTISEMENTS}" for link in links if read(f"{link}/forwarding") == "0"]
    return (
        *((name, "1") for name in listening if read(name) == "1"),
        (ALL, "0"),
        # Which the one for all links takes with it when it is put back.
        *((f"{link}/forwarding", "1") for link in links if read(f"{link}/forwarding") == "1"),
    )


def forwards_all(settings: Settings) -> bool:
    """Whether they have every link of the host forward."""
    return any(name == ALL for name, _ in settings)


def guarded(settings: Settings) -> list[str]:
    """The links that forward by themselves because of us."""
    return [name.partition("/")[0] for name, _ in settings if name.endswith(f"/{_LINK}")]


def apply(settings: Settings) -> None:
    """Change them. Raises OSError where the host's are not ours to write."""
    for name, _ in settings:
        _write(name, _ALSO_WHEN_FORWARDING if name.endswith(f"/{_ADVERTISEMENTS}") else "1")


def undo(settings: Settings) -> None:
    """Put back what they were, first that packets are forwarded. Raises OSError."""
    for name, value in sorted(settings, key=lambda one: (one[0] != ALL, one[0].endswith(_ADVERTISEMENTS))):
        if not name.endswith(f"/{_ADVERTISEMENTS}") or read(name) == _ALSO_WHEN_FORWARDING:
            _write(name, value)


def prepare(link: str) -> None:
    """Have a link of ours carry IPv6, with no address but those that it is given, and forward. Raises OSError.

    What ends forwarding of all links ends that of each, so this may have to be done again.
    """
    for name, value in (("accept_ra", "0"), ("accept_redirects", "0"), ("autoconf", "0"), ("addr_gen_mode", "1"),
                        ("disable_ipv6", "0"), (_LINK, "1")):  # fmt: skip
        _write(f"{link}/{name}", value)


def read(name: str) -> str:
    """A setting; nothing where there is none, or its link has gone."""
    try:
        return (CONF / name).read_text(encoding="ascii").strip()
    except FileNotFoundError:
        return ""


def _write(name: str, value: str) -> None:
    if read(name) not in {"", value}:
        (CONF / name).write_text(value, encoding="ascii")
