"""The router's table of the packet filter as nftables text, which knows each slot; the host's is in `wall`.

A slot's number, addresses and links are fixed, so it is complete before the first sandbox: taking a slot, swearing a
contract for it and giving it back change no rule, only sets (`oaths`). What the rules count, they count by themselves
in sets (`add @refused {...}`). What there is of each for IPv6 has a name that ends in `_6`.
"""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import IPv4Address

from tartarus.network.destinations import CLOSED, Address, HostNetworks, Network
from tartarus.network.families import FAMILIES, NEXT_HOP_6, V4, V6, Family
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
    "connections", "contract", "unsworn",
)  # fmt: skip
OPENABLE = frozenset({"private", "metadata"})
"""What of `CLOSED` a contract may open."""
PROXY_PORT, REDIRECTED_PORT = 3128, 3129
"""Where the egress proxy listens at the gateway: for those who ask it, and for what is led to it."""
DISCOVERY_6 = "icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } ip6 hoplimit 255"
"""Who has an address on a link, of all that IPv6 has neighbours tell each other; never forwarded by anybody."""
_MOST = 65535
_MOST_ANSWERS = 262144


def slot_link(number: int) -> str:
    """The name of a slot's link in the router."""
    return f"slot{number}"


def router_table(
    slots: Mapping[str, tuple[Address, ...]], gateway: IPv4Address, networks: tuple[Network, ...],
    settings: NetworkSettings,
) -> str:  # fmt: skip
    """The router's table. `slots`: each link's only source addresses; `gateway`: where the resolver listens.

    `networks`: those of all slots' addresses, IPv4 first.

    A slot's packets pass by the contract that `sworn` names for it: a number that no two contracts have at one time,
    which is also the mark of every connection that was opened under it. Connections of an older one (not `live`) are
    judged anew, in both directions.
    """
    network, network_6 = networks
    return f"""
table inet {ROUTER_TABLE} {{
  set {REFUSED_SET} {{ type ifname . mark; size 65535; flags dynamic; }}
  set {OPENED_SET} {{ type ifname; size 65535; flags dynamic; }}
  set query_rates {{ type ifname; size 65535; flags dynamic; }}
  set opening_rates {{ type ifname; size 65535; flags dynamic; }}
  set open_now {{ type ifname; size 65535; flags dynamic; }}

  # All that contracts are, in sets: swearing one adds members, and changes no rule.
  map sworn {{ type ifname : mark; size {_MOST}; }}
  set live {{ type mark; size {_MOST}; }}
  {_sets(V4, slots)}
  {_sets(V6, slots)}
  set carries_6 {{ type mark; size {_MOST}; }}
  set web {{ type mark . ipv4_addr . inet_service; size {_MOST_ANSWERS}; flags timeout; }}
  set web_any {{ type mark . ipv4_addr; size {_MOST_ANSWERS}; flags timeout; }}
  set proxied {{ type mark; size {_MOST}; }}
  set opens_private {{ type mark; size {_MOST}; }}
  set opens_metadata {{ type mark; size {_MOST}; }}
  set nameless {{ type mark; size {_MOST}; }}
  set own_opening {{ type mark; size {_MOST}; flags dynamic; }}
  map counts {{ type mark : verdict; size {_MOST}; }}
  set own_sending {{ type mark; size {_MOST}; flags dynamic; }}
  set own_sending_packets {{ type mark; size {_MOST}; flags dynamic; }}
  set own_receiving {{ type mark; size {_MOST}; flags dynamic; }}
  set own_receiving_packets {{ type mark; size {_MOST}; flags dynamic; }}

  chain discard {{
    add @{REFUSED_SET} {{ iifname . meta mark counter }}
    drop
  }}
  chain refuse {{
    iifname "{UPLINK}" drop
    add @{REFUSED_SET} {{ iifname . meta mark counter }}
    # What comes while a program connects is heard at once; the other way it would be a second later, in IPv6.
    meta nfproto ipv6 meta l4proto tcp reject with tcp reset
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
    iifname "{UPLINK}" goto returning
    iifname != "slot*" drop
    meta mark set iifname map @sworn
    meta nfproto ipv4 iifname . ip saddr != @sources {_discard("spoofed")}
    meta mark 0 {_discard("unsworn")}
    meta mark @own_sending {_discard("rate")}
    meta mark @own_sending_packets {_discard("rate")}
    meta nfproto ipv6 jump entering_6
    ip daddr {gateway} udp dport 53 meta mark @nameless {_refuse("dns")}
    ip daddr {gateway} udp dport 53 add @query_rates {{ iifname limit rate over {settings.dns_queries}/second \
burst {4 * settings.dns_queries} packets }} {_discard("rate")}
    ip daddr {gateway} udp dport 53 accept
    ct state established ct mark @live accept
    ct state established goto judging
    # Errors go by the connection that they are about, which anybody can name: only who began it may speak of it.
    ct state related ct mark @live iifname . ct original ip saddr @sources accept
    ct state related ct mark @live iifname . ct original ip6 saddr @sources_6 accept
    ct state != new {_discard("invalid")}
    goto judging
  }}
  chain entering_6 {{
    # What every stack says when it comes up, unasked.
    icmpv6 type {{ mld-listener-report, mld-listener-done, mld2-listener-report, nd-router-solicit }} drop
    ip6 saddr :: icmpv6 type nd-neighbor-solicit drop
    iifname . ip6 saddr != @sources_6 meta mark != @carries_6 {_discard("ipv6")}
    iifname . ip6 saddr != @sources_6 {_discard("spoofed")}
    {DISCOVERY_6} goto discovering
    # The rest that is said among neighbours: who is a router, which way is shorter, who listens to whom.
    icmpv6 type >= 130 {_discard("protocol")}
    meta mark != @carries_6 {_refuse("ipv6")}
    # Fragments are whole by now. No other header may stand before what is judged.
    ip6 nexthdr != {{ tcp, udp, ipv6-icmp }} {_discard("protocol")}
  }}
  # A link has two ends, and only they may be asked for and told: the slot's, as its source shows, and the router's.
  chain discovering {{
    icmpv6 type nd-neighbor-solicit ip6 daddr {{ {NEXT_HOP_6}, ff02::1:ff00:1 }} accept
    icmpv6 type nd-neighbor-advert ip6 daddr {NEXT_HOP_6} accept
    # A machine that goes on after it was saved says so to all.
    icmpv6 type nd-neighbor-advert ip6 daddr ff02::1 drop
    {_discard("protocol")}
  }}
  chain judging {{
    meta nfproto ipv6 goto judging_6
    ip daddr {gateway} tcp dport {PROXY_PORT} meta mark @proxied goto opening
    ip daddr {gateway} tcp dport != 53 {_refuse("gateway")}
    ip daddr {gateway} meta l4proto != tcp {_refuse("gateway")}
    ip daddr {gateway} meta mark @nameless {_refuse("dns")}
    ip daddr {gateway} goto opening
    {_closed(V4, "daddr", network)}
    meta l4proto {{ tcp, udp }} th dport {{ 53, 853 }} {_refuse("dns")}
    meta l4proto != {{ tcp, udp, icmp }} {_refuse("protocol")}
    meta l4proto icmp icmp type != echo-request {_refuse("protocol")}
    meta mark @opens_all goto opening
    {_opened(V4, "daddr", "goto opening")}
    meta l4proto tcp ct state new goto judging_web
    meta l4proto tcp ct status dnat goto judging_web
    {_refuse("contract")}
  }}
  # The egress proxy speaks IPv4 only, as do its domains.
  chain judging_6 {{
    {_closed(V6, "daddr", network_6)}
    meta l4proto {{ tcp, udp }} th dport {{ 53, 853 }} {_refuse("dns")}
    meta l4proto icmpv6 icmpv6 type != echo-request {_refuse("protocol")}
    meta mark @opens_all_6 goto opening
    {_opened(V6, "daddr", "goto opening")}
    {_refuse("contract")}
  }}
  # What is open through the egress proxy only: to begin with, and when it was led there at its beginning.
  chain judging_web {{
    meta mark . ip daddr . th dport @web goto opening
    meta mark . ip daddr @web_any goto opening
    {_refuse("contract")}
  }}
  chain redirecting {{
    type nat hook prerouting priority dstnat; policy accept;
    iifname != "slot*" accept
    meta nfproto ipv6 accept
    ip daddr {gateway} accept
    meta mark @opens_all accept
    {_opened(V4, "daddr", "accept")}
    meta l4proto tcp dnat ip to {gateway}:{REDIRECTED_PORT}
  }}
  chain opening {{
    ct state established ct mark set meta mark accept
    meta mark @own_opening {_refuse("rate")}
    meta mark vmap @counts
    add @opening_rates {{ iifname limit rate over {settings.new_connections}/second burst {settings.burst} packets }} \
{_refuse("rate")}
    add @open_now {{ iifname ct count over {settings.connections} }} {_refuse("connections")}
    ct mark set meta mark
    add @{OPENED_SET} {{ iifname counter }} accept
  }}
  # What comes back: of a contract that is live, or of one that was, as far as the present one opens that too.
  chain returning {{
    ct state != {{ established, related }} drop
    ip daddr {gateway} meta l4proto tcp ct direction reply ct mark 0 accept
    ct mark @own_receiving drop
    ct mark @own_receiving_packets drop
    ct mark @live accept
    ct state != established drop
    meta nfproto ipv6 goto returning_6
    meta mark set ip daddr map @sworn_to
    meta mark 0 drop
    meta mark @own_receiving drop
    meta mark @own_receiving_packets drop
    {_closed(V4, "saddr", network)}
    meta mark @opens_all accept
    {_opened(V4, "saddr", "accept")}
  }}
  chain returning_6 {{
    meta mark set ip6 daddr map @sworn_to_6
    meta mark != @carries_6 drop
    meta mark @own_receiving drop
    meta mark @own_receiving_packets drop
    {_closed(V6, "saddr", network_6)}
    meta mark @opens_all_6 accept
    {_opened(V6, "saddr", "accept")}
  }}

  chain forward {{
    type filter hook forward priority filter; policy drop;
    iifname "slot*" oifname "{UPLINK}" accept
    iifname "{UPLINK}" oifname "slot*" ct state established,related accept
  }}
  chain input {{
    type filter hook input priority filter; policy drop;
    iifname "slot*" {DISCOVERY_6} accept
    iifname "slot*" ip daddr {gateway} meta l4proto {{ tcp, udp }} th dport 53 accept
    iifname "slot*" ip daddr {gateway} tcp dport {{ {PROXY_PORT}, {REDIRECTED_PORT} }} accept
    iifname "slot*" ct state established,related accept
    iifname "{UPLINK}" ip daddr {gateway} meta l4proto tcp ct state established accept
  }}
  # What the proxy and the resolver tell a slot: nothing without a contract, and no faster than it lets.
  chain telling {{
    type filter hook output priority filter; policy accept;
    oifname != "slot*" accept
    meta mark set oifname map @sworn
    meta mark 0 drop
    ct mark @own_receiving drop
    ct mark @own_receiving_packets drop
  }}
}}
"""


