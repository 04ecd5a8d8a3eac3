"""The packet filter's two tables as nftables text: the router's, which knows each slot, and the host's second wall.

A slot's number, addresses and links are fixed, so both tables are complete before the first sandbox: taking a slot
and giving it back change no rule. What the rules count, they count by themselves in sets (`add @refused {...}`).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network

from tartarus.model.errors import TartarusError, Unsupported
from tartarus.network.destinations import CLOSED, HostNetworks
from tartarus.network.settings import NetworkSettings

ROUTER_TABLE = "tartarus"
UPLINK_PREFIX = "tartarus"
"""What the name of every daemon's link begins with, in the host."""
UPLINK = "uplink"
"""The router's link to the host."""
REFUSED_SET = "refused"
OPENED_SET = "opened"
# Each reason for which the router refuses a packet; its place (from 1) is the mark that it is counted under.
REASONS = (
    "ipv6", "spoofed", "invalid", "gateway", "host", "peer", *CLOSED, "neighbour", "dns", "protocol", "rate",
    "connections",
)  # fmt: skip
_NFT_TIMEOUT_S = 30.0
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def slot_link(number: int) -> str:
    """The name of a slot's link in the router."""
    return f"slot{number}"


def router_table(
    slots: dict[str, IPv4Address], gateway: IPv4Address, network: IPv4Network, settings: NetworkSettings
) -> str:
    """The router's table. `slots`: each link's only source address; `gateway`: where the resolver listens."""
    sources = ", ".join(f'"{link}" . {address}' for link, address in slots.items())
    marks = ", ".join(f'"{link}" : {number}' for number, link in enumerate(slots, 1))
    closed = "\n".join(f"ip daddr {{ {', '.join(CLOSED[reason])} }} {_refuse(reason)}" for reason in CLOSED)
    return f"""
table inet {ROUTER_TABLE} {{
  set sources {{ type ifname . ipv4_addr; elements = {{ {sources} }}; }}
  map marks {{ type ifname : mark; elements = {{ {marks} }}; }}
  set host {{ type ipv4_addr; flags interval; }}
  set neighbours {{ type ipv4_addr; flags interval; }}
  set {REFUSED_SET} {{ type ifname . mark; size 65535; flags dynamic; }}
  set {OPENED_SET} {{ type ifname; size 65535; flags dynamic; }}
  set query_rates {{ type ifname; size 65535; flags dynamic; }}
  set opening_rates {{ type ifname; size 65535; flags dynamic; }}
  set open_now {{ type ifname; size 65535; flags dynamic; }}

  chain discard {{
    add @{REFUSED_SET} {{ iifname . meta mark counter }}
    drop
  }}
  chain refuse {{
    add @{REFUSED_SET} {{ iifname . meta mark counter }}
    reject with icmpx admin-prohibited
  }}

  # Queries come and go without a connection's record, of which a slot may have only so many.
  chain untracked {{
    type filter hook prerouting priority raw; policy accept;
    iifname "slot*" ip daddr {gateway} udp dport 53 notrack
  }}
  chain untracked_answers {{
    type filter hook output priority raw; policy accept;
    oifname "slot*" ip saddr {gateway} udp sport 53 notrack
  }}

  # Every packet that enters the router, before anything else looks at it.
  chain entering {{
    type filter hook prerouting priority mangle; policy drop;
    iifname "{UPLINK}" ct state established,related accept
    iifname != "slot*" drop
    meta nfproto != ipv4 {_discard("ipv6")}
    iifname . ip saddr != @sources {_discard("spoofed")}
    ip daddr {gateway} udp dport 53 add @query_rates {{ iifname limit rate over {settings.dns_queries}/second \
burst {4 * settings.dns_queries} packets }} {_discard("rate")}
    ip daddr {gateway} udp dport 53 accept
    ct state established,related accept
    ct state != new {_discard("invalid")}
    ip daddr {gateway} tcp dport != 53 {_refuse("gateway")}
    ip daddr {gateway} meta l4proto != tcp {_refuse("gateway")}
    ip daddr {gateway} goto opening
    ip daddr @host {_refuse("host")}
    ip daddr {network} {_refuse("peer")}
    {closed}
    ip daddr @neighbours {_refuse("neighbour")}
    meta l4proto {{ tcp, udp }} th dport {{ 53, 853 }} {_refuse("dns")}
    meta l4proto != {{ tcp, udp, icmp }} {_refuse("protocol")}
    meta l4proto icmp icmp type != echo-request {_refuse("protocol")}
    goto opening
  }}
  chain opening {{
    add @opening_rates {{ iifname limit rate over {settings.new_connections}/second burst {settings.burst} packets }} \
{_refuse("rate")}
    add @open_now {{ iifname ct count over {settings.connections} }} {_refuse("connections")}
    ct mark set iifname map @marks
    add @{OPENED_SET} {{ iifname counter }} accept
  }}

  chain forward {{
    type filter hook forward priority filter; policy drop;
    iifname "slot*" oifname "{UPLINK}" accept
    iifname "{UPLINK}" oifname "slot*" ct state established,related accept
  }}
  chain input {{
    type filter hook input priority filter; policy drop;
    iifname "slot*" ip daddr {gateway} meta l4proto {{ tcp, udp }} th dport 53 accept
    iifname "slot*" ct state established,related accept
  }}
}}
"""


