"""A real Docker engine for the tests: Debian's dockerd in a directory of its own, without a network."""

from __future__ import annotations

import contextlib
import io
import shutil
import socket
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

APPLETS = ("sh", "cat", "echo", "env", "id", "ls", "pwd", "sleep", "true", "sed", "wc", "date", "touch", "mkfifo", "dd")
PASSWD = "root:x:0:0::/root:/bin/sh\napp:x:1000:1000::/srv:/bin/sh\n"
PATIENCE_S = 60.0


def rootfs(extra: dict[str, bytes] | None = None) -> bytes:
    """A root file system of busybox, as a tar."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.add("/bin/busybox", "bin/busybox")
        for applet in APPLETS:
            link = tarfile.TarInfo(f"bin/{applet}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(link)
        for name in ("tmp", "srv", "root", "proc"):
            directory = tarfile.TarInfo(name)
            directory.type, directory.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(directory)
        files = {
            "etc/passwd": PASSWD.encode(),
            "etc/group": b"root:x:0:\napp:x:1000:\n",
            "etc/os-release": b"NAME=box\n",
        }
        for name, content in (files | (extra or {})).items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


class Engine:
    """The engine's API as its own clients use it; independent of the code under test."""

    def __init__(self, path: str) -> None:
        self.socket = path
        self._http = httpx.Client(transport=httpx.HTTPTransport(uds=path), base_url="http://d", timeout=PATIENCE_S)

    def call(self, method: str, path: str, **options: Any) -> Any:
        answer = self._http.request(method, path, **options)
        assert answer.status_code < 400, answer.text
        return answer.json() if answer.headers.get("content-type") == "application/json" and answer.content else None

    def load(self, name: str, tar: bytes) -> None:
        self.call("POST", "/images/create", params={"fromSrc": "-", "repo": name, "tag": "latest"}, content=tar)

    def create(
        self, name: str, *argv: str, image: str = "box", host: dict[str, Any] | None = None, **config: Any
    ) -> str:
        body = {"Image": image, "Cmd": argv, "HostConfig": {"NetworkMode": "none", **(host or {})}, **config}
        made = self.call("POST", "/containers/create", params={"name": name}, json=body)["Id"]
        assert isinstance(made, str)
        return made

    def run(self, name: str, *argv: str, ends: bool = True, **config: Any) -> str:
        made = self.create(name, *argv, **config)
        self.call("POST", f"/containers/{made}/start")
        if ends:
            self.call("POST", f"/containers/{made}/wait")
        return made

    def state(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.call("GET", f"/containers/{name}/json")
        return found

    def everything(self) -> tuple[Any, ...]:
        """What must be the same after a migration as before: containers with their states, images, volumes."""
        containers = self.call("GET", "/containers/json", params={"all": "1"})
        return (
            sorted((entry["Id"], entry["State"]) for entry in containers),
            sorted(entry["Id"] for entry in self.call("GET", "/images/json")),
            sorted(entry["Name"] for entry in self.call("GET", "/volumes")["Volumes"] or ()),
        )

    def clear(self) -> None:
        for entry in self.call("GET", "/containers/json", params={"all": "1"}):
            self.call("DELETE", f"/containers/{entry['Id']}", params={"force": "1", "v": "1"})

    def ready(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(self.socket) != 0:
                return False
        return self._http.get("/_ping").status_code == 200

    def close(self) -> None:
        self._http.close()


@contextlib.contextmanager
def dockerd() -> Iterator[Engine]:
    """An engine that is gone, with all it held, at the end."""
    place = Path(tempfile.mkdtemp(prefix="tt-docker-"))
    argv = [
        "dockerd", f"--data-root={place}/data", f"--exec-root={place}/exec", f"--pidfile={place}/pid",
        f"--host=unix://{place}/d.sock", "--bridge=none", "--iptables=false", "--ip6tables=false",
    ]  # fmt: skip
    with (place / "log").open("wb") as log:
        process = subprocess.Popen(argv, stdout=log, stderr=log, start_new_session=True)
    engine = Engine(f"{place}/d.sock")
    try:
        await_ready(engine, process, place / "log")
        engine.load("box", rootfs())
        yield engine
        engine.clear()
    finally:
        engine.close()
        process.terminate()
        try:
            process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        shutil.rmtree(place)


def await_ready(engine: Engine, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + PATIENCE_S
    while not engine.ready():
        assert process.poll() is None, log.read_text(errors="replace")[-2000:]
        assert time.monotonic() < until, log.read_text(errors="replace")[-2000:]
        time.sleep(0.05)
