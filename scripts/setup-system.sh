#!/usr/bin/env bash
# Install, from Debian's packages, what the tests use: a compiler, and the peers and tools they compare with.
# Asks for nothing that is there already; quiet unless something fails. For Debian and Ubuntu, as root.
set -euo pipefail

# The program that shows a package is there : the package
wanted=(
    gcc:gcc make:make git:git bash:bash perl:perl
    bwrap:bubblewrap runc:runc busybox:busybox-static
    newuidmap:uidmap ps:procps ip:iproute2 nft:nftables
    dockerd:docker.io containerd:containerd podman:podman
    docker-registry:docker-registry mmdebstrap:mmdebstrap skopeo:skopeo rpmbuild:rpm htpasswd:apache2-utils openssl:openssl
    clang:clang wasm-ld:lld
    python3:python3 node:nodejs Rscript:r-base-core mount:mount unshare:util-linux
    qemu-system-x86_64:qemu-system-x86 mkfs.erofs:erofs-utils mkfs.ext4:e2fsprogs dpkg-deb:dpkg
)
missing=()
for pair in "${wanted[@]}"; do
    command -v "${pair%%:*}" >/dev/null || missing+=("${pair##*:}")
done
# Without a program of their own: libc's static files, Python's venv module, certificates for the package index.
[[ -e $(gcc -print-file-name=libc.a 2>/dev/null || true) ]] || missing+=(libc6-dev)
# What clang makes WebAssembly of C with.
[[ -e /usr/lib/wasm32-wasi/libc.a ]] || missing+=(wasi-libc)
[[ -e $(clang --target=wasm32-wasi -print-libgcc-file-name 2>/dev/null || true) ]] || missing+=(libclang-rt-dev-wasm32)
python3 -c 'import ensurepip' 2>/dev/null || missing+=(python3-venv)
[[ -e /etc/ssl/certs/ca-certificates.crt ]] || missing+=(ca-certificates)

# gVisor: Debian 12's own is too old to have systrap, so that one package comes from the next release. It is a static
# program; nothing else of that release is installed, and apt's own sources stay as they are.
runsc_from=trixie
runsc_fits() { runsc flags 2>&1 | grep -q systrap; }
install_runsc() {
    local work uri
    # The mirror that this machine uses already.
    uri=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | grep '/debian/*$' | head -n 1)
    [[ -n $uri ]] || { echo "No Debian mirror is set up here: install runsc by hand (gvisor.dev)"; return 1; }
    work=$(mktemp -d)
    mkdir -p "$work/lists/partial"
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $uri $runsc_from main" >"$work/sources.list"
    # Root's own directory: apt's unprivileged user can't reach it.
    local apt=(apt-get -q -o "Dir::Etc::sourcelist=$work/sources.list" -o Dir::Etc::sourceparts=- -o APT::Sandbox::User=root
        -o "Dir::State::lists=$work/lists" -o "Dir::Cache::pkgcache=" -o "Dir::Cache::srcpkgcache=")
    "${apt[@]}" update && (cd "$work" && "${apt[@]}" download runsc && dpkg-deb -x runsc_*.deb tree) &&
        install -m 755 "$work/tree/usr/bin/runsc" "${RUNSC_TARGET:-/usr/local/bin/runsc}"
    local failed=$?
    rm -rf "$work"
    return "$failed"
}
need_runsc=false
runsc_fits || need_runsc=true

# The kernel that test machines boot: Debian's package of it, which is not installed here. tests/needs.py looks there.
kernels=/var/cache/tartarus-tests
newest_kernel() { apt-cache depends linux-image-cloud-amd64 | awk '/Depends: linux-image-[0-9]/ && !found { print $2; found = 1 }'; }
fetch_kernel() {
    local name
    name=$(newest_kernel)
    if [[ -z $name ]]; then
        apt-get update
        name=$(newest_kernel)
    fi
    [[ -n $name ]] || { echo "No package of a cloud kernel is known here"; return 1; }
    mkdir -p "$kernels" && (cd "$kernels" && apt-get -q -o APT::Sandbox::User=root download "$name")
}
need_kernel=false
compgen -G "$kernels/linux-image-*.deb" >/dev/null || need_kernel=true

if ((${#missing[@]} == 0)) && ! $need_runsc && ! $need_kernel; then
    echo "System packages: all there."
    exit 0
fi
names="${missing[*]}"
if $need_runsc; then names+=" runsc (of $runsc_from)"; fi
if $need_kernel; then names+=" a guest kernel (into $kernels)"; fi
if ((EUID != 0)); then
    echo "As root: apt-get install $names" >&2
    exit 1
fi
echo "System packages: installing $names"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
export DEBIAN_FRONTEND=noninteractive
install_all() {
    if ((${#missing[@]})); then
        apt-get update && apt-get install -y --no-install-recommends "${missing[@]}" || return
    fi
    if $need_runsc; then install_runsc || return; fi
    if $need_kernel; then fetch_kernel; fi
}
if ! install_all >"$log" 2>&1; then
    tail -n 40 "$log" >&2
    exit 1
fi
