#!/usr/bin/python3 -I
# Stands for Firecracker's jailer: takes its documented arguments alone, and does what they are documented to do.
import json
import os
import re
import socket
import sys

given, extra = sys.argv[1:], []
if "--" in given:
    given, extra = given[: given.index("--")], given[given.index("--") + 1 :]
known = {"--id", "--exec-file", "--uid", "--gid", "--chroot-base-dir", "--cgroup-version", "--resource-limit", "--netns",
         "--cgroup", "--parent-cgroup"}  # fmt: skip
options = dict(zip(given[::2], given[1::2], strict=True))
if not set(options) <= known or len(options) * 2 != len(given):
    sys.exit(f"jailer: Found argument which wasn't expected: {given}")
if not re.fullmatch(r"[A-Za-z0-9-]{1,64}", options["--id"]):
    sys.exit("jailer: Invalid char in id")
program = os.path.realpath(options["--exec-file"])
if "firecracker" not in os.path.basename(program):
    sys.exit("jailer: Invalid filename")
if options["--cgroup-version"] not in {"1", "2"} or not re.fullmatch(
    r"(fsize|no-file)=\d+", options["--resource-limit"]
):
    sys.exit("jailer: Invalid value")
uid, gid = int(options["--uid"]), int(options["--gid"])
os.closerange(3, 65536)
root = os.path.join(options["--chroot-base-dir"], os.path.basename(program), options["--id"], "root")
os.makedirs(root, exist_ok=True)
os.chown(root, uid, gid)
os.chroot(root)
os.chdir("/")
os.setgroups([])
os.setgid(gid)
os.setuid(uid)
if extra != ["--api-sock", "api.sock"]:
    sys.exit(f"firecracker: Arguments parsing error: {extra}")


def attempt(act):
    try:
        return act()
    except OSError as error:
        return type(error).__name__


def read(name):
    with open(name, "rb") as file:
        return file.read(7).decode()


def write(name):
    with open(name, "r+b") as file:
        file.write(b"monitor")
    return "written"


def request(link):
    """A whole one: its head and its body may come one after the other."""
    said = b""
    while b"\r\n\r\n" not in said:
        piece = link.recv(65536)
        if not piece:
            return b""
        said += piece
    head, _, body = said.partition(b"\r\n\r\n")
    length = re.search(rb"(?i)content-length: *(\d+)", head)
    missing = int(length[1]) - len(body) if length else 0
    while missing > 0:
        missing -= len(link.recv(missing))
    return head


names = sorted(os.listdir("/"))
found = {"names": names, "reads": {name: attempt(lambda name=name: read(name)) for name in names},
         "writes": {name: attempt(lambda name=name: write(name)) for name in names}, "uid": os.getresuid()}  # fmt: skip
with open("found.json", "w") as file:
    json.dump(found, file)
os.write(1, b"jailed\n")
with socket.socket(socket.AF_UNIX) as listening:
    listening.bind("starting.sock")
    listening.listen()
    os.rename("starting.sock", "api.sock")
    while True:
        link, _ = listening.accept()
        while said := request(link):
            if b"/snapshot/create" in said:
                for name in ("memory", "state.saved"):
                    with open(name, "wb") as saved:
                        saved.write(b"of the machine")
            link.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")
