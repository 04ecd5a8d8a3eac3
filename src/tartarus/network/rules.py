"""The packet filter's two tables as nftables text: the router's, which knows each slot, and the host's second wall.

A slot's number, addresses and links are fixed, so both tables are complete before the first sandbox: taking a slot,
swearing a contract for it and giving it back change no rule, only sets (`oaths`). What the rules count, they count by
themselves in sets (`add @refused {...}`).
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network

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
    "connections", "contract", "unsworn",
)  # fmt: skip
OPENABLE = frozenset({"private", "metadata"})
"""What of `CLOSED` a contract may open."""
PROXY_PORT, REDIRECTED_PORT = 3128, 3129
"""Where the egress proxy listens at the gateway: for those who ask it, and for what is led to it."""
PREFIX_LENGTHS = tuple(range(8, 33, 2))
"""Of networks that have sets of their own. Sets of ranges take the kernel long to change when they are long."""
_MOST = 65535
_MOST_ANSWERS = 262144


def slot_link(number: int) -> str:
    """The name of a slot's link in the router."""
    return f"slot{number}"


def router_table(
    slots: dict[str, IPv4Address], gateway: IPv4Address, network: IPv4Network, settings: NetworkSettings
) -> str:
    """The router's table. `slots`: each link's only source address; `gateway`: where the resolver listens.

    A slot's packets pass by the contract that `sworn` names for it: a number that no two contracts have at one time,
    which is also the mark of every connection that was opened under it. Connections of an older one (not `live`) are
    judged anew, in both directions.
    """
    sources = ", ".join(f'"{link}" . {address}' for link, address in slots.items())
    return f"""
table inet {ROUTER_TABLE} {{
  set sources {{ type ifname . ipv4_addr; elements = {{ {sources} }}; }}
  set host {{ type ipv4_addr; flags interval; }}
  set neighbours {{ type ipv4_addr; flags interval; }}
  set {REFUSED_SET} {{ type ifname . mark; size 65535; flags dynamic; }}
  set {OPENED_SET} {{ type ifname; size 65535; flags dynamic; }}
  set query_rates {{ type ifname; size 65535; flags dynamic; }}
  set opening_rates {{ type ifname; size 65535; flags dynamic; }}
  set open_now {{ type ifname; size 65535; flags dynamic; }}

  # All that contracts are, in sets: swearing one adds members, and changes no rule.
  map sworn {{ type ifname : mark; size {_MOST}; }}
  map sworn_to {{ type ipv4_addr : mark; size {_MOST}; }}
  set live {{ type mark; size {_MOST}; }}
  set openings {{ type mark . ipv4_addr . inet_proto . inet_service; flags interval; }}
  {_network_sets()}
  set opens_all {{ type mark; size {_MOST}; }}
  set answers {{ type mark . ipv4_addr . inet_service; size {_MOST_ANSWERS}; flags timeout; }}
  set answers_any {{ type mark . ipv4_addr; size {_MOST_ANSWERS}; flags timeout; }}
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
    meta nfproto != ipv4 {_discard("ipv6")}
    iifname . ip saddr != @sources {_discard("spoofed")}
    meta mark set iifname map @sworn
    meta mark 0 {_discard("unsworn")}
    meta mark @own_sending {_discard("rate")}
    meta mark @own_sending_packets {_discard("rate")}
    ip daddr {gateway} udp dport 53 meta mark @nameless {_refuse("dns")}
    ip daddr {gateway} udp dport 53 add @query_rates {{ iifname limit rate over {settings.dns_queries}/second \
burst {4 * settings.dns_queries} packets }} {_discard("rate")}
    ip daddr {gateway} udp dport 53 accept
    ct state established,related ct mark @live accept
    ct state established goto judging
    ct state != new {_discard("invalid")}
    goto judging
  }}
  chain judging {{
    ip daddr {gateway} tcp dport {PROXY_PORT} meta mark @proxied goto opening
    ip daddr {gateway} tcp dport != 53 {_refuse("gateway")}
    ip daddr {gateway} meta l4proto != tcp {_refuse("gateway")}
    ip daddr {gateway} meta mark @nameless {_refuse("dns")}
    ip daddr {gateway} goto opening
    {_closed("daddr", network)}
    meta l4proto {{ tcp, udp }} th dport {{ 53, 853 }} {_refuse("dns")}
    meta l4proto != {{ tcp, udp, icmp }} {_refuse("protocol")}
    meta l4proto icmp icmp type != echo-request {_refuse("protocol")}
    meta mark @opens_all goto opening
    {_opened("daddr", "goto opening")}
    meta l4proto tcp ct state new goto judging_web
    meta l4proto tcp ct status dnat goto judging_web
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
    ip daddr {gateway} accept
    meta mark @opens_all accept
    {_opened("daddr", "accept")}
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
    meta mark set ip daddr map @sworn_to
    meta mark 0 drop
    {_closed("saddr", network)}
    meta mark @opens_all accept
    {_opened("saddr", "accept")}
  }}

  chain forward {{
    type filter hook forward priority filter; policy drop;
    iifname "slot*" oifname "{UPLINK}" accept
    iifname "{UPLINK}" oifname "slot*" ct state established,related accept
  }}
  chain input {{
    type filter hook input priority filter; policy drop;
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


def network_set(length: int) -> str:
    """The set of what contracts open at one port of networks of that prefix length; with `_any`, whatever the port."""
    return "answers" if length == PREFIX_LENGTHS[-1] else f"net{length}"


def _network_sets() -> str:
    lines = []
    for name in map(network_set, PREFIX_LENGTHS[:-1]):
        lines.append(f"set {name} {{ type mark . ipv4_addr . inet_service; size {_MOST_ANSWERS}; }}")
        lines.append(f"set {name}_any {{ type mark . ipv4_addr; size {_MOST_ANSWERS}; }}")
    return "\n  ".join(lines)


def _opened(side: str, verdict: str) -> str:
    """The rules for what a contract's networks and its domains' answers open, by address and port of one side."""
    port = f"th {side[0]}port"
    lines = [f"meta mark . ip {side} . meta l4proto . {port} @openings {verdict}"]
    for length in reversed(PREFIX_LENGTHS):
        name = network_set(length)
        masked = f"ip {side}" if length == PREFIX_LENGTHS[-1] else f"ip {side} & {IPv4Network((0, length)).netmask}"
        lines.append(f"meta l4proto {{ tcp, udp }} meta mark . {masked} . {port} @{name} {verdict}")
        lines.append(f"meta mark . {masked} @{name}_any {verdict}")
    return "\n    ".join(lines)


def _closed(side: str, network: IPv4Network) -> str:
    """The rules that refuse what no contract opens, or only one that says so, by the address of one side."""
    lines = [f"ip {side} @host {_refuse('host')}", f"ip {side} {network} {_refuse('peer')}"]
    for reason, texts in CLOSED.items():
        those = f"ip {side} {{ {', '.join(texts)} }}"
        unless = f"meta mark != @opens_{reason} " if reason in OPENABLE else ""
        if reason == "link_local":  # which the metadata services lie in
            unless = f"ip {side} != {{ {', '.join(CLOSED['metadata'])} }} "
        lines.append(f"{those} {unless}{_refuse(reason)}")
    lines.append(f"ip {side} @neighbours meta mark != @opens_private {_refuse('neighbour')}")
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


def host_table(table: str, uplink: str, network: IPv4Network) -> str:
    """The host's table: what leaves the router may only go on to public addresses, and nothing else is let through.

    `opened` holds the links that forward packets because we had them do so: for others than us (and daemons like us,
    whose tables say what they let in) they still don't. `opens_…`: the slots whose contracts open what others don't.
    """
    shut = {reason: ", ".join(texts) for reason, texts in CLOSED.items()}
    metadata = f"ip daddr {{ {shut['metadata']} }}"
    always = ", ".join(text for reason, texts in CLOSED.items() if reason not in OPENABLE for text in texts)
    return f"""
