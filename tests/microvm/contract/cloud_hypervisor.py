"""Cloud Hypervisor's order of calls, after its documents: created, booted, paused, saved; or restored, resumed."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

from .documents import Breach, Document
from .guest import Guest
from .server import Answer, ContractServer, Refused

DOCUMENT = Document("cloud-hypervisor.yaml")
_BUS = {"pci_segment": 0, "pci_device_id": 5}


class CloudHypervisorServer(ContractServer):
    """`state`: as `vm.info` tells it, "" before a machine is created. `config`: what it was created from."""

    document = DOCUMENT

    def __init__(self, home: Path) -> None:
        super().__init__(home)
        self.state = ""
        self.config: dict[str, Any] = {}
        self.guest: Guest | None = None
        self.extra: dict[str, Any] = {}
        self._uid = -1

    async def start(self, uid: int) -> None:
        """Listen."""
        self._uid = uid
        await super().start(uid)

    def words(self, why: str) -> Any:
        """An error, as Cloud Hypervisor writes it: a list of causes."""
        return ["Error from API", why]

    def handle(self, method: str, path: str, body: Any) -> Answer:
        """One documented request."""
        match path.removeprefix("/api/v1/"):
            case "vmm.ping":
                return Answer(200, {"version": "v53.0", "build_version": "v53.0"})
            case "vm.create":
                self._need("", 500, "VM is already created")
                self._check(body)
                self.config, self.state = body, "Created"
            case "vm.boot":
                self._created()
                self._need("Created", 500, "VM is already running")
                self._load_payload()
                self._run()
            case "vm.pause":
                self._created()
                self._need("Running", 405, "VM is not running")
                self._halt()
            case "vm.resume":
                self._created()
                self._need("Paused", 405, "VM is not paused")
                self._run()
            case "vm.snapshot":
                self._created()
                self._need("Paused", 405, "VM is not paused")
                self._save(body["destination_url"])
            case "vm.restore":
                self._need("", 404, "VM is already created")
                self._restore(body)
            case other:
                raise Breach(f"{method} {other} is nothing that a driver should ask for")
        return Answer(204)

    def _check(self, config: Any) -> None:
        if config.get("memory", {}).get("size", 0) <= 0 or "kernel" not in config["payload"]:
            raise Refused(500, "the configuration is not valid")
        serials = [disk.get("serial") for disk in config.get("disks", ())]
        identifiers = [disk.get("id") for disk in config.get("disks", ())]
        if len(set(identifiers)) != len(identifiers) or any(len(serial or "") > 20 for serial in serials):
            raise Refused(500, "Identifier is not unique, or a serial is too long")
        for disk in config.get("disks", ()):
            os.close(os.open(self.file(disk["path"]), os.O_RDONLY if disk.get("readonly") else os.O_RDWR))

    def _load_payload(self) -> None:
        for name in ("kernel", "initramfs"):
            if not self.file(self.config["payload"][name]).read_bytes():
                raise Refused(500, f"Cannot load the {name}")
        if self.guest is not None:
            path = self.config["vsock"]["socket"]
            self._opening = asyncio.ensure_future(self.guest.listen(self, path, self._uid))

    def _run(self) -> None:
        self.state = "Running"
        if self.guest is not None:
            self.guest.run(True)

    def _halt(self) -> None:
        self.state = "Paused"
        if self.guest is not None:
            self.guest.run(False)

    def _directory(self, url: str) -> Path:
        prefix = "file:///proc/self/cwd/"
        if not url.startswith(prefix):
            raise Refused(500, "the URL is not of the monitor's own directory")
        return self.home / url.removeprefix(prefix)

    def _save(self, url: str) -> None:
        place = self._directory(url)
        if not place.is_dir():
            raise Refused(500, "Destination is not a directory")
        disks = [disk | _BUS for disk in self.config["disks"]]
        config = self.config | {"disks": disks, "watchdog": False, "iommu": False} | self.extra
        written = {"config.json": json.dumps(config).encode(), "state.json": b'{"id":"vm"}'}
        for name, content in written.items():
            with (place / name).open("xb") as file:
                file.write(content)
        with (place / "memory-ranges").open("xb") as file:
            file.truncate(self.config["memory"]["size"])
            file.seek(4096)
            file.write(b"guest memory")
        for path in place.iterdir():
            os.chown(path, self._uid, self._uid)
        if self.guest is not None:
            self.guest.reset()

    def _restore(self, body: Any) -> None:
        place = self._directory(body["source_url"])
        config = json.loads((place / "config.json").read_bytes())
        self.document.check("PUT", "/api/v1/vm.create", config)
        self._check(config)
        if (place / "state.json").read_bytes() != b'{"id":"vm"}':
            raise Refused(500, "the state can't be read")
        if (place / "memory-ranges").stat().st_size != config["memory"]["size"]:
            raise Refused(500, "the memory has another size")
        if body.get("memory_restore_mode") == "OnDemand" and body.get("prefault"):
            raise Refused(400, "prefault is not supported on demand")
        self.config = config
        if self.guest is not None:
            self._opening = asyncio.ensure_future(self.guest.listen(self, config["vsock"]["socket"], self._uid))
        self._halt()
        if body.get("resume"):
            self._run()

    def _created(self) -> None:
        if not self.state:
            raise Refused(404, "VM is not created")

    def _need(self, state: str, status: int, why: str) -> None:
        if self.state != state:
            raise Refused(status, why)
