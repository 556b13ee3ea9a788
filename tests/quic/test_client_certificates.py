"""Client certificates and cipher suites, on every pair of engines, in virtual time."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from tests.quic.certificates import certificates
from tests.quic.link import (
    SERVER,
    End,
    Link,
    attempt,
    client_config,
    connect_pair,
    make_engine,
    server_config,
)
from toppy.config.tls import CIPHER_SUITES
from toppy.model.key_type import KeyType
from toppy.quic.engine import ConnectionClosed, EngineConfig, HandshakeCompleted
from toppy.system.certificate_authority import (
    KeyPair,
    issue_client_certificate,
    issue_server_certificate,
    make_ca,
)

CERTIFICATE_REQUIRED = 0x100 + 116


@functools.cache
def authority() -> KeyPair:
    return make_ca("CA of clients")


@functools.cache
def other_authority() -> KeyPair:
    return make_ca("CA of others")


@functools.cache
def alice(key_type: KeyType = KeyType.ECDSA_P256) -> KeyPair:
    return issue_client_certificate(authority(), "alice", key_type=key_type)


def asking(*, required: bool = True, **changes: Any) -> EngineConfig:
    return server_config(
        client_ca_pem=authority().certificate_pem, requires_client_certificate=required, **changes
    )


def showing(pair: KeyPair, *chain: KeyPair, **changes: Any) -> EngineConfig:
    pem = b"".join(each.certificate_pem for each in (pair, *chain))
    return client_config(certificate_chain_pem=pem, private_key_pem=pair.key_pem, **changes)


def der(pair: KeyPair) -> bytes:
    return pair.certificate.public_bytes(Encoding.DER)


def signed(
    ca: KeyPair, builder: x509.CertificateBuilder, key: ec.EllipticCurvePrivateKey
) -> KeyPair:
    return KeyPair(builder.sign(ca.key, hashes.SHA256()), key)


def expired() -> KeyPair:
    """As alice's, but over."""
    mine = alice().certificate
    key = ec.generate_private_key(ec.SECP256R1())
    day = mine.not_valid_before_utc.replace(year=2020)
    builder = (
        x509.CertificateBuilder()
        .subject_name(mine.subject)
        .issuer_name(mine.issuer)
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(day)
        .not_valid_after(day.replace(year=2021))
    )
    for extension in mine.extensions:
        if not isinstance(extension.value, x509.SubjectKeyIdentifier):
            builder = builder.add_extension(extension.value, extension.critical)
    return signed(authority(), builder, key)


def refused(
    engines: tuple[str, str], client: EngineConfig, server: EngineConfig
) -> tuple[End, End]:
    """Both ends of a connection that the server does not let come about."""
    link, at_client, at_server = attempt(engines, client=client, server=server)
    link.run_until(lambda: at_client.closed and at_server.closed)
    assert not at_server.is_ready
    return at_client, at_server


class TestCertificates:
    @pytest.mark.parametrize("required", [True, False])
    def test_the_server_learns_the_chain_that_the_client_shows(
        self, engines: tuple[str, str], required: bool
    ) -> None:
        pair = connect_pair(*engines, client=showing(alice()), server=asking(required=required))
        assert pair.server.engine.peer_certificates(pair.accepted) == (der(alice()),)

    @pytest.mark.parametrize("key_type", list(KeyType))
    def test_every_kind_of_key_serves_on_both_ends(
        self, engines: tuple[str, str], key_type: KeyType
    ) -> None:
        ca = make_ca("CA of servers")
        server = issue_server_certificate(ca, ["gateway.test"], key_type=key_type)
        pair = connect_pair(
            *engines,
            client=showing(alice(key_type), ca_certificates_pem=ca.certificate_pem),
            server=asking(
                certificate_chain_pem=server.certificate_pem, private_key_pem=server.key_pem
            ),
        )
        assert pair.server.engine.peer_certificates(pair.accepted) == (der(alice(key_type)),)

    def test_the_client_knows_the_servers_chain(self, engines: tuple[str, str]) -> None:
        pair = connect_pair(*engines)
        chain = x509.load_pem_x509_certificates(certificates().chain_pem)
        shown = pair.client.engine.peer_certificates(pair.connection)
        assert shown == tuple(each.public_bytes(Encoding.DER) for each in chain)

    def test_a_client_without_one_is_let_in_where_it_is_optional(
        self, engines: tuple[str, str]
    ) -> None:
        pair = connect_pair(*engines, server=asking(required=False))
        assert pair.server.engine.peer_certificates(pair.accepted) == ()

    def test_a_client_without_one_is_told_that_it_is_required(
        self, engines: tuple[str, str]
    ) -> None:
        client, server = refused(engines, client_config(), asking())
        assert client.closed is not None
        assert client.closed.by_peer
        assert client.closed.error_code == CERTIFICATE_REQUIRED
        assert "asks for a client certificate" in client.closed.reason
        assert server.closed is not None
        assert not server.closed.by_peer

    @pytest.mark.parametrize("required", [True, False])
    def test_one_of_another_authority_is_refused(
        self, engines: tuple[str, str], required: bool
    ) -> None:
        mallory = issue_client_certificate(other_authority(), "alice")
        client, _ = refused(engines, showing(mallory), asking(required=required))
        assert client.closed is not None
        assert client.closed.by_peer
        assert "certificate" in client.closed.reason

    def test_one_of_another_authority_that_brings_the_right_one_is_refused(
        self, engines: tuple[str, str]
    ) -> None:
        mallory = issue_client_certificate(other_authority(), "alice")
        refused(engines, showing(mallory, authority()), asking())

    def test_an_expired_one_is_refused(self, engines: tuple[str, str]) -> None:
        client, _ = refused(engines, showing(expired()), asking())
        assert client.closed is not None
        assert "certificate" in client.closed.reason

    def test_one_for_servers_is_refused(self, engines: tuple[str, str]) -> None:
        refused(engines, showing(issue_server_certificate(authority(), ["alice"])), asking())

    def test_the_authoritys_own_is_refused(self, engines: tuple[str, str]) -> None:
        refused(engines, showing(authority()), asking())

    def test_one_that_nobody_asks_for_is_not_shown(self, engines: tuple[str, str]) -> None:
        pair = connect_pair(*engines, client=showing(alice()))
        assert pair.server.engine.peer_certificates(pair.accepted) == ()

    def test_nothing_is_known_of_a_connection_that_is_not_there(self, server_engine: str) -> None:
        assert make_engine(server_engine, asking()).peer_certificates(17) == ()

    def test_an_authority_that_cannot_be_read_is_named(self, server_engine: str) -> None:
        with pytest.raises(ValueError, match="client_ca_pem"):
            make_engine(server_engine, server_config(client_ca_pem=b"nonsense"))


