"""The Cloud Hypervisor driver against its official API document, over real Unix sockets. No machine is booted here."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tests.microvm.contract.cloud_hypervisor import DOCUMENT, CloudHypervisorServer
from tests.microvm.contract.documents import Breach
from tests.microvm.contract.stage import Stage, parts, said

from tartarus.guest.channel import GuestChannel
from tartarus.model.errors import GuestFailed, Unsupported
from tartarus.runtimes.microvm.cloud_hypervisor import CloudHypervisor, Devices, read_devices, restored_configuration

pytestmark = [pytest.mark.anyio, pytest.mark.needs("root")]


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage[CloudHypervisorServer]]:
    """Where monitors would start."""
    made = Stage(CloudHypervisorServer, tmp_path)
    yield made
    await made.close()


@pytest.fixture
def homes(tmp_path: Path) -> Path:
    """Where homes are made."""
    place = tmp_path / "homes"
    place.mkdir()
    return place


async def test_boot_run_save_restore(stage: Stage[CloudHypervisorServer], homes: Path, tmp_path: Path) -> None:
    """Every request is one that the document allows, in an order that the monitor takes."""
    driver = CloudHypervisor(stage, program="cloud-hypervisor")
    made = parts(tmp_path, binds=1)
    machine = await driver.boot(made, None)
    assert stage.argv == [["cloud-hypervisor", "--api-socket", "path=api.sock", "--seccomp", "true"]]
    config = stage.server.config
    assert config["landlock_enable"] is True
    assert [(disk["serial"], disk["readonly"], disk["image_type"]) for disk in config["disks"]] == [
        ("tartarus-root", True, "Raw"), ("tartarus-scratch", False, "Raw"), ("tartarus-bind-0", True, "Raw"),
    ]  # fmt: skip
    assert not {"net", "fs", "devices", "user_devices", "vdpa", "pmem"} & set(config)
    assert {"tartarus.channel=vsock:1024", "tartarus.off=poweroff"} <= set(config["payload"]["cmdline"].split())
    channel = GuestChannel(machine.channel)
    await channel.open()
    await channel.ready()
    assert await said(channel, "booted") == b"booted\n"
    await machine.pause()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(channel.ping(b"?"), 0.2)
    with pytest.raises(Unsupported):
        await machine.save_devices(-1)
    await machine.resume()
    assert await said(channel, "resumed") == b"resumed\n"

    state = os.memfd_create("state")
    await machine.save(state)
    assert json.loads(read_devices(state).state) == {"id": "vm"}
    assert os.pread(made.memory, 12, 4096) == b"guest memory"
    assert os.fstat(made.memory).st_size == made.hardware.memory_bytes
    machine.kill()
    await asyncio.wait_for(machine.ended, 10)
    channel.close()

    again = await driver.restore(parts(tmp_path, share=False, binds=1), state, None)
    ((_, path, body),) = stage.server.requests
    assert path == "/api/v1/vm.restore"
    assert body == {"source_url": "file:///proc/self/cwd/saved", "prefault": False, "resume": False}
    assert stage.server.state == "Paused"
    assert stage.server.config["disks"][0]["pci_device_id"] == 5
    channel = GuestChannel(again.channel)
    await channel.open()
    await again.resume()
    await channel.ready()
    assert await said(channel, "restored") == b"restored\n"
    again.kill()
    await asyncio.wait_for(again.ended, 10)
    channel.close()
    assert os.listdir(homes) == []


async def test_pages_on_demand(stage: Stage[CloudHypervisorServer], homes: Path, tmp_path: Path) -> None:
    """Asked for where the monitor may handle page faults."""
    driver = CloudHypervisor(stage, program="cloud-hypervisor", on_demand=True)
    machine = await driver.boot(parts(tmp_path), None)
    state = os.memfd_create("state")
    await machine.save(state)
    machine.kill()
    await machine.ended
    machine.channel.close()
    again = await driver.restore(parts(tmp_path, share=False), state, None)
    assert stage.server.requests[0][2]["memory_restore_mode"] == "OnDemand"
    again.kill()
    await again.ended
    again.channel.close()


async def test_a_saved_configuration_names_nothing_on_the_host(
    stage: Stage[CloudHypervisorServer], homes: Path, tmp_path: Path
) -> None:
    """A monitor that its guest took over writes it: disks, devices, network and files of the host stay out."""
    driver = CloudHypervisor(stage, program="cloud-hypervisor")
    machine = await driver.boot(parts(tmp_path), None)
    evil = {"path": "/etc/shadow", "id": "root", "backing_files": True, "image_type": "Qcow2", "vhost_user": True}
    stage.server.extra = {
        "disks": [evil, {"path": "/dev/sda", "vhost_socket": "/run/x"}],
        "net": [{"tap": "eth0"}], "fs": [{"tag": "x", "socket": "/run/docker.sock", "num_queues": 1, "queue_size": 8}],
        "devices": [{"path": "/sys/bus/pci/devices/0000:00:01.0"}], "landlock_enable": False,
        "landlock_rules": [{"path": "/", "access": "rw"}], "payload": {"kernel": "/etc/shadow"},
        "vsock": {"cid": 2, "socket": "/run/tartarus/tartarus.sock"}, "memory": {"size": 1, "hugepages": True},
        "serial": {"mode": "File", "file": "/etc/cron.d/x"}, "rng": {"src": "/etc/shadow"},
    }  # fmt: skip
    state = os.memfd_create("state")
    await machine.save(state)
    machine.kill()
    await machine.ended
    machine.channel.close()
    again = await driver.restore(parts(tmp_path, share=False), state, None)
    text = json.dumps(stage.server.config)
    assert not [
        word for word in ("/etc", "/run", "/sys", "eth0", "Qcow2", "hugepages", "vhost", "/dev/sda") if word in text
    ]
    assert [disk["path"] for disk in stage.server.config["disks"]] == ["root", "scratch"]
    assert stage.server.config["landlock_enable"] is True
    again.kill()
    await again.ended
    again.channel.close()


@pytest.mark.parametrize(
    "config",
    [
        "", "[]", "{", "null", '{"disks": 7}', '{"disks": [1, 2]}', '{"disks": [{}]}', '{"disks": [{}, {}, {}]}',
        '{"disks": [{}, {}], "vsock": []}', '{"disks": [{}, {}], "memory": 4}', "[" * 100_000,
    ],
)  # fmt: skip
async def test_a_damaged_configuration_is_refused(tmp_path: Path, config: str) -> None:
    """Before a monitor is asked to read it."""
    with pytest.raises(GuestFailed, match="can't be read"):
        restored_configuration(config, parts(tmp_path))


@pytest.mark.parametrize(
    "content", [b"", b"x", b"{}", b'{"config": 1, "state": ""}', b'{"config": "", "state": "", "more": 1}']
)
async def test_a_damaged_state_is_refused(content: bytes) -> None:
    """The same of what the driver wrote itself."""
    state = os.memfd_create("state")
    os.write(state, content)
    with pytest.raises(GuestFailed, match="can't be read"):
        read_devices(state)
    assert Devices("a", "b").config == "a"


async def test_a_directory_that_became_a_link(stage: Stage[CloudHypervisorServer], homes: Path, tmp_path: Path) -> None:
    """A monitor that was taken over puts a link where it was to save: nothing behind it is read, or removed."""
    victim = tmp_path / "victim"
    victim.mkdir()
    for name in ("config.json", "state.json", "memory-ranges"):
        (victim / name).write_text("of the host")
    driver = CloudHypervisor(stage, program="cloud-hypervisor")
    machine = await driver.boot(parts(tmp_path), None)
    server = stage.server
    before = server.handle

    def swap(method: str, path: str, body: Any) -> Any:
        answer = before(method, path, body)
        if path.endswith("vm.snapshot"):
            (server.home / "saved").rename(server.home / "aside")
            (server.home / "saved").symlink_to(victim)
        return answer

    server.handle = swap  # type: ignore[method-assign]
    with pytest.raises(GuestFailed, match="misbehaves"):
        await machine.save(os.memfd_create("state"))
    assert len(list(victim.iterdir())) == 3
    machine.kill()
    await machine.ended
    machine.channel.close()


async def test_refusals_are_passed_on_in_the_monitors_words(
    stage: Stage[CloudHypervisorServer], homes: Path, tmp_path: Path
) -> None:
    """A list of causes becomes one line; nothing is left."""
    made = parts(tmp_path)
    (tmp_path / "kernel").write_bytes(b"")
    with pytest.raises(GuestFailed, match="Cannot load the kernel"):
        await CloudHypervisor(stage, program="cloud-hypervisor").boot(made, None)
    assert os.listdir(homes) == []


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("PUT", "/vm.create", {"payload": {}}),
        ("PUT", "/api/v1/vm.create", {}),
        ("PUT", "/api/v1/vm.create", {"payload": {}, "memory": {}}),
        ("PUT", "/api/v1/vm.create", {"payload": {}, "vsock": {"cid": 2, "socket": "v"}}),
        ("PUT", "/api/v1/vm.create", {"payload": {}, "serial": {"mode": "Stdout"}}),
        ("PUT", "/api/v1/vm.create", {"payload": {}, "disks": [{"path": "x", "image_type": "qcow2"}]}),
        ("PUT", "/api/v1/vm.create", {"payload": {}, "landlock": True}),
        ("PUT", "/api/v1/vm.create", None),
        ("POST", "/api/v1/vm.boot", None),
        ("PUT", "/api/v1/vm.boot", {}),
        ("PUT", "/api/v1/vm.restore", {"source_url": "file:///x", "memory_restore_mode": "ondemand"}),
    ],
)  # fmt: skip
async def test_the_document_is_strict(method: str, path: str, body: Any) -> None:
    """Or the tests above would prove nothing."""
    with pytest.raises(Breach):
        DOCUMENT.check(method, path, body)
