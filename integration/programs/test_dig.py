"""dig over TCP through ``toppy up``, and a resolver over SOCKS5 UDP ASSOCIATE (RFC 1928)."""

from __future__ import annotations

import socket
import struct
from typing import Any

import dns.message
import dns.rdatatype
import pytest

from integration.peers import DNS_ADDRESS, DNS_NAME
from integration.processes import running_udp_client, wait_until
from integration.programs.through import RESOLVER, Client, in_one_process, local_port, need, ran

pytestmark = in_one_process

_QUERIES = 200


def test_dig_over_tcp(client: Client, dns_port: int) -> None:
    dig = need("dig", "bind9-dnsutils")
    with local_port(client, f"{RESOLVER}:{dns_port}") as port:
        common = [dig, "@127.0.0.1", "-p", str(port), "+tcp", "+short", "+time=10", "+tries=1"]
        assert ran([*common, DNS_NAME, "A"]) == f"{DNS_ADDRESS}\n"
        # several queries on one connection
        several = [*common, "+keepopen", *(word for _ in range(20) for word in (DNS_NAME, "A"))]
        assert ran(several).split() == [DNS_ADDRESS] * 20


def test_dig_over_udp(client: Client, dns_port: int) -> None:
    dig = need("dig", "bind9-dnsutils")
    with running_udp_client(client.gateway, f"{RESOLVER}:{dns_port}", name="dig") as (port, _):
        command = [dig, "@127.0.0.1", "-p", str(port), "+short", "+time=5", "+tries=3"]
        assert ran([*command, DNS_NAME, "A"]) == f"{DNS_ADDRESS}\n"


def encode_address(host: str, port: int) -> bytes:
    """As SOCKS5 has it: a name, or an IPv4 address."""
    try:
        return b"\x01" + socket.inet_aton(host) + struct.pack("!H", port)
    except OSError:
        return struct.pack("!BB", 3, len(host)) + host.encode() + struct.pack("!H", port)


def associate(control: socket.socket) -> tuple[str, int]:
    """Ask for a UDP association; where the relay listens."""
    answers = control.makefile("rb")
    control.sendall(b"\x05\x01\x00")
    assert answers.read(2) == b"\x05\x00"
    control.sendall(b"\x05\x03\x00" + encode_address("0.0.0.0", 0))
    version, reply, _, kind = answers.read(4)
    assert (version, reply, kind) == (5, 0, 1)
    host = socket.inet_ntoa(answers.read(4))
    (port,) = struct.unpack("!H", answers.read(2))
    return host, port


def open_udp_tunnels(client: Client) -> list[dict[str, Any]]:
    """What ``toppy-gw tunnels`` would list."""
    tunnels = client.gateway.ask("GET", "/tunnels")["tunnels"]
    return [tunnel for tunnel in tunnels if tunnel["protocol"] == "udp"]


@pytest.mark.parametrize("target", [RESOLVER, "127.0.0.1"])
def test_a_resolver_over_socks5_udp(
    client: Client, proxy_port: int, dns_port: int, target: str
) -> None:
    queries = [dns.message.make_query(DNS_NAME, dns.rdatatype.A) for _ in range(_QUERIES)]
    for number, query in enumerate(queries):
        query.id = number
    header = b"\x00\x00\x00" + encode_address(target, dns_port)
    answered = set()
    with (
        socket.create_connection(("127.0.0.1", proxy_port), timeout=20) as control,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock,
    ):
        sock.connect(associate(control))
        sock.settimeout(20)
        for query in queries:
            sock.send(header + query.to_wire())
            answer = sock.recv(4096)
            assert answer[:3] == b"\x00\x00\x00"
            # the answer comes from an address, whatever was asked for
            skipped = 4 + (4 if answer[3] == 1 else 1 + answer[4]) + 2
            response = dns.message.from_wire(answer[skipped:])
            assert query.is_response(response)
            assert response.answer[0][0].to_text() == DNS_ADDRESS
            answered.add(response.id)
        (tunnel,) = open_udp_tunnels(client)
        assert tunnel["target"] == f"{target}:{dns_port}"
    assert len(answered) == _QUERIES
    wait_until("the end of the tunnel", lambda: not open_udp_tunnels(client))
