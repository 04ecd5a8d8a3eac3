#!/usr/bin/env bash
# Install, from Debian's packages, what the tests use: a compiler, and the peers and tools they compare with.
# Asks for nothing that is there already; quiet unless something fails. For Debian and Ubuntu, as root.
set -euo pipefail

# The program that shows a package is there : the package
wanted=(
    gcc:gcc make:make git:git bash:bash perl:perl
    bwrap:bubblewrap runc:runc busybox:busybox-static
    newuidmap:uidmap ps:procps ip:iproute2 nft:nftables
    docker-registry:docker-registry mmdebstrap:mmdebstrap skopeo:skopeo rpmbuild:rpm htpasswd:apache2-utils openssl:openssl
    python3:python3 node:nodejs Rscript:r-base-core mount:mount unshare:util-linux
)
missing=()
for pair in "${wanted[@]}"; do
    command -v "${pair%%:*}" >/dev/null || missing+=("${pair##*:}")
done
# Without a program of their own: libc's static files, Python's venv module, certificates for the package index.
[[ -e $(gcc -print-file-name=libc.a 2>/dev/null || true) ]] || missing+=(libc6-dev)
python3 -c 'import ensurepip' 2>/dev/null || missing+=(python3-venv)
[[ -e /etc/ssl/certs/ca-certificates.crt ]] || missing+=(ca-certificates)

if ((${#missing[@]} == 0)); then
    echo "System packages: all there."
    exit 0
fi
if ((EUID != 0)); then
    echo "As root: apt-get install ${missing[*]}" >&2
    exit 1
fi
echo "System packages: installing ${missing[*]}"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
export DEBIAN_FRONTEND=noninteractive
if ! { apt-get update && apt-get install -y --no-install-recommends "${missing[@]}"; } >"$log" 2>&1; then
    tail -n 40 "$log" >&2
    exit 1
fi
