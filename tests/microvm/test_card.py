"""Machines with a network card: a size of their own, and refused in words where there can be none."""

from __future__ import annotations

import os
from typing import Any, cast

import pytest

from tartarus.model.errors import Unsupported
from tartarus.network import taps
from tartarus.runtimes.microvm.cloud_hypervisor import CloudHypervisor
from tartarus.runtimes.microvm.driver import Driver, Hardware
from tartarus.runtimes.microvm.firecracker import Firecracker
from tartarus.runtimes.microvm.machinery import Machinery
from tartarus.runtimes.microvm.qemu import Qemu
from tartarus.runtimes.microvm.snapshot import size_for

from .conftest import RESOURCES

NOTHING = cast("Any", None)  # making a driver starts nothing


def test_a_card_makes_another_size() -> None:
    assert size_for(RESOURCES, warm=True) != size_for(RESOURCES, warm=True, network=True)
    plain, wired = (size_for(RESOURCES, warm=True, network=network).hardware for network in (False, True))
    assert (plain.memory_bytes, plain.cpus) == (wired.memory_bytes, wired.cpus)


def test_a_machine_without_a_network_has_no_card() -> None:
    qemu = Qemu(NOTHING, program="qemu")
    plain = qemu.arguments(Hardware(2**27, 1), [3, 4, 5, 6], share=False)
    assert not [word for word in plain if "net" in word]
    wired = qemu.arguments(Hardware(2**27, 1, network=True), [3, 4, 5, 6, 7], share=False)
    assert "tap,id=network,fd=7,vhost=off" in wired
    card = wired.index("-netdev")
    assert wired[:card] + wired[card + 4 :] == plain


@pytest.mark.parametrize("driver", [Firecracker(NOTHING, "x"), CloudHypervisor(NOTHING, "x")])
def test_monitors_that_open_taps_by_name_refuse(driver: Driver) -> None:
    machinery = Machinery.__new__(Machinery)
    machinery.driver = driver
    with pytest.raises(Unsupported, match="can't have a network"):
        machinery.require_card()


def test_a_kernel_without_the_driver_refuses() -> None:
    machinery = Machinery.__new__(Machinery)
    machinery.driver, machinery.kernel_release = Qemu(NOTHING, program="qemu"), "6.1.0"
    machinery._card = {"more-modules.list": b""}
    with pytest.raises(Unsupported, match="virtio_net"):
        machinery.require_card()


@pytest.mark.needs("root")
def test_a_tap_that_leads_nowhere_is_in_no_namespace_of_ours() -> None:
    tap = taps.create_apart()
    try:
        assert "nowhere" not in os.listdir("/sys/class/net")
        with pytest.raises(OSError, match=r"."):
            os.write(tap, bytes(64))  # it is down
    finally:
        os.close(tap)
