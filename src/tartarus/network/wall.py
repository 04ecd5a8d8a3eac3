"""The host's table of the packet filter as nftables text: the second wall, behind the router's."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address

from tartarus.network.destinations import Network
from tartarus.network.families import FAMILIES, V4, V6, Family
from tartarus.network.rules import OPENABLE, UPLINK_PREFIX, holding


def host_table(table: str, uplink: str, networks: tuple[Network, ...], *, guard_all: bool = False) -> str:
    """The host's table: what leaves the router may only go on to public addresses, and nothing else is let through.

    `opened` holds the links that forward packets because we had them do so: for others than us (and daemons like us,
    whose tables say what they let in) they still don't. `guard_all`: in IPv6 that is every link. `opens_…`: the slots
    whose contracts open what others don't.
    """
    ours = f'"{UPLINK_PREFIX}*"'
    opened_6 = f"iifname != {ours}" if guard_all else "iifname @opened_6"
    return f"""
table inet {table} {{
  {_sets(V4)}
  {_sets(V6)}

  chain leaving {{
    meta nfproto ipv6 goto leaving_6
    {_leaving(V4, networks[0])}
  }}
  chain leaving_6 {{
    {_leaving(V6, networks[1])}
  }}
  # After the host's own address translation, and before the filters of others, who may refuse more.
  chain forward {{
    type filter hook forward priority filter - 5; policy accept;
    iifname "{uplink}" goto leaving
    oifname "{uplink}" ct state established,related accept
    oifname "{uplink}" counter drop
    meta nfproto ipv4 iifname @opened oifname != {ours} counter drop
    meta nfproto ipv6 {opened_6} oifname != {ours} counter drop
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
    ip saddr {networks[0]} oifname != "{uplink}" masquerade
    ip6 saddr {networks[1]} oifname != "{uplink}" masquerade
  }}
}}
"""


def _sets(family: Family) -> str:
    s, kind = family.suffix, family.kind
    lines = [f"set {name}{s} {{ type {kind}; flags interval; }}" for name in ("host", "neighbours")]
    lines += [f"set {name}{s} {{ type {kind}; }}" for name in ("opens_private", "opens_metadata")]
    return "\n  ".join((*lines, f"set opened{s} {{ type ifname; }}"))


def _leaving(family: Family, network: Network) -> str:
    ip, s = family.header, family.suffix
    shut = {reason: ", ".join(texts) for reason, texts in family.closed.items()}
    always = ", ".join(text for reason, texts in family.closed.items() if reason not in OPENABLE for text in texts)
    return f"""{ip} saddr != {network} counter drop
    ct state established,related accept
    ct state != new counter drop
    {ip} daddr @host{s} counter drop
    {ip} daddr {{ {shut["metadata"]} }} {ip} saddr @opens_metadata{s} accept
    {ip} daddr {{ {shut["metadata"]} }} counter drop
    {ip} daddr @neighbours{s} {ip} saddr != @opens_private{s} counter drop
    {ip} daddr {{ {shut["private"]} }} {ip} saddr != @opens_private{s} counter drop
    {ip} daddr {{ {always} }} counter drop
    fib daddr type != unicast counter drop
    accept"""


def host_openings(
    table: str, private: Iterable[IPv4Address | IPv6Address], metadata: Iterable[IPv4Address | IPv6Address]
) -> str:
    """The change that makes the host's table hold exactly these slots as opening what others don't."""
    return "".join(
        holding(table, name + family.suffix, sorted(str(one) for one in members if one.version == family.version))
        for name, members in (("opens_private", frozenset(private)), ("opens_metadata", frozenset(metadata)))
        for family in FAMILIES
    )


def opened(table: str, links: Iterable[str], family: Family) -> str:
    """The change that makes the host's table hold exactly `links` closed for what is not ours."""
    return holding(table, "opened" + family.suffix, [f'"{link}"' for link in links])
