"""A real sandbox on an open network: what it reaches, and that it has no say in its own network namespace."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import re
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest
from tests.escape.packets import frame_of, ip_packet, taken, udp
from tests.faults.place import Place, place
from tests.network import topology
from tests.network.servers import NAME_SERVER, wait_until
from tests.network.topology import (
    HOST,
    HOST_6,
    METADATA,
    METADATA_6,
    NEIGHBOUR,
    NEIGHBOUR_6,
    PRIVATE,
    PRIVATE_6,
    PUBLIC,
    PUBLIC_6,
    World,
    joined,
    off,
)
from tests.network.webs import Authority, WebServer
from tests.node.images import guest_images
from tests.node.test_enrolment import full_table

from tartarus.model.audit import AuditQuery
from tartarus.model.contract import Contract
from tartarus.model.errors import (
    GuestFailed,
    InvalidRequest,
    RequestRejected,
    SecretRefused,
    TartarusError,
    Unsupported,
)
from tartarus.network import namespace
from tartarus.sdk import Sandbox
from tartarus.sdk.audit import Audit
from tartarus.sdk.networks import sworn
from tartarus.sdk.secrets import Secrets

pytestmark = pytest.mark.needs("root", "nft", "ip", "cgroups", "system-python")

# One line for each attempt: its name, and what came of it.
ASKING = """
import ctypes, fcntl, os, socket, struct, subprocess
def attempt(name, work):
    try:
        result = work()
    except OSError as error:
        result = os.strerror(error.errno) if error.errno else type(error).__name__
    print(name, result, sep=": ")
def ask(address, port=80):
    with socket.create_connection((address, port), timeout=5) as connection:
        return connection.recv(100).decode()
def change(request, data):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        return fcntl.ioctl(sock, request, struct.pack("16s", b"eth0") + data.ljust(24, b"\\0"))
def write(path, text):
    with open(path, "w") as file:
        return file.write(text)
for address in ADDRESSES:
    attempt(address, lambda: ask(address))
attempt("host", lambda: ask(HOST, 8080))
"""
MEDDLING = """
attempt("raw", lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW))
attempt("raw icmp", lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP))
attempt("frames", lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW))
attempt("link down", lambda: change(0x8914, struct.pack("H", 0)))
attempt("address", lambda: change(0x8916, struct.pack("HH4s", 2, 0, bytes([8, 8, 8, 8]))))
attempt("hardware", lambda: change(0x8924, struct.pack("H6s", 1, bytes(6))))
attempt("ipv6", lambda: write("/proc/sys/net/ipv6/conf/eth0/disable_ipv6", "0"))
attempt("forward", lambda: write("/proc/sys/net/ipv4/ip_forward", "1"))
attempt("mark", lambda: socket.socket().setsockopt(socket.SOL_SOCKET, 36, 1))
attempt("another namespace", lambda: ctypes.CDLL(None).unshare(0x40000000))
attempt("any source", lambda: socket.socket().setsockopt(socket.SOL_IP, 19, 1))
"""
ADDRESSES = (PUBLIC, *PRIVATE, METADATA[0], NEIGHBOUR)
REFUSED = {"Operation not permitted", "Permission denied", "Read-only file system", "-1",
           "Address family not supported by protocol", "Protocol not supported"}  # fmt: skip


def test_a_real_sandbox(tmp_path: Path) -> None:
    with topology.world(tmp_path) as world, place() as home:
        world.in_host(home.start)
        _try_everything(world, home)
        assert home.end_daemon(signal.SIGTERM) == 0


def _try_everything(world: World, home: Place) -> None:
    sandbox = home.create("sleep", "600")
    process = os.pidfd_open(home.inside(sandbox)[0])
    code = f"ADDRESSES, HOST = {ADDRESSES!r}, {HOST!r}\n{ASKING}{MEDDLING}"

    async def scenario() -> None:
        async with joined(world.pool()) as pool:
            slot = await pool.take()
            await pool.attach(slot, process)
            done = await off(lambda: sandbox.run(["python3", "-c", code]))
            answers = dict(line.split(": ", 1) for line in done.stdout.splitlines())
            assert answers.pop(PUBLIC) == HOST, done.stderr
            for closed in (*PRIVATE, METADATA[0], NEIGHBOUR, "host"):
                assert answers.pop(closed) == "No route to host"
            assert len(answers) == 11
            assert not {name: answer for name, answer in answers.items() if answer not in REFUSED}
            await pool.give_back(slot)
            again = await off(lambda: sandbox.run(["python3", "-c", code]))
            assert f"{PUBLIC}: Network is unreachable" in again.stdout

    try:
        world.run(scenario)
    finally:
        os.close(process)


BY_NAME = """
import urllib.error, urllib.request
for name in ("public.example", "evil.example"):
    request = urllib.request.Request("http://public.example:8080/", headers={"Host": name + ":8080"})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            print(answer.read())
    except urllib.error.HTTPError as error:
        print(error.code)
