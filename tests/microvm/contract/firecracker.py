"""Firecracker's order of calls, after its documents: what is possible before a machine starts, while it runs, paused."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from .documents import Document
from .guest import Guest
from .server import Answer, ContractServer, Refused

_PRE_BOOT = ("/machine-config", "/boot-source", "/drives/", "/vsock", "/entropy", "/serial", "/network-interfaces/",
             "/mmds", "/balloon", "/cpu-config", "/pmem/", "/hotplug/")  # fmt: skip
DOCUMENT = Document("firecracker.yaml")


class FirecrackerServer(ContractServer):
    """`configured`: what was asked for before the start. Files that requests name must be there, as it would open them."""

    document = DOCUMENT

    def __init__(self, home: Any) -> None:
        super().__init__(home)
        self.state = "Not started"
        self.configured: dict[str, Any] = {}
        self.guest: Guest | None = None
        self._uid = -1

    async def start(self, uid: int) -> None:
        """Listen."""
        self._uid = uid
        await super().start(uid)

    def words(self, why: str) -> Any:
        """An error, as Firecracker writes it."""
        return {"fault_message": why}

    def handle(self, method: str, path: str, body: Any) -> Answer:
        """One documented request."""
        if method == "GET":
            return self._tell(path)
        if path == "/actions":
            return self._act(body["action_type"])
        if path == "/vm":
            return self._run(body["state"])
        if path == "/snapshot/create":
            return self._create(body)
        if path == "/snapshot/load":
            return self._load(body)
        if path.startswith(_PRE_BOOT):
            self._need("Not started", f"{path} is not supported after starting the microVM")
            self._files(path, body)
            self.configured[path] = body
        return Answer(204)

    def _tell(self, path: str) -> Answer:
        if path == "/version":
            return Answer(200, {"firecracker_version": "1.17.0"})
        info = {"app_name": "Firecracker", "id": "anonymous", "state": self.state, "vmm_version": "1.17.0"}
        return Answer(200, info)

    def _files(self, path: str, body: Any) -> None:
        if path == "/boot-source":
            kernel = self.file(body["kernel_image_path"]).read_bytes()
            if not kernel.startswith(b"\x7fELF"):
                raise Refused(400, "The kernel file cannot be loaded: Invalid Elf magic number")
            self.file(body["initrd_path"]).read_bytes()
        if path.startswith("/drives/"):
            flags = os.O_RDONLY if body["is_read_only"] else os.O_RDWR
            os.close(os.open(self.file(body["path_on_host"]), flags))
        if path == "/machine-config" and body.get("smt") and body["vcpu_count"] % 2 and body["vcpu_count"] > 1:
            raise Refused(400, "The vCPU number is invalid!")

    def _act(self, action: str) -> Answer:
        if action != "InstanceStart":
            return Answer(204)
        self._need("Not started", "The requested operation is not supported after starting the microVM.")
        if "/boot-source" not in self.configured:
            raise Refused(400, "Cannot start microvm without kernel configuration.")
        self.state = "Running"
        self._open_vsock(self.configured.get("/vsock"))
        return Answer(204)

    def _run(self, state: str) -> Answer:
        if self.state == "Not started":
            raise Refused(400, "The requested operation is not supported before starting the microVM.")
        self.state = {"Paused": "Paused", "Resumed": "Running"}[state]
        if self.guest is not None:
            self.guest.run(self.state == "Running")
        return Answer(204)

    def _create(self, body: Any) -> Answer:
        self._need("Paused", "save/restore unavailable while running")
        memory = self.configured["/machine-config"]["mem_size_mib"] << 20
        with open(
            self.file(body["mem_file_path"]), "r+b" if self.file(body["mem_file_path"]).exists() else "xb"
        ) as file:
            file.truncate(memory)
            file.seek(4096)
            file.write(b"guest memory")
        os.chown(self.file(body["mem_file_path"]), self._uid, self._uid, follow_symlinks=False)
        state = self.file(body["snapshot_path"])
        state.write_bytes(b"FC-STATE " + str(memory).encode())
        os.chown(state, self._uid, self._uid)
        # The device is reset: whoever was connected is not any more.
        if self.guest is not None:
            self.guest.reset()
        return Answer(204)

    def _load(self, body: Any) -> Answer:
        self._need("Not started", "The requested operation is not supported after starting the microVM.")
        if self.configured:
            raise Refused(400, "Loading a microVM snapshot not allowed after configuring boot-specific resources.")
        if ("mem_backend" in body) == ("mem_file_path" in body):
            raise Refused(400, "exactly one of mem_backend and mem_file_path")
        state = self.file(body["snapshot_path"]).read_bytes()
        if not state.startswith(b"FC-STATE "):
            raise Refused(400, "Load snapshot error: Failed to restore from snapshot: Invalid format")
        memory = self.file(body["mem_backend"]["backend_path"])
        if memory.stat().st_size != int(state.split()[1]):
            raise Refused(400, "Load snapshot error: memory size")
        # What the state says of disks and of vsock is where they were: relative to where the process runs.
        for name, flags in (("root", os.O_RDONLY), ("scratch", os.O_RDWR)):
            os.close(os.open(self.file(name), flags))
        self.configured = {"/machine-config": {"mem_size_mib": memory.stat().st_size >> 20}}
        self.state = "Paused"
        self._open_vsock({"uds_path": "vsock.sock"})
        if self.guest is not None:
            self.guest.run(bool(body.get("resume_vm")))
        return Answer(204)

    def _open_vsock(self, body: Any) -> None:
        if body is not None and self.guest is not None:
            self._opening = asyncio.ensure_future(self.guest.listen(self, body["uds_path"], self._uid))

    def _need(self, state: str, why: str) -> None:
        if self.state != state:
            raise Refused(400, why)
