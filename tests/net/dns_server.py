"""A small DNS server on the running loop's loopback, UDP and TCP, that behaves as it is told."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import cast

import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset

SILENT = "silent"
GARBAGE = "garbage"
TRUNCATED = "truncated"


@dataclass
class DnsServer:
    """``records`` by (name, type); ``behaviours`` by (name, type) or by name."""

    records: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    behaviours: dict[tuple[str, str] | str, str | dns.rcode.Rcode] = field(default_factory=dict)
    follows_aliases: bool = True
    ttl_s: int = 300
    lose_first: int = 0
    asked: Counter[tuple[str, str]] = field(default_factory=Counter)
    port: int = 0

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def answer(self, wire: bytes, *, over_tcp: bool) -> bytes | None:
        query = dns.message.from_wire(wire)
        question = query.question[0]
        name = question.name.to_text(omit_final_dot=True).lower()
        kind = dns.rdatatype.to_text(question.rdtype)
        self.asked[name, kind] += 1
        if self.asked.total() <= self.lose_first:
            return None
        response = dns.message.make_response(query)
        behaviour = self.behaviours.get((name, kind), self.behaviours.get(name))
        if behaviour == SILENT:
            return None
        if behaviour == GARBAGE:
            return wire[:2] + b"\xff" * 30
        if isinstance(behaviour, dns.rcode.Rcode):
            response.set_rcode(behaviour)
            return response.to_wire()
        if behaviour == TRUNCATED and not over_tcp:
            response.flags |= dns.flags.TC
            return response.to_wire()
        while name in self.aliases and self.follows_aliases | (not response.answer):
            target = self.aliases[name]
            response.answer.append(
                dns.rrset.from_text(f"{name}.", self.ttl_s, "IN", "CNAME", f"{target}.")
            )
            name = target
        texts = self.records.get((name, kind))
        if texts and (self.follows_aliases or not response.answer):
            response.answer.append(dns.rrset.from_text(f"{name}.", self.ttl_s, "IN", kind, *texts))
        elif not any(known == name for known, _ in self.records) and not response.answer:
            response.set_rcode(dns.rcode.NXDOMAIN)
        return response.to_wire()


class _Protocol(asyncio.DatagramProtocol):
    def __init__(self, server: DnsServer) -> None:
        self._server = server

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Python 3.11's transport does not say that it is one
        self._transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str | int, ...]) -> None:
        answer = self._server.answer(data, over_tcp=False)
        if answer is not None:
            self._transport.sendto(answer, addr)


_TRIES = 20
"""To find a number that is free as a TCP port and as a UDP port."""


@contextlib.asynccontextmanager
async def serve(server: DnsServer) -> AsyncIterator[DnsServer]:
    loop = asyncio.get_running_loop()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        size = int.from_bytes(await reader.readexactly(2), "big")
        answer = server.answer(await reader.readexactly(size), over_tcp=True)
        if answer is not None:
            writer.write(len(answer).to_bytes(2, "big") + answer)
            await writer.drain()
        writer.close()

    for attempt in range(_TRIES, 0, -1):
        streams = await asyncio.start_server(talk, "127.0.0.1", 0)
        server.port = streams.sockets[0].getsockname()[1]
        try:
            transport, _ = await loop.create_datagram_endpoint(
                lambda: _Protocol(server), local_addr=("127.0.0.1", server.port)
            )
            break
        except OSError:  # somebody has the UDP port of that number
            streams.close()
            await streams.wait_closed()
            if attempt == 1:
                raise
    try:
        yield server
    finally:
        streams.close()
        await streams.wait_closed()
        transport.close()
        await asyncio.sleep(0)