"""
FORGE = f"""
import fcntl, socket, struct
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
    fcntl.ioctl(sock, 0x8916, struct.pack("16sHH4s8x", b"eth0:1", 2, 0, bytes([8, 8, 8, 8])))
    sock.bind(("8.8.8.8", 0))
    sock.sendto(b"forged", ("{PUBLIC}", 7777))
"""
HOLD = f"""
import errno, socket, time
tcp = socket.create_connection(("{PUBLIC}", 8080), 5)
tcp.settimeout(None)
own = tcp.getsockname()[0]
served = socket.create_server((own, 4444))
bound, told, ping = (socket.socket(type=socket.SOCK_DGRAM, proto=proto) for proto in (0, 0, socket.IPPROTO_ICMP))
bound.bind((own, 5555))
for sock in (told, ping):
    sock.connect(("{PUBLIC}", 80))
print("holds", own, flush=True)
try:
    tcp.recv(1)
except OSError as error:
    print("tcp", errno.errorcode[error.errno], flush=True)
for name, say in (("udp", lambda: told.send(b"before")), ("ping", lambda: ping.send(b"\\x08" + bytes(7))),
                  ("bound", lambda: bound.sendto(b"before", ("{PUBLIC}", 80)))):
    try:
        while True:
            say()
            time.sleep(0.1)
    except OSError as error:
        print(name, errno.errorcode[error.errno], flush=True)
again = socket.create_connection(("{PUBLIC}", 8080), 5)
print("again", again.getsockname()[0], flush=True)
time.sleep(600)
"""
OPENING = f"""
import socket, time
sock = socket.socket()
sock.setblocking(False)
sock.connect_ex(("{PUBLIC}", 8099))
print("opening", flush=True)
time.sleep(600)
"""
STOPPING = """
import os, signal, time
print("looks", flush=True)
found = None
while found is None:
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                if b"settle" in file.read():
                    found = os.kill(int(pid), signal.SIGSTOP) or pid
        except OSError:
            pass
time.sleep(600)
"""
SHOUT = """
import socket, time
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
while True:
    for address, word in (("203.0.113.80", b"allowed"), ("203.0.113.99", b"forbidden"), ("10.9.9.9", b"inner")):
        try:
            sock.sendto(word, (address, 7777))
        except OSError:
            pass
