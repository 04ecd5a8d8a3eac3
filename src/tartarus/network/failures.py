"""What this host or its kernel refuses, as whoever asked for a network is told it."""

from __future__ import annotations

import errno
import os

from tartarus.model.errors import GuestFailed, NoSpace, TartarusError
from tartarus.network import nft

_EXHAUSTED = frozenset({errno.ENOMEM, errno.ENOBUFS, errno.EMFILE, errno.ENFILE, errno.ENOSPC})


def unavailable() -> str:
    """Why sandboxes can't have a network on this host; nothing if they can."""
    if os.geteuid() != 0:
        return "the daemon does not run as root, and only root can join a sandbox to the host's network"
    if nft.path() is None:
        return "the program nft is missing; install nftables"
    return ""


def not_sworn(error: OSError) -> TartarusError:
    """A contract that was not put in force."""
    failed = NoSpace if error.errno in _EXHAUSTED else TartarusError
    return failed("the network contract can't be put in force", why=str(error))


def not_joined(error: OSError) -> TartarusError:
    """A sandbox that did not get its link."""
    failed = NoSpace if error.errno in _EXHAUSTED else GuestFailed
    return failed("the sandbox can't be joined to the network", why=str(error))