def host_table(table: str, uplink: str, network: IPv4Network) -> str:
    """The host's table: what leaves the router may only go on to public addresses, and nothing else is let through.

    `opened` holds the links that forward packets because we had them do so: for others than us (and daemons like us,
    whose tables say what they let in) they still don't.
    """
    closed = ", ".join(text for texts in _without_overlaps().values() for text in texts)
    return f"""
table inet {table} {{
  set host {{ type ipv4_addr; flags interval; }}
  set neighbours {{ type ipv4_addr; flags interval; }}
  set opened {{ type ifname; }}

  chain leaving {{
    meta nfproto != ipv4 counter drop
    ip saddr != {network} counter drop
    ct state established,related accept
    ct state != new counter drop
    ip daddr @host counter drop
    ip daddr @neighbours counter drop
    ip daddr {{ {closed} }} counter drop
    fib daddr type != unicast counter drop
    accept
  }}
  # After the host's own address translation, and before the filters of others, who may refuse more.
  chain forward {{
    type filter hook forward priority filter - 5; policy accept;
    iifname "{uplink}" goto leaving
    oifname "{uplink}" ct state established,related accept
    oifname "{uplink}" counter drop
    iifname @opened oifname != "{UPLINK_PREFIX}*" counter drop
  }}
  chain input {{
    type filter hook input priority filter - 5; policy accept;
    iifname "{uplink}" counter drop
  }}
  chain output {{
    type filter hook output priority filter - 5; policy accept;
    oifname "{uplink}" ct state != {{ established, related }} counter drop
  }}
  chain postrouting {{
    type nat hook postrouting priority srcnat; policy accept;
    ip saddr {network} oifname != "{uplink}" masquerade
  }}
}}
"""


def host_networks(table: str, networks: HostNetworks) -> str:
    """The change that makes a table know `networks`, in one step."""
    lines = []
    for name, members in (("host", networks.host), ("neighbours", networks.neighbours)):
        lines.append(f"flush set inet {table} {name}")
        if members:
            lines.append(f"add element inet {table} {name} {{ {', '.join(str(member) for member in members)} }}")
    return "\n".join(lines) + "\n"


def opened(table: str, links: Iterable[str]) -> str:
    """The change that makes the host's table hold exactly `links` closed for what is not ours."""
    names = ", ".join(f'"{link}"' for link in links)
    text = f"flush set inet {table} opened\n"
    return text + (f"add element inet {table} opened {{ {names} }}\n" if names else "")


def replace(table: str, text: str) -> str:
    """The change that puts `text` in a table's place, whether there is one or not, in one step."""
    return f"table inet {table}\ndelete table inet {table}\n{text}"


def remove(table: str) -> str:
    """The change that removes a table, whether there is one or not."""
    return f"table inet {table}\ndelete table inet {table}\n"


def nft(change: str, lock: int | None = None) -> None:
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


def nft_json(*arguments: str) -> str:
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


def nft_path() -> str | None:
    """Where the nft program is."""
    return shutil.which("nft", path=_PATH)


def _run(*arguments: str, given: str = "", lock: int | None = None) -> subprocess.CompletedProcess[str]:
    program = nft_path()
    if program is None:
        raise Unsupported(
            "sandboxes can't have a network here", why="the program nft is missing", fix="install nftables"
        )
    return subprocess.run(
        [program, *arguments], input=given, capture_output=True, text=True, timeout=_NFT_TIMEOUT_S, check=False,
        env={"PATH": os.defpath, "LANG": "C.UTF-8"}, pass_fds=() if lock is None else (lock,),
    )  # fmt: skip


def _mark(reason: str) -> int:
    return REASONS.index(reason) + 1


def _refuse(reason: str) -> str:
    return f"meta mark set {_mark(reason)} goto refuse"


def _discard(reason: str) -> str:
    return f"meta mark set {_mark(reason)} goto discard"


def _without_overlaps() -> dict[str, tuple[str, ...]]:
    """`CLOSED` for one set of intervals, which may not overlap."""
    wide = [IPv4Network(text) for texts in CLOSED.values() for text in texts if not text.endswith("/32")]
    return {
        reason: tuple(
            text
            for text in texts
            if not any(IPv4Network(text) != other and IPv4Network(text).subnet_of(other) for other in wide)
        )
        for reason, texts in CLOSED.items()
    }
