#!/bin/bash
# A sandbox that may reach one domain at one port, and nothing else: on a network of namespaces that is made for this
# and goes with it. Nothing of this host's own network is touched. Needs root, ip, nft and nsenter.
set -eu
here=$(dirname "$(readlink -f "$0")")
tartarus=${TARTARUS:-tartarus}
python=${PYTHON:-python3}
tag=egress$$
export TARTARUS_HOME=/var/tmp/$tag
cleanup() {
  on_host $tartarus down >/dev/null 2>&1 || true
  [ -z "${servers:-}" ] || kill "$servers" 2>/dev/null || true
  ip netns delete $tag-host 2>/dev/null || true
  ip netns delete $tag-world 2>/dev/null || true
  rm -rf "$TARTARUS_HOME"
}
# Not `ip netns exec`, which hides the control groups.
on_host() { nsenter --net=/run/netns/$tag-host "$@"; }
in_world() { nsenter --net=/run/netns/$tag-world "$@"; }
trap cleanup EXIT

# A host, and a world behind it: a shop that the sandbox may use, and all that it may not.
ip netns add $tag-host
ip netns add $tag-world
ip link add eth0 netns $tag-host type veth peer name wan0 netns $tag-world
on_host ip link set lo up
on_host ip address add 198.51.100.10/24 dev eth0
on_host ip link set eth0 up
on_host ip route add default via 198.51.100.1
in_world ip link set lo up
in_world ip address add 198.51.100.1/24 dev wan0
in_world ip link set wan0 up
for address in 198.51.100.53 203.0.113.80 203.0.113.99 10.9.9.9 169.254.169.254; do
  in_world ip address add $address/32 dev lo
done
# Not by the function: what is to be ended is the program, not a shell that waits for it.
nsenter --net=/run/netns/$tag-world "$python" "$here/data/egress_world.py" >/dev/null 2>&1 </dev/null &
servers=$!
mkdir -m 0711 "$TARTARUS_HOME"
printf 'network:\n  name_servers: [198.51.100.53]\n' >"$TARTARUS_HOME/config.yaml"
chmod 0600 "$TARTARUS_HOME/config.yaml"

attempts=$(cat "$here/data/egress_attempts.py")
echo "== A sandbox that may reach shop.example at port 8443"
on_host $tartarus run -d --name shopper --allow shop.example:8443 -- sleep 600 >/dev/null
on_host $tartarus exec shopper -- python3 -c "$attempts"
echo
echo "== What its contract counted"
on_host $tartarus inspect shopper | "$python" -c '
import json, sys
network = json.load(sys.stdin)[0]["network"]
print("contract:", json.dumps({key: value for key, value in network["contract"].items() if value}))
for name, value in sorted(network["counters"].items()):
    print(f"  {name:24} {value}")
'
echo
echo "== What the audit log says"
on_host $tartarus kill shopper
sleep 1 # its network's last words come when its link is gone
on_host $tartarus audit list
echo
echo "== A sandbox that tries what its contract does not open, where a policy says quarantine"
cat >"$TARTARUS_HOME/strict.yaml" <<'POLICY'
id: strict
enforcement: {on_network_violation: quarantine}
POLICY
on_host $tartarus policy put "$TARTARUS_HOME/strict.yaml" >/dev/null
on_host $tartarus run -d --name prowler --allow shop.example:8443 -- sleep 600 >/dev/null
on_host timeout 20 $tartarus exec prowler -- python3 -c "$attempts" >/dev/null 2>&1 || true
for _ in $(seq 50); do
  case=$(on_host $tartarus quarantine list --json | "$python" -c '
import json, sys
print("".join(case["id"] for case in json.load(sys.stdin)[:1]))
')
  [ -z "$case" ] || break
  sleep 0.2
done
on_host $tartarus quarantine list
on_host $tartarus quarantine show "$case"