def _sets(family: Family, slots: Mapping[str, tuple[Address, ...]]) -> str:
    """One family's sets: which addresses there are, and what contracts open of them."""
    s, kind = family.suffix, family.kind
    sources = ", ".join(
        f'"{link}" . {address}' for link, own in slots.items() for address in own if address.version == family.version
    )
    lines = [
        f"set sources{s} {{ type ifname . {kind}; elements = {{ {sources} }}; }}",
        f"set host{s} {{ type {kind}; flags interval; }}",
        f"set neighbours{s} {{ type {kind}; flags interval; }}",
        f"map sworn_to{s} {{ type {kind} : mark; size {_MOST}; }}",
        f"set openings{s} {{ type mark . {kind} . inet_proto . inet_service; flags interval; }}",
        f"set opens_all{s} {{ type mark; size {_MOST}; }}",
    ]
    # With a size and nothing else the kernel would make room for as many at once: 4 MiB for each of these.
    for length in family.lengths:
        is_answers = length == family.lengths[-1]
        name, more = family.network_set(length), f" size {_MOST_ANSWERS}; flags timeout;" if is_answers else ""
        lines.append(f"set {name} {{ type mark . {kind} . inet_service;{more} }}")
        lines.append(f"set {name}_any {{ type mark . {kind};{more} }}")
    return "\n  ".join(lines)


