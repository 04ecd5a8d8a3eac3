"""Netlink's bytes, and links made and found with them."""

from __future__ import annotations

import errno
import os
import select
from ipaddress import IPv4Address, IPv4Interface, IPv4Network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.network.servers import wait_until

from tartarus.network import namespace
from tartarus.network.links import LOCAL, UNICAST, End, Links, route
from tartarus.network.netlink import NETLINK_ROUTE, Events, attribute, attributes, messages, nested, text


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 0x3FFF), st.binary(max_size=40)), max_size=6))
def test_attributes_come_back(wanted: list[tuple[int, bytes]]) -> None:
    data = b"".join(attribute(kind, value) for kind, value in wanted)
    assert len(data) % 4 == 0
    assert list(attributes(data)) == wanted
    assert list(attributes(nested(7, data))) == [(7, data)]


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_no_bytes_break_the_reader(data: bytes) -> None:
    list(attributes(data))
    list(messages(data))


def test_a_string_has_its_nul() -> None:
    assert list(attributes(text(3, "eth0"))) == [(3, b"eth0\0")]


@pytest.mark.needs("root")
def test_links_addresses_and_routes() -> None:
    first, second = namespace.create(), namespace.create()
    links = namespace.run_in(first, Links)
    others = namespace.run_in(second, Links)
    links.add_pair(End("left", 50), End("right", 60), second, 1400)
    with pytest.raises(FileExistsError):
        links.add_pair(End("left"), End("right"), second, 1400)
    assert [(link.name, link.ifindex, link.mtu) for link in others.all() if link.name != "lo"] == [("right", 60, 1400)]
    links.bring_up(50)
    links.configure(50, IPv4Interface("10.0.0.1/31"))
    others.bring_up(60)
    others.configure(60, IPv4Interface("10.0.0.0/31"), (route(IPv4Network("0.0.0.0/0"), 60, IPv4Address("10.0.0.1")),))
    links.wait_until_working("left")
    found = {str(item.destination): item for item in others.routes()}
    assert (found["0.0.0.0/0"].gateways, found["0.0.0.0/0"].direct) == ((IPv4Address("10.0.0.1"),), False)
    assert (found["10.0.0.0/31"].kind, found["10.0.0.0/31"].direct) == (UNICAST, True)
    assert found["10.0.0.0/32"].kind == LOCAL
    with pytest.raises(OSError, match=r"unreachable|Invalid"):
        links.configure(50, None, (route(IPv4Network("0.0.0.0/0"), 50, IPv4Address("192.0.2.1")),))
    assert links.remove("left") is True
    assert links.remove("left") is False
    assert links.find("left") is None
    with pytest.raises(OSError, match="down") as caught:
        links.wait_until_working("left")
    assert caught.value.errno == errno.ENETDOWN
    for item in (links, others):
        item.close()
    for file in (first, second):
        os.close(file)


@pytest.mark.needs("root")
def test_events_are_heard_in_their_own_namespace_only() -> None:
    first, second = namespace.create(), namespace.create()
    events = namespace.run_in(first, lambda: Events(NETLINK_ROUTE, (1, 5, 7)))
    links, others = namespace.run_in(first, Links), namespace.run_in(second, Links)
    try:
        others.bring_up(1)
        assert not _heard(events)
        links.bring_up(1)
        wait_until(lambda: _heard(events), "it is announced")
        events.drain()
        assert not _heard(events)
    finally:
        for item in (links, others, events):
            item.close()
        for file in (first, second):
            os.close(file)


def _heard(events: Events) -> bool:
    return bool(select.select([events.fileno()], [], [], 0)[0])


@pytest.mark.needs("root")
def test_work_elsewhere_leaves_this_thread_where_it_was() -> None:
    elsewhere = namespace.create()
    try:
        here = namespace.identity()
        assert namespace.run_in(elsewhere, namespace.identity) == namespace.identity(elsewhere) != here
        with pytest.raises(ZeroDivisionError):
            namespace.run_in(elsewhere, lambda: 1 // 0)
        assert namespace.identity() == here
        with pytest.raises(OSError, match="setns"):
            namespace.run_in(0, namespace.identity)
    finally:
        os.close(elsewhere)