"""


levels = pytest.mark.parametrize(
    "level", ["container", pytest.param("gvisor", marks=pytest.mark.needs("runsc")),
              pytest.param("microvm", marks=pytest.mark.needs("microvm"))]
)  # fmt: skip


@levels
def test_a_contract_holds_from_the_first_instruction_to_the_last(tmp_path: Path, level: str) -> None:
    with topology.world(tmp_path) as world, place() as home, guest_images(home.home):
        config = home.home / "config.yaml"
        config.write_text(f"network:\n  name_servers: [{NAME_SERVER}]\n")
        config.chmod(0o600)
        world.in_host(home.start)
        spy = world.sniff(world.internet)
        shouting = home.create("python3", "-c", SHOUT, level=level, allow=[f"{PUBLIC}:7777"])
        wait_until(lambda: spy.saw(b"allowed"), "a datagram")
        shouting.kill()
        counts = [-1, len(spy.seen)]
        while counts[-1] != counts[-2]:  # until the sniffer has read what came before
            time.sleep(0.3)
            counts.append(len(spy.seen))
        heard = sum(b"allowed" in packet for packet in spy.seen)
        shop = world.keep(WebServer(world.internet, 8080))
        sandbox = home.create(level=level, allow=["public.example:80/direct", "public.example:8080"])
        assert level == "container" or sandbox.info.warm
        assert sandbox.run(["python3", "-c", BY_NAME]).stdout == "b'ok'\n403\n"
        assert len(shop.heard) == 1
        counters = sandbox.network().counters
        assert (counters["opened"], counters["proxied"], counters["refused_proxy_name"]) == (2, 1, 1)
        addresses = ("public.example", *ADDRESSES[1:])
        done = sandbox.run(["python3", "-c", f"ADDRESSES, HOST = {addresses!r}, {HOST!r}\n{ASKING}"])
        answers = dict(line.split(": ", 1) for line in done.stdout.splitlines())
        assert answers["public.example"] == HOST, done.stderr
        assert {answers[closed] for closed in (*PRIVATE, METADATA[0], NEIGHBOUR, "host")} == {"No route to host"}
        assert sandbox.network().counters["opened"] == 3
        with pytest.raises(RequestRejected, match="private addresses"):
            sandbox.swear(Contract(allowed_cidrs=("10.0.0.0/8",), deny_private=False))
        assert sandbox.swear(Contract(allowed_cidrs=("192.0.2.0/24",))).contract is not None
        done = sandbox.run(["python3", "-c", f"ADDRESSES, HOST = {[PUBLIC]!r}, {HOST!r}\n{ASKING}"])
        assert f"{PUBLIC}: No route to host" in done.stdout
        if level != "container":
            _goes_on_elsewhere(sandbox, forges=level == "microvm")
        if level == "gvisor":
            _ends_connections(home)
            _opens_connections(world, home)
        assert sum(b"allowed" in packet for packet in spy.seen) == heard
        assert not spy.saw(b"forbidden")
        assert not spy.saw(b"inner")
        assert not spy.saw(b"forged")
        assert home.end_daemon(signal.SIGKILL) != 0
        assert world.in_host(lambda: not any("slot" in name for name in os.listdir("/sys/class/net")))
        world.in_host(home.start)
        assert home.end_daemon(signal.SIGTERM) == 0
        assert world.traces() == []


def _goes_on_elsewhere(sandbox: Sandbox, *, forges: bool) -> None:
    """Asleep it has no network; awake, and each copy of it, an address of its own, under the contract it had last."""
    before = sandbox.network()
    sandbox.hibernate()
    assert sandbox.network().address == ""
    sandbox.wake()
    addresses = {before.address}
    for copy in (sandbox, *sandbox.fork()):
        assert copy.network().contract == before.contract
        addresses.add(copy.network().address)
        done = copy.run(["python3", "-c", f"ADDRESSES, HOST = {[PUBLIC]!r}, {HOST!r}\n{ASKING}"])
        assert f"{PUBLIC}: No route to host" in done.stdout
    assert len(addresses) == 3
    if forges:  # a kernel of its own lets its root have any address
        assert sandbox.run(["python3", "-c", FORGE]).stderr == ""
        wait_until(lambda: sandbox.network().counters.get("refused_spoofed"), "a refusal")


def _ends_connections(home: Place) -> None:
    """What goes on from memory is told that its connections ended, and sends nothing more from the address of before."""

    def says(one: Sandbox, word: str) -> bool:
        return word.encode() in b"".join(entry.data for entry in one.logs())

    def spoofed(one: Sandbox, before: int = 0) -> int:
        return max(0, one.network().counters.get("refused_spoofed", 0) - before)

    source = home.create("python3", "-c", HOLD, level="gvisor", allow=[PUBLIC])
    before = source.network().address
    wait_until(lambda: says(source, f"holds {before}"), "its connections")
    (copy,) = source.fork()
    wait_until(lambda: says(source, "tcp ECONNABORTED"), "the end of the source's connection")
    assert not says(source, "udp")
    source.hibernate()
    source.wake()
    for one in (source, copy):
        wait_until(functools.partial(says, one, f"again {one.network().address}"), "another connection")
        for word in ("udp EINVAL", "ping EINVAL", "bound EHOSTUNREACH"):
            assert says(one, word)
    (second,) = copy.fork()  # has sockets of two addresses of before
    assert len({before, *(one.network().address for one in (source, copy, second))}) == 4
    for one in (source, copy, second):
        count = spoofed(one)
        _as_its_kernel(home, one, before, b"forged")
        wait_until(functools.partial(spoofed, one, count), "a refusal")


def _as_its_kernel(home: Place, sandbox: Sandbox, source: str, word: bytes) -> None:
    """Send what nobody in it can: by the link's own socket, as one who has broken its kernel could."""
    for pid in home.inside(sandbox):
        for fd in os.listdir(f"/proc/{pid}/fd"):
            if not os.readlink(f"/proc/{pid}/fd/{fd}").startswith("socket:"):
                continue
            with taken(pid, int(fd)) as link:
                if link.family == socket.AF_PACKET:
                    link.send(frame_of(ip_packet(source, PUBLIC, socket.IPPROTO_UDP, udp(word, 7777))))
                    return
    raise AssertionError("no link was found")


