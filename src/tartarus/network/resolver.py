"""The node's DNS resolver for sandboxes: listens in the router only, asks the host's own name servers.

It forwards plain questions about names that the asker's contract allows, opens the addresses of those to it for as
long as they are good, and tells the answers, except those that point where sandboxes may not go. It keeps no answers:
the servers that it asks do.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

import dns.asyncquery
import dns.exception
import dns.message
import dns.rcode
import dns.rdatatype
import structlog

from tartarus.network import names
from tartarus.network.compiled import Compiled
from tartarus.network.oaths import Answer
from tartarus.network.settings import NetworkSettings

_log = structlog.get_logger("tartarus.network")
_RESOLV_CONF = Path("/etc/resolv.conf")
_MAX_RESOLV_CONF_BYTES = 64 * 1024
_MAX_SERVERS = 3  # as resolv.conf(5)
_ROUNDS = 2
_ATTEMPT_S = 2.0
_STREAM_IDLE_S = 10.0
_MAX_STREAMS = 8
"""Open TCP connections of one sandbox."""
_MAX_QUERIES_PER_STREAM = 64
_LENGTH = struct.Struct(">H")

_LEAST_TTL_S = 5
_MOST_TTL_S = 3600
"""What the sandbox is told, too: an address is open for as long as it is told to be good."""
_MOST_OPEN = 1024
"""Addresses of one contract's domains that are open at once."""

Open = Callable[[Answer], Awaitable[None]]
Refuses = Callable[[IPv4Address | IPv6Address, Compiled], str]


class Asker:
    """A slot that is answered: by which contract, and what was opened to it."""

    def __init__(self, contract: Compiled, open_address: Open) -> None:
        self.contract = contract
        self.open = open_address
        self.counts: Counter[str] = Counter()
        self.opened: dict[tuple[IPv4Address | IPv6Address, str], float] = {}

    def replace(self, contract: Compiled) -> None:
        """It has another contract now."""
        self.contract = contract

    def still_open(self, contract: Compiled) -> list[Answer]:
        """What was opened under the present contract, as far as another one opens it too."""
        now = time.monotonic()
        return [
            _opening(contract, name, address, until - now)
            for (address, name), until in self.opened.items()
            if until > now and contract.ports_of(name) != frozenset() and not contract.denies(address)
        ]

    def was_answered(self, name: str, address: IPv4Address) -> bool:
        """Whether that address is one that the name was answered with, and still good."""
        return self.opened.get((address, name), 0.0) > time.monotonic()

    def has_room(self, addresses: Sequence[IPv4Address | IPv6Address]) -> bool:
        """Whether so many more may be opened; what has gone by itself is forgotten here."""
        now = time.monotonic()
        if len(self.opened) + len(addresses) > _MOST_OPEN:
            self.opened = {key: until for key, until in self.opened.items() if until > now}
        return len(self.opened) + len(addresses) <= _MOST_OPEN