def _opened(family: Family, side: str, verdict: str) -> str:
    """The rules for what a contract's networks and its domains' answers open, by address and port of one side."""
    port, at = f"th {side[0]}port", f"{family.header} {side}"
    lines = [f"meta mark . {at} . meta l4proto . {port} @openings{family.suffix} {verdict}"]
    for length in reversed(family.lengths):
        name = family.network_set(length)
        masked = at if length == family.lengths[-1] else f"{at} & {family.network(0, length).netmask}"
        lines.append(f"meta l4proto {{ tcp, udp }} meta mark . {masked} . {port} @{name} {verdict}")
        lines.append(f"meta mark . {masked} @{name}_any {verdict}")
    return "\n    ".join(lines)


def _closed(family: Family, side: str, network: Network) -> str:
    """The rules that refuse what no contract opens, or only one that says so, by the address of one side."""
    at, s = f"{family.header} {side}", family.suffix
    lines = [f"{at} @host{s} {_refuse('host')}", f"{at} {network} {_refuse('peer')}"]
    for reason, texts in family.closed.items():
        those = f"{at} {{ {', '.join(texts)} }}"
        unless = f"meta mark != @opens_{reason} " if reason in OPENABLE else ""
        if reason in {"link_local", "private"}:  # which metadata services lie in, and were judged
            unless += f"{at} != {{ {', '.join(family.closed['metadata'])} }} "
        lines.append(f"{those} {unless}{_refuse(reason)}")
    lines.append(f"{at} @neighbours{s} meta mark != @opens_private {_refuse('neighbour')}")
    return "\n    ".join(lines)


