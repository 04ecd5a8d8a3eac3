#!/usr/bin/python3 -I
# Stands for a monitor's program where its walls are tested: says what it can and can't do, and answers any request.
import json
import os
import signal
import socket
import sys

MINE = ("kernel", "scratch", "root", "memory")
FOREIGN = ("/etc/passwd", "/etc/shadow", "/root", "/var/tmp", "/tmp", sys.argv[-1])


def read(path, size):
    with open(path, "rb") as file:
        return file.read(size).decode()


def attempt(act):
    try:
        return act()
    except OSError as error:
        return f"{type(error).__name__}"


def write_to(path):
    with open(path, "r+b") as file:
        file.write(b"monitor")
    return "written"


def make(path):
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    return "made"


def grow():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    os.truncate("scratch", 1 << 40)
    return "grown"


found = {
    "uid": os.getresuid(),
    "groups": os.getgroups(),
    "cwd": attempt(lambda: sorted(os.listdir("."))),
    "reads": {name: attempt(lambda name=name: read(name, 7)) for name in MINE},
    "writes": {name: attempt(lambda name=name: write_to(name)) for name in MINE},
    "foreign": {
        path: attempt(lambda path=path: os.listdir(path) if os.path.isdir(path) else read(path, 1)) for path in FOREIGN
    },
    "makes": {path: attempt(lambda path=path: make(path)) for path in ("own-file", "/var/tmp/tartarus-standin")},
    "above": attempt(lambda: os.listdir("..")),
    "interfaces": [name for _, name in socket.if_nameindex()],
    "status": read("/proc/self/status", 10_000),
}
with open("found.json", "w") as file:
    json.dump(found, file)
os.write(1, b"the stand-in speaks\n")
with socket.socket(socket.AF_UNIX) as listening:
    listening.bind("starting.sock")
    listening.listen()
    os.rename("starting.sock", "api.sock")
    while True:
        link, _ = listening.accept()
        while asked := link.recv(65536):
            path = asked.split()[1].decode()
            answer = {}
            if path.startswith("/make/"):
                answer = {"made": attempt(lambda path=path: make(path.removeprefix("/make/")))}
            if path == "/grow":
                answer = {"grown": attempt(grow)}
            body = json.dumps(answer).encode()
            link.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