class Resolver:
    """Answers slots that `opened` has named, until `closed`."""

    def __init__(self, settings: NetworkSettings, refuses: Refuses) -> None:
        self._settings = settings
        self._refuses = refuses
        self._askers: dict[str, Asker] = {}
        self._in_flight: Counter[str] = Counter()
        self._streams: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()
        self._transport: asyncio.DatagramTransport | None = None
        self._server: asyncio.Server | None = None

    async def start(self, datagrams: socket.socket, streams: socket.socket) -> None:
        """Serve on these sockets, which are its own from now on."""
        loop = asyncio.get_running_loop()
        self._transport, _ = await loop.create_datagram_endpoint(lambda: _Datagrams(self._datagram), sock=datagrams)
        self._server = await asyncio.start_server(self._stream, sock=streams, limit=4096)

    async def close(self) -> None:
        """Stop serving; questions that wait for an answer get none."""
        if self._transport is not None:
            self._transport.close()
        if self._server is not None:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def opened(self, address: IPv4Address, asker: Asker) -> None:
        """Answer that slot from now on."""
        self._askers[str(address)] = asker

    def asker(self, address: IPv4Address) -> Asker | None:
        """Who that slot is, while it is answered."""
        return self._askers.get(str(address))

    def closed(self, address: IPv4Address) -> dict[str, int]:
        """Answer that slot no more; what was counted for it, by reason."""
        asker = self._askers.pop(str(address), None)
        return {} if asker is None else dict(asker.counts)

    def counted(self, address: IPv4Address) -> dict[str, int]:
        """What was counted for a slot so far, by reason."""
        asker = self._askers.get(str(address))
        return {} if asker is None else dict(asker.counts)

    def _datagram(self, packet: bytes, sender: tuple[str, int]) -> None:
        asker = self._askers.get(sender[0])
        if asker is None:
            return
        if self._in_flight[sender[0]] >= self._settings.dns_in_flight:
            asker.counts["dns_busy"] += 1
            return
        self._keep(asyncio.get_running_loop().create_task(self._answer_datagram(packet, sender)))

    async def _answer_datagram(self, packet: bytes, sender: tuple[str, int]) -> None:
        question, response = await self._answer(packet, sender[0], stream=False)
        # The slot may be another's by now, or nobody's.
        if question is not None and response is not None and self._transport is not None:
            self._transport.sendto(names.to_datagram(question, response), sender)

    async def _stream(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._keep(task)
        sender: str = writer.get_extra_info("peername")[0]
        asker = self._askers.get(sender)
        try:
            if asker is None or self._streams[sender] >= _MAX_STREAMS:
                return
            self._streams[sender] += 1
            try:
                await self._serve_stream(reader, writer, sender)
            finally:
                _less(self._streams, sender)
        finally:
            writer.transport.abort()

    async def _serve_stream(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, sender: str) -> None:
        with contextlib.suppress(TimeoutError, asyncio.IncompleteReadError, OSError):
            for _ in range(_MAX_QUERIES_PER_STREAM):
                async with asyncio.timeout(_STREAM_IDLE_S):
                    (size,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
                    if size > names.MAX_QUERY_BYTES:
                        return
                    packet = await reader.readexactly(size)
                _, response = await self._answer(packet, sender, stream=True)
                if response is None:
                    return
                wire = response.to_wire(max_size=65535)
                writer.write(_LENGTH.pack(len(wire)) + wire)
                async with asyncio.timeout(_STREAM_IDLE_S):
                    await writer.drain()
            writer.close()
            async with asyncio.timeout(_STREAM_IDLE_S):
                await writer.wait_closed()

    async def _answer(
        self, packet: bytes, sender: str, *, stream: bool
    ) -> tuple[names.Question | None, dns.message.Message | None]:
        asker = self._askers.get(sender)
        if asker is None:
            return None, None
        counts, contract = asker.counts, asker.contract
        question = names.read_question(packet)
        if question is None:
            counts["dns_malformed"] += 1
            return None, None
        counts["dns_queries"] += 1
        name = question.name.to_text(omit_final_dot=True).lower()
        ports = contract.ports_of(name)
        allowed = ports != frozenset()
        if contract.deny_dns or not (allowed or contract.every_name):
            counts["dns_refused"] += 1
            return question, names.failure(question, dns.rcode.REFUSED)
        if (contract.deny_private or not allowed) and names.is_private_name(question, self._closed_to(contract)):
            counts["dns_private"] += 1
            return question, names.failure(question, dns.rcode.NXDOMAIN)
        if question.leads_past_the_proxy and contract.direct.ports_of(name) != ports:
            # None of it passes there, so nobody is to try.
            return question, names.failure(question, dns.rcode.NOERROR)
        self._in_flight[sender] += 1
        try:
            answer = await self._ask(question, stream=stream)
        finally:
            _less(self._in_flight, sender)
        if self._askers.get(sender) is not asker or asker.contract is not contract:
            return None, None  # given back meanwhile, or sworn anew
        if answer is None:
            counts["dns_unanswered"] += 1
            return question, names.failure(question, dns.rcode.SERVFAIL)
        if names.closed_addresses(answer, self._closed_to(contract)):
            counts["dns_rebinding"] += 1
            return question, names.failure(question, dns.rcode.REFUSED)
        if allowed and not await self._open(asker, name, answer):
            counts["dns_full"] += 1
            return question, names.failure(question, dns.rcode.SERVFAIL)
        return question, names.reply(question, answer)

    async def look_up(self, slot: IPv4Address, name: str) -> list[IPv4Address]:
        """A name's addresses, as that slot itself would be told them and with all that follows; none if refused."""
        asker = self._askers.get(str(slot))
        if asker is not None and self._in_flight[str(slot)] >= self._settings.dns_in_flight:
            asker.counts["dns_busy"] += 1  # or a few whose names are never answered keep everybody waiting
            return []
        packet = dns.message.make_query(name, dns.rdatatype.A).to_wire()
        _, response = await self._answer(packet, str(slot), stream=False)
        found = [] if response is None else names.addresses_to_open(response)
        return [address for address in found if isinstance(address, IPv4Address)]

    async def _open(self, asker: Asker, name: str, answer: dns.message.Message) -> bool:
        """Open what was answered, before it is told; False when the contract has too much open already."""
        ttl_s = names.bound_ttl(answer, _LEAST_TTL_S, _MOST_TTL_S)
        addresses = names.addresses_to_open(answer)
        if not asker.has_room(addresses):
            return False
        contract = asker.contract
        for address in addresses:
            # One second more: what the sandbox is told takes time to get there.
            until = time.monotonic() + ttl_s + 1
            if asker.contract is contract:
                asker.opened[address, name] = until
                try:
                    await asker.open(_opening(contract, name, address, ttl_s + 1))
                except OSError as error:
                    _log.warning("address_not_opened", error=str(error))
                    return False
        return True

    def _closed_to(self, contract: Compiled) -> names.Refuses:
        return lambda address: self._refuses(address, contract)

    async def _ask(self, question: names.Question, *, stream: bool) -> dns.message.Message | None:
        servers = self._settings.name_servers or host_name_servers()
        for server in servers * _ROUNDS:
            query = question.to_upstream()
            try:
                if stream:
                    return await dns.asyncquery.tcp(query, server, timeout=_ATTEMPT_S)
                # From a fresh port, with a fresh id; what does not fit both and the question is not an answer.
                return await dns.asyncquery.udp(query, server, timeout=_ATTEMPT_S, ignore_errors=True)
            except (dns.exception.DNSException, OSError, ValueError, EOFError) as error:
                _log.debug("name_server_failed", server=server, error=str(error))
        return None

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _Datagrams(asyncio.DatagramProtocol):
    def __init__(self, received: Callable[[bytes, tuple[str, int]], None]) -> None:
        self._received = received

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self._received(data, addr)


def host_name_servers(path: Path = _RESOLV_CONF) -> tuple[str, ...]:
    """Whom the host asks, as its resolv.conf says; at most three."""
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_RESOLV_CONF_BYTES).decode("utf-8", "replace")
    except OSError:
        return ()
    found = []
    for line in text.splitlines():
        match line.split():
            case ["nameserver", server, *_]:
                with contextlib.suppress(ValueError):
                    found.append(str(ip_address(server)))
    return tuple(found[:_MAX_SERVERS])


def _opening(contract: Compiled, name: str, address: IPv4Address | IPv6Address, ttl_s: float) -> Answer:
    every, direct = contract.ports_of(name), contract.direct.ports_of(name)
    return Answer(address, direct, frozenset() if direct == every else every, ttl_s)


def _less(counter: Counter[str], key: str) -> None:
    counter[key] -= 1
    if counter[key] <= 0:
        del counter[key]