def count_chain(connections: int) -> str:
    """The name of the chain that refuses more than so many connections at once of one contract."""
    return f"count_{connections}"


def count_rules(connections: int) -> str:
    """That chain. Such a limit is part of a rule, and a set's member that has one goes by itself."""
    name = count_chain(connections)
    table = f"inet {ROUTER_TABLE}"
    return (
        f"add set {table} {name} {{ type mark; size {_MOST}; flags dynamic; }}\nadd chain {table} {name}\n"
        f"add rule {table} {name} add @{name} {{ meta mark ct count over {connections} }} {_refuse('connections')}\n"
    )


def host_networks(table: str, networks: HostNetworks) -> str:
    """The change that makes a table know `networks`, in one step."""
    return "".join(
        holding(table, name + family.suffix, [str(one) for one in members if one.version == family.version])
        for name, members in (("host", networks.host), ("neighbours", networks.neighbours))
        for family in FAMILIES
    )


def holding(table: str, name: str, members: list[str]) -> str:
    """The change that makes a set have exactly these members."""
    text = f"flush set inet {table} {name}\n"
    return text + (f"add element inet {table} {name} {{ {', '.join(members)} }}\n" if members else "")


def replace(table: str, text: str) -> str:
    """The change that puts `text` in a table's place, whether there is one or not, in one step."""
    return f"table inet {table}\ndelete table inet {table}\n{text}"


def remove(table: str) -> str:
    """The change that removes a table, whether there is one or not."""
    return f"table inet {table}\ndelete table inet {table}\n"


def _mark(reason: str) -> int:
    return REASONS.index(reason) + 1


def _refuse(reason: str) -> str:
    return f"meta mark set {_mark(reason)} goto refuse"


def _discard(reason: str) -> str:
    return f"meta mark set {_mark(reason)} goto discard"
