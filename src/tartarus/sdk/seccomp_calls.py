"""The API's operations on system call profiles, as data; see `calls`."""

from __future__ import annotations

import builtins

import msgspec

from tartarus.model.ids import check_name
from tartarus.model.seccomp import Profile, PutProfile, RecordedCalls
from tartarus.sdk.calls import encode
from tartarus.sdk.http import Call, target

_ONE = msgspec.json.Decoder(Profile)
_ALL = msgspec.json.Decoder(list[Profile])
_RECORDED = msgspec.json.Decoder(RecordedCalls)


def profiles() -> Call[builtins.list[Profile]]:
    """All that can be named."""
    return Call("GET", target("seccomp"), _ALL.decode)


def profile(name: str) -> Call[Profile]:
    """One of them."""
    return Call("GET", target("seccomp", check_name(name)), _ONE.decode)


def put(name: str, request: PutProfile) -> Call[Profile]:
    """Keep one."""
    return Call("PUT", target("seccomp", check_name(name)), _ONE.decode, encode(request))


def remove(name: str) -> Call[None]:
    """Forget one."""
    return Call("DELETE", target("seccomp", check_name(name)), lambda _: None)


def recorded(sandbox: str) -> Call[RecordedCalls]:
    """What a sandbox has called."""
    return Call("GET", target("sandboxes", sandbox, "calls"), _RECORDED.decode)