def _opens_connections(world: World, home: Place) -> None:
    """Who opens a connection can't be written down: that is said before anything of it is touched."""
    for words in ("add table ip deaf", "add chain ip deaf c {type filter hook input priority 0;}",
                  "add rule ip deaf c tcp dport 8099 drop"):  # fmt: skip
        namespace.run_in(world.internet, functools.partial(subprocess.run, ["nft", words], check=True))
    sandbox = home.create("python3", "-c", OPENING, level="gvisor", allow=[PUBLIC])
    wait_until(lambda: any(b"opening" in entry.data for entry in sandbox.logs()), "its attempt")
    with pytest.raises(Unsupported, match="opening a connection"):
        sandbox.hibernate()
    assert sandbox.run(["true"]).exit_code == 0
    # Nor is one lost whose root stops the process that looks: what is saved beside that could never go on.
    sandbox = home.create("python3", "-c", STOPPING, level="gvisor", allow=[PUBLIC])
    wait_until(lambda: any(b"looks" in entry.data for entry in sandbox.logs()), "the attacker")
    with pytest.raises(GuestFailed, match="can't be saved"):
        sandbox.hibernate()
    sandbox.hibernate()
    assert sandbox.run(["true"]).exit_code == 0


@levels
def test_a_contract_holds_in_ipv6(tmp_path: Path, level: str) -> None:
    with topology.world(tmp_path) as world, place() as home, guest_images(home.home):
        world.join_ipv6()
        world.names.answers["public.example"] = [PUBLIC_6]
        config = home.home / "config.yaml"
        config.write_text(f"network:\n  name_servers: [{NAME_SERVER}]\n")
        config.chmod(0o600)
        world.in_host(home.start)
        sandbox = home.create(level=level, allow=[f"[{PUBLIC_6}]:80", "public.example:80/direct"])
        closed = (*PRIVATE_6, METADATA_6[0], NEIGHBOUR_6, PUBLIC)
        code = f"ADDRESSES, HOST = {(PUBLIC_6, 'public.example', *closed)!r}, {HOST_6!r}\n{ASKING}"
        answers = dict(line.split(": ", 1) for line in sandbox.run(["python3", "-c", code]).stdout.splitlines())
        assert (answers.pop(PUBLIC_6), answers.pop("public.example")) == (HOST_6, HOST_6)
        assert set(answers.values()) <= {"Connection refused", "No route to host"}
        state = sandbox.network()
        assert (state.address_6.startswith("fd"), state.why_not_6) == (True, "")
        assert not {"refused_spoofed", "refused_protocol", "refused_ipv6"} & set(state.counters)
        if level == "gvisor":
            _goes_on_in_ipv6(sandbox)
        assert sandbox.swear(Contract(allowed_cidrs=("203.0.113.0/24",))).why_not_6
        again = dict(line.split(": ", 1) for line in sandbox.run(["python3", "-c", code]).stdout.splitlines())
        assert again[PUBLIC_6] == "Connection refused"
        assert again[PUBLIC] == HOST
        assert home.end_daemon(signal.SIGTERM) == 0
        assert world.traces() == []


