"""What passes between this host and the gateway below QUIC's connections: for doctor.

Each question is a UDP payload that any QUIC server answers without a connection
(``wire.version_negotiation``), in several sizes, none of which may be fragmented on the way.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import secrets
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from cryptography import x509

from toppy.client.probe import ProbeError
from toppy.net.udp_socket import connect_udp
from toppy.quic.certificate_probe import CertificateProbe
from toppy.quic.endpoint import H3_ALPN
from toppy.quic.engine import Address
from toppy.wire.version_negotiation import (
    PROBE_ID_BYTES,
    encode_version_probe,
    parse_version_negotiation,
)

PROBE_SIZES = (1200, 1232, 1252, 1280, 1300, 1320, 1350, 1372, 1400, 1420, 1440, 1452, 1472)
"""UDP payload bytes: from what QUIC needs (1,200) to what Ethernet carries over IPv4 (1,472)."""
_TRIES = 3
_AGAIN_S = 0.3
"""A lost probe says nothing about its size."""
_MAX_ADDRESSES = 4
_BUFFER_BYTES = 1 << 18
_MAX_PACKET = 65_535


@dataclass(slots=True)
class AddressFindings:
    """What one of the gateway's addresses did. Grows while the probing goes on."""

    address: Address
    round_trips_s: dict[int, float] = field(default_factory=dict)
    """Of the sizes that were answered, by UDP payload bytes."""
    too_large: set[int] = field(default_factory=set)
    """Sizes that this host could not send at all: larger than its own link."""
    is_refused: bool = False
    """An ICMP message came: nothing listens at that port."""
    error: str = ""
    """Why nothing can be sent there."""
    local_host: str = ""
    """This host's own address on the way."""


class TcpAnswer(Enum):
    """What a TCP connection attempt met."""

    ANSWERED = "answered"
    """Accepted or refused: the host is there."""
    SILENT = "silent"
    UNREACHABLE = "unreachable"


async def probe_path(
    addresses: Sequence[Address], sizes: Sequence[int], found: list[AddressFindings]
) -> None:
    """Ask the first four addresses in every size, thrice at most; what comes goes into ``found``.

    Returns when everything was answered, or the last chance for an answer is over.
    """
    findings = [AddressFindings(address) for address in addresses[:_MAX_ADDRESSES]]
    found += findings
    await asyncio.gather(*(_probe_address(each, sizes) for each in findings))


async def _probe_address(found: AddressFindings, sizes: Sequence[int]) -> None:
    try:
        sock = connect_udp(*found.address, buffer_bytes=_BUFFER_BYTES, may_fragment=False)
    except OSError as error:
        found.error = error.strerror or str(error)
        return
    loop = asyncio.get_running_loop()
    news = asyncio.Event()
    asked: dict[bytes, tuple[int, float]] = {}

    def receive() -> None:
        while True:
            try:
                data = sock.recv(_MAX_PACKET)
            except ConnectionRefusedError:
                found.is_refused = True
                news.set()
                return
            except OSError:
                return
            answer = parse_version_negotiation(data)
            question = asked.get(answer.destination_id) if answer is not None else None
            if question is not None:
                size, sent_at = question
                found.round_trips_s.setdefault(size, time.monotonic() - sent_at)
                news.set()

    found.local_host = str(sock.getsockname()[0])
    loop.add_reader(sock, receive)
    try:
        for _ in range(_TRIES):
            for size in sizes:
                if size not in found.round_trips_s and size not in found.too_large:
                    _send_probe(sock, size, found, asked)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_AGAIN_S):
                    while not _is_done(found, sizes):
                        news.clear()
                        await news.wait()
            if _is_done(found, sizes):
                return
    finally:
        loop.remove_reader(sock)
        sock.close()


def _send_probe(
    sock: socket.socket, size: int, found: AddressFindings, asked: dict[bytes, tuple[int, float]]
) -> None:
    own_id, other_id = secrets.token_bytes(PROBE_ID_BYTES), secrets.token_bytes(PROBE_ID_BYTES)
    asked[own_id] = (size, time.monotonic())
    try:
        sock.send(encode_version_probe(size, other_id, own_id))
    except BlockingIOError:
        pass
    except ConnectionRefusedError:
        found.is_refused = True  # the answer to an earlier one
    except OSError as error:
        if error.errno == errno.EMSGSIZE:
            found.too_large.add(size)
        else:
            found.error = error.strerror or os.strerror(error.errno or 0)


def _is_done(found: AddressFindings, sizes: Sequence[int]) -> bool:
    return (
        found.is_refused
        or bool(found.error)
        or all(size in found.round_trips_s or size in found.too_large for size in sizes)
    )


async def probe_tcp(address: Address) -> TcpAnswer:
    """Whether that host answers TCP at the same port, accepted or refused. No bytes are sent."""
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(sock, address)
        except ConnectionRefusedError:
            return TcpAnswer.ANSWERED
        except OSError:
            return TcpAnswer.UNREACHABLE
        return TcpAnswer.ANSWERED


async def fetch_certificate(
    addresses: Sequence[Address], server_name: str
) -> tuple[x509.Certificate, ...]:
    """The chain that the gateway shows, unverified: the first that comes, of one address per
    family. Raises ``ProbeError`` when it shows none.
    """
    first_of_family = {(":" in address[0]): address for address in reversed(addresses)}
    tasks = [
        asyncio.ensure_future(_fetch_from(address, server_name))
        for address in first_of_family.values()
    ]
    failure = ProbeError("the gateway has no address")
    try:
        for finished in asyncio.as_completed(tasks):
            try:
                return await finished
            except ProbeError as error:
                failure = error
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    raise failure


async def _fetch_from(address: Address, server_name: str) -> tuple[x509.Certificate, ...]:
    try:
        sock = connect_udp(*address, buffer_bytes=_BUFFER_BYTES, may_fragment=False)
    except OSError as error:
        raise ProbeError(error.strerror or str(error)) from None
    loop = asyncio.get_running_loop()
    news = asyncio.Event()
    probe = CertificateProbe(address, server_name, (H3_ALPN,), time.monotonic())
    loop.add_reader(sock, news.set)
    try:
        while not probe.is_over:
            for data in probe.poll_transmits(time.monotonic()):
                with contextlib.suppress(BlockingIOError):
                    sock.send(data)
            news.clear()
            due = probe.next_timeout()
            with contextlib.suppress(TimeoutError):
                wait_s = None if due is None else max(0.0, due - time.monotonic())
                async with asyncio.timeout(wait_s):
                    await news.wait()
            with contextlib.suppress(BlockingIOError):
                while not probe.is_over:
                    probe.receive(sock.recv(_MAX_PACKET), time.monotonic())
            probe.handle_timeout(time.monotonic())
        probe.close(time.monotonic())
        for data in probe.poll_transmits(time.monotonic()):
            with contextlib.suppress(OSError):
                sock.send(data)
    except OSError as error:
        raise ProbeError(error.strerror or str(error)) from None
    finally:
        loop.remove_reader(sock)
        sock.close()
    if not probe.chain:
        raise ProbeError(probe.failure)
    return probe.chain
