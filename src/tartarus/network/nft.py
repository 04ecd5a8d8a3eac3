"""The nft program: changes of the packet filter that are text, and what the filter of others says."""

from __future__ import annotations

import json
import os
import shutil
import subprocess

from tartarus.model.errors import TartarusError, Unsupported

_NFT_TIMEOUT_S = 30.0
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def apply(change: str, lock: int | None = None) -> None:
    """Apply a change, all of it or nothing, in the calling thread's network namespace. Raises Unsupported.

    `lock`: an open file that is held until the program has ended, even if we end before it.
    """
    done = _run("-f", "-", given=change, lock=lock)
    if done.returncode != 0:
        raise Unsupported(
            "the packet filter's rules can't be installed",
            why=done.stderr.strip()[-2000:] or f"nft ended with {done.returncode}",
            fix="sandbox networks need nftables 0.9.8 or later and a kernel with nf_tables",
        )


def as_json(*arguments: str) -> str:
    """What ``nft -j ...`` prints in the calling thread's network namespace. Raises TartarusError."""
    done = _run("-j", *arguments)
    if done.returncode != 0:
        raise TartarusError("the packet filter can't be read", why=done.stderr.strip()[-2000:])
    return done.stdout


def listing(table: str) -> str:
    """A table as it stands, without what it counted; nothing if there is none."""
    return _run("-s", "list", "table", "inet", table).stdout


def foreign_refusals(ruleset: str, table: str, uplink: str) -> list[str]:
    """Which other tables of `nft -j list ruleset` drop forwarded packets that they don't know, in words.

    A table can't let through what another one refuses, so these are the administrator's to change. One with a rule
    that names `uplink` has been.
    """
    items = json.loads(ruleset)["nftables"]
    aware = {
        item["rule"]["table"] for item in items if "rule" in item and f'"{uplink}"' in json.dumps(item["rule"]["expr"])
    }
    found = []
    for chain in (item["chain"] for item in items if "chain" in item):
        if chain.get("hook") != "forward" or chain["table"] == table or chain["table"] in aware:
            continue
        if chain["table"] == "firewalld":
            found.append(
                f"firewalld refuses what it forwards for no zone: firewall-cmd --permanent --zone=trusted "
                f"--add-interface={uplink} && firewall-cmd --reload"
            )
        elif chain.get("policy") == "drop":
            first = (
                "DOCKER-USER"
                if any(item["chain"]["name"] == "DOCKER-USER" for item in items if "chain" in item)
                else "FORWARD"
            )
            found.append(
                f"the chain {chain['name']} of the table {chain['family']} {chain['table']} drops by default: "
                f"iptables -I {first} -i {uplink} -j ACCEPT && iptables -I {first} -o {uplink} -m conntrack "
                f"--ctstate ESTABLISHED,RELATED -j ACCEPT"
            )
    return sorted(set(found))


def path() -> str | None:
    """Where the nft program is."""
    return shutil.which("nft", path=_PATH)


def _run(*arguments: str, given: str = "", lock: int | None = None) -> subprocess.CompletedProcess[str]:
    program = path()
    if program is None:
        raise Unsupported(
            "sandboxes can't have a network here", why="the program nft is missing", fix="install nftables"
        )
    return subprocess.run(
        [program, *arguments], input=given, capture_output=True, text=True, timeout=_NFT_TIMEOUT_S, check=False,
        env={"PATH": os.defpath, "LANG": "C.UTF-8"}, pass_fds=() if lock is None else (lock,),
    )  # fmt: skip
