"""Which host ids a sandbox's ids 0 to 65535 are."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from pathlib import Path

import msgspec

from tartarus.model.errors import IsolationUnavailable

PRIVILEGED_BASE = 0x7000_0000
"""First host id given to sandboxes when the daemon is root: above what distributions, systemd-nspawn
(0x00080000 to 0x6FFFFFFF) and /etc/subuid hand out, below 2**31."""
SPAN = 65536
OWNER_UID = PRIVILEGED_BASE + 2 * SPAN
"""Who owns the user namespaces that root makes. The process level's ids lie between."""


class IdMap(msgspec.Struct, frozen=True):
    """`base` is the host id of the sandbox's root; `span` how many ids follow. A span of 1 knows only root."""

    base: int
    span: int
    privileged: bool

    def apply(self, pid: int) -> None:
        """Give the user namespace of a process this map. Raises IsolationUnavailable with what to install."""
        # No privilege is needed to write this one, so that a guest could, for all guests of its template.
        Path(f"/proc/{pid}/projid_map").write_text(f"0 {self.base} {self.span}", encoding="ascii")
        if self.privileged:
            line = f"0 {self.base} {self.span}"
            Path(f"/proc/{pid}/uid_map").write_text(line, encoding="ascii")
            Path(f"/proc/{pid}/gid_map").write_text(line, encoding="ascii")
        elif self.span > 1:
            own_uid, own_gid = str(os.getuid()), str(os.getgid())
            for tool, own in (("newuidmap", own_uid), ("newgidmap", own_gid)):
                argv = [tool, str(pid), "0", own, "1", "1", str(self.base), str(self.span - 1)]
                done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=10)
                if done.returncode:
                    raise IsolationUnavailable(
                        f"{tool} refused", why=done.stderr.strip(), fix="check /etc/subuid and /etc/subgid"
                    )
        else:
            Path(f"/proc/{pid}/setgroups").write_text("deny", encoding="ascii")
            Path(f"/proc/{pid}/uid_map").write_text(f"0 {os.getuid()} 1", encoding="ascii")
            Path(f"/proc/{pid}/gid_map").write_text(f"0 {os.getgid()} 1", encoding="ascii")


def host_id_map() -> IdMap:
    """The map that this process may make: wide as root or with subordinate ids, else of one id."""
    if os.geteuid() == 0:
        return IdMap(PRIVILEGED_BASE, SPAN, privileged=True)
    subordinate = _subordinate_base("/etc/subuid")
    if subordinate is not None and subordinate == _subordinate_base("/etc/subgid") and shutil.which("newuidmap"):
        return IdMap(subordinate, SPAN, privileged=False)
    return IdMap(os.getuid(), 1, privileged=False)


def _subordinate_base(path: str) -> int | None:
    try:
        names = {str(os.getuid()), pwd.getpwuid(os.getuid()).pw_name}
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            owner, _, rest = line.partition(":")
            start, _, count = rest.partition(":")
            if owner in names and count.isdigit() and int(count) >= SPAN - 1:
                return int(start)
    except (OSError, KeyError, ValueError):
        return None
    return None
