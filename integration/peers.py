"""Real far ends for tunnels, each a process: ``python -m integration.peers KIND PORT …``.

``echo`` answers every UDP datagram with itself; ``dns`` is a small dnspython server for hosts
without dnsmasq; ``http3`` serves pages over HTTP/3.
"""

from __future__ import annotations

import asyncio
import shutil
import socket
import sys
from pathlib import Path

import dns.flags
import dns.message
import dns.rrset
from aioquic.asyncio.client import connect as quic_connect
from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.asyncio.server import serve as quic_serve
from aioquic.h3.connection import H3_ALPN, H3Connection
from aioquic.h3.events import DataReceived, H3Event, HeadersReceived
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.events import QuicEvent

from integration.processes import Running, start
from toppy.net.udp_socket import UdpSocket, bind_udp

DNS_NAME = "printer.example.test"
DNS_ADDRESS = "192.0.2.7"
PAGE = b"<h1>a page that is larger than a packet</h1>" + b"toppy " * 5000


def run_echo(host: str, port: int) -> None:
    """Echo until killed."""
    sock = bind_udp(host, port, buffer_bytes=8 << 20, may_fragment=True)
    udp = UdpSocket(sock)
    sock.setblocking(True)
    print("echo ready", flush=True)
    while True:
        batch = udp.receive()
        if batch is not None:
            udp.send(bytes(batch[0]), batch[1], batch[2])


def run_dns(host: str, port: int) -> None:
    """Answer A queries for one name until killed."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((host, port))
    print("dns ready", flush=True)
    while True:
        wire, peer = sock.recvfrom(4096)
        query = dns.message.from_wire(wire)
        answer = dns.message.make_response(query)
        answer.flags |= dns.flags.AA
        if query.question[0].name.to_text(omit_final_dot=True) == DNS_NAME:
            answer.answer.append(
                dns.rrset.from_text(query.question[0].name, 60, "IN", "A", DNS_ADDRESS)
            )
        sock.sendto(answer.to_wire(), peer)


class _Origin(QuicConnectionProtocol):
    """Answers every request with the page."""

    http: H3Connection | None = None

    def quic_event_received(self, event: QuicEvent) -> None:
        if self.http is None:
            self.http = H3Connection(self._quic)
        for happened in self.http.handle_event(event):
            if isinstance(happened, HeadersReceived):
                self.http.send_headers(happened.stream_id, [(b":status", b"200")])
                self.http.send_data(happened.stream_id, PAGE, end_stream=True)
        self.transmit()


async def run_http3(host: str, port: int, certificate: str, key: str) -> None:
    """Serve until killed."""
    configuration = QuicConfiguration(is_client=False, alpn_protocols=H3_ALPN)
    configuration.load_cert_chain(certificate, key)
    await quic_serve(host, port, configuration=configuration, create_protocol=_Origin)
    print("http3 ready", flush=True)
    await asyncio.Event().wait()


class _Fetcher(QuicConnectionProtocol):
    """One GET."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.http = H3Connection(self._quic)
        self.body = b""
        self.done: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def get(self, authority: str) -> None:
        """Ask for ``/``."""
        stream_id = self._quic.get_next_available_stream_id()
        headers = [
            (b":method", b"GET"),
            (b":scheme", b"https"),
            (b":authority", authority.encode()),
            (b":path", b"/"),
        ]
        self.http.send_headers(stream_id, headers, end_stream=True)
        self.transmit()

    def quic_event_received(self, event: QuicEvent) -> None:
        happened: list[H3Event] = self.http.handle_event(event)
        for item in happened:
            if isinstance(item, DataReceived):
                self.body += item.data
                if item.stream_ended and not self.done.done():
                    self.done.set_result(self.body)


async def fetch_http3(port: int, ca: Path) -> bytes:
    """GET the page through a local port; the whole inner connection travels in the tunnel."""
    configuration = QuicConfiguration(
        is_client=True, alpn_protocols=H3_ALPN, server_name="localhost"
    )
    configuration.load_verify_locations(str(ca))
    async with (
        asyncio.timeout(15),
        quic_connect(
            "127.0.0.1", port, configuration=configuration, create_protocol=_Fetcher
        ) as protocol,
    ):
        assert isinstance(protocol, _Fetcher)
        protocol.get(f"localhost:{port}")
        return await protocol.done


def start_peer(
    kind: str, port: int, directory: Path, *more: str, host: str = "127.0.0.1"
) -> Running:
    """A peer in a process of its own, ready to answer."""
    running = start(
        [sys.executable, "-m", "integration.peers", kind, host, str(port), *more],
        directory / f"{kind}-{port}.log",
    )
    running.wait_for_output(f"{kind} ready")
    return running


def start_dns_server(port: int, directory: Path) -> tuple[Running, str]:
    """dnsmasq where it is installed, otherwise our own; the server, and which it is."""
    dnsmasq = shutil.which("dnsmasq", path="/usr/sbin:/usr/local/sbin:/usr/bin")
    if dnsmasq is None:
        return start_peer("dns", port, directory), "dnspython"
    running = start(
        [
            *(dnsmasq, "--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv"),
            *("--no-hosts", "--listen-address=127.0.0.1", "--bind-interfaces", "--user=root"),
            *(f"--port={port}", "--pid-file=", "--log-facility=-"),
            f"--address=/{DNS_NAME}/{DNS_ADDRESS}",
        ],
        directory / "dnsmasq.log",
    )
    running.wait_for_output("started")
    return running, "dnsmasq"


def main() -> None:
    """Entry point of a peer's process."""
    kind, host, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
    if kind == "echo":
        run_echo(host, port)
    elif kind == "dns":
        run_dns(host, port)
    elif kind == "http3":
        asyncio.run(run_http3(host, port, sys.argv[4], sys.argv[5]))
    else:
        sys.exit(f"unknown peer {kind}")


if __name__ == "__main__":
    main()
