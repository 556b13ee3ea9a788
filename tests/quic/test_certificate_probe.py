"""Asking a server for its certificates, in virtual time."""

from __future__ import annotations

import pytest
from cryptography import x509

from tests.quic.certificates import certificates
from tests.quic.link import CLIENT, SERVER, START, make_engine, server_config
from toppy.quic.certificate_probe import SMALLEST_PACKET_BYTES, CertificateProbe
from toppy.quic.engine import Engine

ENGINES = ["native", "aioquic"]


def talk(probe: CertificateProbe, server: Engine, *, largest: int = 65_535) -> list[int]:
    """Until it is over: the sizes of the server's packets; those above ``largest`` are lost."""
    now, sizes = START, []
    for _ in range(2000):
        now += 0.001
        for data in probe.poll_transmits(now):
            server.receive(data, 0, CLIENT, now)
        server.poll_events()
        for data, segment, _ in server.poll_transmits(now):
            step = segment or len(data)
            for at in range(0, len(data), step):
                packet = data[at : at + step]
                sizes.append(len(packet))
                if len(packet) <= largest:
                    probe.receive(packet, now)
        if probe.is_over:
            return sizes
        due = server.next_timeout()
        if due is not None and due <= now:
            server.handle_timeout(now)
        probe.handle_timeout(now)
    return sizes


@pytest.mark.parametrize("engine", ENGINES)
def test_the_chain_comes_as_the_server_has_it(engine: str) -> None:
    probe = CertificateProbe(SERVER, "gateway.test", ("h3",), START)
    talk(probe, make_engine(engine, server_config()))
    assert list(probe.chain) == x509.load_pem_x509_certificates(certificates().chain_pem)
    assert not probe.failure


@pytest.mark.parametrize("engine", ENGINES)
def test_a_name_that_the_certificate_lacks_does_not_hide_it(engine: str) -> None:
    probe = CertificateProbe(SERVER, "other.example", ("h3",), START)
    talk(probe, make_engine(engine, server_config()))
    assert probe.chain


@pytest.mark.parametrize("engine", ENGINES)
def test_the_chain_comes_in_the_smallest_packets(engine: str) -> None:
    probe = CertificateProbe(SERVER, "gateway.test", ("h3",), START)
    server = make_engine(engine, server_config(initial_packet_bytes=1400))
    sizes = talk(probe, server, largest=SMALLEST_PACKET_BYTES)
    assert probe.chain
    assert max(sizes) == SMALLEST_PACKET_BYTES


@pytest.mark.parametrize("engine", ENGINES)
def test_a_server_that_speaks_another_protocol_is_told_by_its_reason(engine: str) -> None:
    probe = CertificateProbe(SERVER, "gateway.test", ("other",), START)
    talk(probe, make_engine(engine, server_config()))
    assert not probe.chain
    assert probe.failure


def test_nothing_is_sent_but_the_handshake() -> None:
    probe = CertificateProbe(SERVER, "gateway.test", ("h3",), START)
    talk(probe, make_engine("aioquic", server_config()))
    probe.close(START + 1)
    server_sees = b"".join(probe.poll_transmits(START + 1))
    assert len(server_sees) <= SMALLEST_PACKET_BYTES


def test_a_silent_server_is_waited_for_by_the_callers_clock() -> None:
    probe = CertificateProbe(SERVER, "gateway.test", ("h3",), START)
    assert probe.poll_transmits(START)
    due = probe.next_timeout()
    assert due is not None
    probe.handle_timeout(due)
    assert probe.poll_transmits(due)
    assert not probe.is_over