def again(link: Link, client: End, server: End) -> int:
    """Connect once more with the same client's engine; the server's number for it."""
    count = len(server.of(HandshakeCompleted))
    client.engine.connect(SERVER, "gateway.test", link.now)
    link.run_until(lambda: len(server.of(HandshakeCompleted)) > count)
    return server.of(HandshakeCompleted)[-1].connection


class TestResumption:
    def test_a_resumed_session_keeps_its_certificate(self) -> None:
        pair = connect_pair("native", "native", client=showing(alice()), server=asking())
        pair.link.run_for(1)
        before = sum(len(data) for *_, data in pair.link.packets)
        connection = again(pair.link, pair.client, pair.server)
        assert pair.server.engine.peer_certificates(connection) == (der(alice()),)
        # it was resumed: two certificates and signatures less
        assert sum(len(data) for *_, data in pair.link.packets) - before < before

    @pytest.mark.parametrize("required", [True, False])
    def test_a_session_ends_with_the_authority_that_let_it_begin(self, required: bool) -> None:
        pair = connect_pair("native", "native", client=showing(alice()), server=asking())
        pair.link.run_for(1)
        other = server_config(
            client_ca_pem=other_authority().certificate_pem, requires_client_certificate=required
        )
        pair.link.attach(make_engine("native", other, now=pair.link.now), SERVER)
        pair.client.events.clear()
        pair.client.engine.connect(SERVER, "gateway.test", pair.link.now)
        pair.link.run_until(
            lambda: any(
                isinstance(event, ConnectionClosed) and "certificate" in event.reason
                for event in pair.client.events
            )
        )


class TestCipherSuites:
    @pytest.mark.parametrize("suite", CIPHER_SUITES)
    def test_each_alone_serves(self, engines: tuple[str, str], suite: str) -> None:
        connect_pair(*engines, server=server_config(cipher_suites=(suite,)))

    def test_two_ends_without_one_in_common_do_not_meet(self, engines: tuple[str, str]) -> None:
        client, _ = refused(
            engines,
            client_config(cipher_suites=("TLS_AES_128_GCM_SHA256",)),
            server_config(cipher_suites=("TLS_AES_256_GCM_SHA384",)),
        )
        assert client.closed is not None
        assert client.closed.by_peer

    def test_one_of_tls_12_is_refused(self, server_engine: str) -> None:
        suite = "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256"
        with pytest.raises(ValueError, match="cipher_suites"):
            make_engine(server_engine, server_config(cipher_suites=(suite,)))

    def test_a_session_without_a_certificate_ends_where_one_becomes_required(self) -> None:
        pair = connect_pair(
            "native", "native", client=client_config(), server=asking(required=False)
        )
        pair.link.run_for(1)
        pair.link.attach(make_engine("native", asking(), now=pair.link.now), SERVER)
        pair.client.events.clear()
        pair.client.engine.connect(SERVER, "gateway.test", pair.link.now)
        pair.link.run_until(
            lambda: any(
                isinstance(event, ConnectionClosed) and "certificate" in event.reason
                for event in pair.client.events
            )
        )