TOLD_6 = f"""
import errno, socket, threading
told = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
told.connect(("{PUBLIC_6}", 80))
def again():
    try:
        told.send(b"before")
    except OSError as error:
        return errno.errorcode[error.errno]
"""


def _goes_on_in_ipv6(sandbox: Sandbox) -> None:
    before = sandbox.network()
    sandbox.run_code(TOLD_6)
    sandbox.hibernate()
    sandbox.wake()
    assert sandbox.network().address_6 not in {"", before.address_6}
    assert sandbox.run_code("print(again())").stdout == "EINVAL\n"
    done = sandbox.run(["python3", "-c", f"ADDRESSES, HOST = {[PUBLIC_6]!r}, {HOST_6!r}\n{ASKING}"])
    assert f"{PUBLIC_6}: {HOST_6}" in done.stdout


@pytest.mark.needs("runsc")
def test_the_daemon_is_killed_while_networks_move(tmp_path: Path) -> None:
    chance = random.Random(4711)
    with topology.world(tmp_path) as world, place() as home:
        world.in_host(home.start)
        slept = None
        while slept is None:
            sandbox = home.create("python3", "-c", HOLD.replace("8080", "80"), level="gvisor", allow=[PUBLIC])

            def toggle(sandbox: Sandbox = sandbox) -> None:
                with contextlib.suppress(TartarusError, OSError):
                    while True:
                        sandbox.hibernate()
                        sandbox.wake()
                        sandbox.fork()

            toggling = threading.Thread(target=toggle)
            toggling.start()
            time.sleep(chance.uniform(0.2, 1.0))
            home.end_daemon(signal.SIGKILL)
            toggling.join()
            if home.recorded()[sandbox.id] in {"hibernated", "starting"}:
                slept = sandbox
            assert world.in_host(lambda: not any("slot" in name for name in os.listdir("/sys/class/net")))
            world.in_host(home.start)
            wait_until(lambda: home.processes() == [], "the end of what the daemon had")
        slept.wake()
        done = slept.run(["python3", "-c", f"ADDRESSES, HOST = {[PUBLIC, PRIVATE[0]]!r}, {HOST!r}\n{ASKING}"])
        assert f"{PUBLIC}: {HOST}\n{PRIVATE[0]}: No route to host\n" in done.stdout
        slept.kill()
        home.keeps = re.compile(r"network(/resolv\.conf|\.lock|\.json)?$")
        home.settle()
        assert home.end_daemon(signal.SIGTERM) == 0
        assert world.traces() == []


def test_a_contract_that_closes_what_it_names_is_refused(tmp_path: Path) -> None:
    with topology.world(tmp_path) as world, place() as home:
        world.in_host(home.start)
        sandbox = home.create(allow=[PUBLIC])
        for network, why in (
            ("10.9.9.9:5432", "deny_private is true"), ("10.0.0.0/8", "deny_private is true"),
            ("[fd00::1]:80", "deny_private is true"), ("169.254.169.254", "deny_metadata is true"),
            ("127.0.0.1:80", "no contract opens loopback addresses"), ("[::1]", "no contract opens loopback addresses"),
            ("169.254.0.0/16", "no contract opens link-local addresses"),
        ):  # fmt: skip
            with pytest.raises(InvalidRequest, match=why):
                home.create("true", allow=[PUBLIC, network])
            with pytest.raises(InvalidRequest, match=why):
                sandbox.swear(sworn("none", [PUBLIC, network]))
        state = sandbox.network()
        assert state.contract is not None
        assert len(state.contract.grants) == 1
        assert home.create("true", allow=["0.0.0.0/0", "8.0.0.0/5"]).wait().exit_code == 0
        assert home.end_daemon(signal.SIGTERM) == 0
        assert world.traces() == []