table inet {table} {{
  set host {{ type ipv4_addr; flags interval; }}
  set neighbours {{ type ipv4_addr; flags interval; }}
  set opens_private {{ type ipv4_addr; }}
  set opens_metadata {{ type ipv4_addr; }}
  set opened {{ type ifname; }}

  chain leaving {{
    meta nfproto != ipv4 counter drop
    ip saddr != {network} counter drop
    ct state established,related accept
    ct state != new counter drop
    ip daddr @host counter drop
    {metadata} ip saddr @opens_metadata accept
    {metadata} counter drop
    ip daddr @neighbours ip saddr != @opens_private counter drop
    ip daddr {{ {shut["private"]} }} ip saddr != @opens_private counter drop
    ip daddr {{ {always} }} counter drop
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


def host_openings(table: str, private: Iterable[IPv4Address], metadata: Iterable[IPv4Address]) -> str:
    """The change that makes the host's table hold exactly these slots as opening what others don't."""
    lines = []
    for name, members in (("opens_private", private), ("opens_metadata", metadata)):
        lines.append(f"flush set inet {table} {name}")
        found = ", ".join(sorted(map(str, members)))
        lines += [f"add element inet {table} {name} {{ {found} }}"] if found else []
    return "\n".join(lines) + "\n"


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


def _mark(reason: str) -> int:
    return REASONS.index(reason) + 1


def _refuse(reason: str) -> str:
    return f"meta mark set {_mark(reason)} goto refuse"


def _discard(reason: str) -> str:
    return f"meta mark set {_mark(reason)} goto discard"