def test_what_cannot_be_written_down_sends_nothing(tmp_path: Path) -> None:
    """Nor does it keep its guest, or its slot: the daemon has two of these."""
    send = f"import socket; socket.socket(type=socket.SOCK_DGRAM).sendto(b'unwritten', ({PUBLIC!r}, 80))"
    with topology.world(tmp_path) as world, place() as home:
        config = home.home / "config.yaml"
        config.write_text(f"network:\n  name_servers: [{NAME_SERVER}]\n  slots: 2\n")
        config.chmod(0o600)
        world.in_host(home.start)
        spy = world.sniff(world.internet)
        home.create("python3", "-c", send.replace("unwritten", "written"), allow=[PUBLIC])
        wait_until(lambda: spy.saw(b"written"), "the packet of the one that is written down")
        with full_table(home.home):
            for _ in range(3):
                with pytest.raises(TartarusError, match="disk full"):
                    home.create("python3", "-c", send, allow=[PUBLIC])
        assert home.create("true", allow=[PUBLIC]).wait().exit_code == 0
        assert not spy.saw(b"unwritten")
        assert home.end_daemon(signal.SIGTERM) == 0
        assert world.traces() == []


VALUE = "s3cr3t-V4lue-of-an-api"
USING = """
import os, subprocess, urllib.request
with urllib.request.urlopen("http://public.example/v1", timeout=10) as answer:
    print(answer.read().decode())
print(subprocess.run(["grep", "-ras", "s3cr3t", "/run", "/proc/self/environ", "/proc/1/environ"]).returncode != 0)
"""


def test_a_secret_that_the_sandbox_never_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = Authority(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.bundle))
    values = tmp_path / "values.env"
    values.write_text(f"API={VALUE}\n")
    values.chmod(0o600)
    with topology.world(tmp_path / "state") as world, place() as home:
        config = home.home / "config.yaml"
        config.write_text(
            f"network:\n  name_servers: [{NAME_SERVER}]\nsecrets:\n  providers:\n"
            f"    - {{name: env, kind: env-file, options: {{path: {values}}}}}\n  allow:\n"
            '    - {name: api, ref: "env:API", deliver: [proxy], hosts: [public.example], header: X-Api-Key, prefix: ""}\n'
        )
        config.chmod(0o600)
        server = world.keep(WebServer(world.internet, 443, authority.serving("public.example")))
        world.in_host(home.start)
        sandbox = home.create(allow=["public.example:443"], secrets=["api,as=proxy"])
        done = sandbox.run(["python3", "-c", USING])
        assert (done.stdout, done.stderr) == ("ok\nTrue\n", "")
        assert f"x-api-key: {VALUE}".encode() in server.heard[0]
        (entry,) = Audit(client=home.client).entries(AuditQuery(action="proxy"))
        assert (entry.target, entry.decision) == ("public.example:80", "allow")
        assert entry.summary.endswith("with a secret")
        values.write_text("API=another-V4lue-by-now\n")
        assert Secrets(client=home.client).refresh(sandbox.id).names == ("api",)
        assert sandbox.run(["python3", "-c", USING]).stdout.startswith("ok")
        assert b"x-api-key: another-V4lue-by-now" in server.heard[1]
        for asked, allowed, refused in (
            ("api", "public.example:443", SecretRefused), ("api,as=env", "public.example:443", SecretRefused),
            ("api,as=proxy,target=evil.example", "evil.example:443", SecretRefused),
            ("api,as=proxy", "public.example:8443", InvalidRequest),
        ):  # fmt: skip
            with pytest.raises(refused):
                home.create("true", allow=[allowed], secrets=[asked])
        assert VALUE not in repr(sandbox.refresh())
        assert home.end_daemon(signal.SIGTERM) == 0
