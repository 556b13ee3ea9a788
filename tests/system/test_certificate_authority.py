"""Certificates that OpenSSL, Python and both QUIC engines (webpki, aioquic) accept."""

from __future__ import annotations

import base64
import datetime
import functools
import ipaddress
import shutil
import ssl
import subprocess
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID

from tests.quic.link import attempt, client_config, server_config
from toppy.model.key_type import KeyType
from toppy.system.certificate_authority import (
    CA_DAYS,
    CLIENT_DAYS,
    SERVER_DAYS,
    KeyPair,
    issue_client_certificate,
    issue_self_signed,
    issue_server_certificate,
    load_ca,
    make_ca,
)
from toppy.system.certificate_files import names_of

NAMES = ("localhost", "gw.example", "*.wild.example", "127.0.0.1", "::1")
ENGINES = ["aioquic", "native"]


@functools.cache
def authority() -> KeyPair:
    return make_ca()


@functools.cache
def server() -> KeyPair:
    return issue_server_certificate(authority(), NAMES)


def test_the_authority_may_sign_end_certificates_only() -> None:
    extensions = authority().certificate.extensions
    constraints = extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical
    assert constraints.value == x509.BasicConstraints(ca=True, path_length=0)
    usage = extensions.get_extension_for_class(x509.KeyUsage)
    assert usage.critical
    assert usage.value.key_cert_sign
    assert not usage.value.digital_signature


def test_the_server_certificate_may_serve_and_not_sign_others() -> None:
    extensions = server().certificate.extensions
    assert not extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    usage = extensions.get_extension_for_class(x509.KeyUsage).value
    assert usage.digital_signature
    assert not usage.key_cert_sign
    extended = extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(extended) == [ExtendedKeyUsageOID.SERVER_AUTH]


def test_the_server_certificate_names_its_authoritys_key() -> None:
    wanted = authority().certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
    found = server().certificate.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier)
    assert found.value.key_identifier == wanted.value.digest
    server().certificate.verify_directly_issued_by(authority().certificate)


def test_names_are_names_and_addresses_are_addresses() -> None:
    san = server().certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert san.value.get_values_for_type(x509.DNSName) == list(NAMES[:3])
    assert san.value.get_values_for_type(x509.IPAddress) == [
        ipaddress.ip_address(address) for address in NAMES[3:]
    ]
    assert names_of(server().certificate_pem) == NAMES


def test_names_of_a_certificate_without_any_are_none() -> None:
    assert names_of(authority().certificate_pem) == ()


@pytest.mark.parametrize("text", [b"", b"nonsense", b"-----BEGIN CERTIFICATE-----\nAAAA\n"])
def test_names_of_what_is_no_certificate_are_a_value_error(text: bytes) -> None:
    with pytest.raises(ValueError):
        names_of(text)


@pytest.mark.parametrize(("pair", "days"), [(authority, CA_DAYS), (server, SERVER_DAYS)])
def test_validity_began_a_little_ago_and_ends_after_its_days(
    pair: functools._lru_cache_wrapper[KeyPair], days: int
) -> None:
    certificate = pair().certificate
    lasts = certificate.not_valid_after_utc - certificate.not_valid_before_utc
    assert datetime.timedelta(days=days) < lasts < datetime.timedelta(days=days, hours=2)


def test_two_certificates_have_different_keys_and_serial_numbers() -> None:
    other = issue_server_certificate(authority(), NAMES)
    assert other.certificate.serial_number != server().certificate.serial_number
    assert other.key_pem != server().key_pem


def test_the_key_is_pkcs8_on_p256_and_fits() -> None:
    assert server().key_pem.startswith(b"-----BEGIN PRIVATE KEY-----")
    key = load_pem_private_key(server().key_pem, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert isinstance(key.curve, ec.SECP256R1)
    assert key.public_key() == server().certificate.public_key()


def test_the_key_is_not_in_repr() -> None:
    assert "PRIVATE" not in repr(server())
    assert "key=" not in repr(server())


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
@pytest.mark.parametrize(
    ("name", "is_accepted"),
    [
        (["-verify_hostname", "gw.example"], True),
        (["-verify_hostname", "a.wild.example"], True),
        (["-verify_ip", "127.0.0.1"], True),
        (["-verify_ip", "::1"], True),
        (["-verify_hostname", "other.example"], False),
        (["-verify_ip", "127.0.0.2"], False),
    ],
)
def test_openssl_in_strict_mode_agrees(tmp_path: Path, name: list[str], is_accepted: bool) -> None:
    (tmp_path / "ca.pem").write_bytes(authority().certificate_pem)
    (tmp_path / "server.pem").write_bytes(server().certificate_pem)
    files = ["-CAfile", str(tmp_path / "ca.pem"), str(tmp_path / "server.pem")]
    ran = subprocess.run(
        ["openssl", "verify", "-x509_strict", "-purpose", "sslserver", *name, *files],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert (ran.returncode == 0) == is_accepted, ran.stderr


def shake_hands(tmp_path: Path, name: str, root: KeyPair, leaf: KeyPair) -> None:
    """TLS in memory between Python's own client and server."""
    (tmp_path / "chain.pem").write_bytes(leaf.certificate_pem + leaf.key_pem)
    at_server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    at_server.load_cert_chain(tmp_path / "chain.pem")
    at_client = ssl.create_default_context(cadata=root.certificate_pem.decode())
    at_client.verify_flags |= ssl.VERIFY_X509_STRICT
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        at_client.wrap_bio(to_client, to_server, server_hostname=name),
        at_server.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(4):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    assert ends[0].version() is not None


@pytest.mark.parametrize("name", ["localhost", "gw.example", "127.0.0.1", "::1"])
def test_python_in_strict_mode_accepts_it(tmp_path: Path, name: str) -> None:
    shake_hands(tmp_path, name, authority(), server())


def test_python_refuses_another_name_and_another_root(tmp_path: Path) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        shake_hands(tmp_path, "other.example", authority(), server())
    with pytest.raises(ssl.SSLCertVerificationError, match="verify failed"):
        shake_hands(tmp_path, "localhost", make_ca(), server())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["localhost", "gw.example", "127.0.0.1", "::1"])
def test_the_engines_accept_it(engine: str, name: str) -> None:
    link, client, gateway = attempt(
        (engine, engine),
        client=client_config(ca_certificates_pem=authority().certificate_pem),
        server=server_config(
            certificate_chain_pem=server().certificate_pem, private_key_pem=server().key_pem
        ),
        server_name=name,
    )
    link.run_until(lambda: client.is_ready and gateway.is_ready)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_client_that_pins_a_self_signed_certificate_is_served(engine: str) -> None:
    made = issue_self_signed(("localhost", "127.0.0.1", "::1"))
    link, client, gateway = attempt(
        (engine, engine),
        client=client_config(ca_certificates_pem=made.certificate_pem),
        server=server_config(
            certificate_chain_pem=made.certificate_pem, private_key_pem=made.key_pem
        ),
        server_name="localhost",
    )
    link.run_until(lambda: client.is_ready and gateway.is_ready)


@pytest.mark.parametrize("key_type", list(KeyType))
def test_every_kind_of_key_can_be_had_encrypted_and_signs_again(key_type: KeyType) -> None:
    ca = make_ca("kept", key_type=key_type, days=10)
    assert b"BEGIN ENCRYPTED PRIVATE KEY" in ca.encrypted_key_pem(b"correct horse")
    again = load_ca(ca.certificate_pem, ca.encrypted_key_pem(b"correct horse"), b"correct horse")
    leaf = issue_server_certificate(again, ["gw.example"], key_type=KeyType.ECDSA_P384, days=5)
    leaf.certificate.verify_directly_issued_by(ca.certificate)


def test_a_client_certificate_is_for_clients_and_named() -> None:
    made = issue_client_certificate(authority(), "alice")
    extended = made.certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(extended) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert made.certificate.subject.rfc4514_string() == "CN=alice"
    assert names_of(made.certificate_pem) == ("alice",)
    lasts = made.certificate.not_valid_after_utc - made.certificate.not_valid_before_utc
    assert lasts.days == CLIENT_DAYS


def test_a_mail_address_is_one_in_the_certificate() -> None:
    made = issue_client_certificate(authority(), "alice@example.com")
    san = made.certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert san.value.get_values_for_type(x509.RFC822Name) == ["alice@example.com"]


def test_no_certificate_outlives_its_authority() -> None:
    ca = make_ca(days=100)
    with pytest.raises(ValueError, match="use --days 99 or less"):
        issue_server_certificate(ca, ["localhost"])
    issue_server_certificate(ca, ["localhost"], days=99)
    with pytest.raises(ValueError, match="make a new one: toppy-gw cert ca"):
        issue_client_certificate(make_ca(days=0), "alice")


def test_what_is_no_authority_is_refused_with_the_reason() -> None:
    ca, leaf = make_ca(), issue_self_signed(["localhost"])
    for certificate, key, passphrase, reason in (
        (b"nonsense", ca.key_pem, None, "no PEM certificate"),
        (ca.certificate_pem, b"nonsense", None, "no PEM private key"),
        (ca.certificate_pem, leaf.key_pem, None, "not that of the CA's"),
        (leaf.certificate_pem, leaf.key_pem, None, "may not sign others"),
        (ca.certificate_pem, ca.encrypted_key_pem(b"horse"), None, "is encrypted"),
        (ca.certificate_pem, ca.encrypted_key_pem(b"horse"), b"donkey", "passphrase is wrong"),
    ):
        with pytest.raises(ValueError, match=reason):
            load_ca(certificate, key, passphrase)


def test_an_authority_of_another_tool_that_does_not_name_its_key_can_sign() -> None:
    own = make_ca()
    subject = own.certificate.subject
    plain = (
        x509.CertificateBuilder(subject, subject, own.key.public_key(), 7)
        .not_valid_before(own.certificate.not_valid_before_utc)
        .not_valid_after(own.certificate.not_valid_after_utc)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(own.key, hashes.SHA256())
    )
    ca = load_ca(plain.public_bytes(Encoding.PEM), own.key_pem)
    made = issue_server_certificate(ca, ["localhost"]).certificate
    made.verify_directly_issued_by(plain)
    named = made.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value
    key_id = x509.SubjectKeyIdentifier.from_public_key(own.key.public_key())
    assert named.key_identifier == key_id.digest


def test_a_certificate_whose_key_nobody_here_knows_is_no_authority() -> None:
    ca = make_ca()
    der = ca.certificate.public_bytes(Encoding.DER)
    # the OID of P-256, made another one
    other = der.replace(bytes.fromhex("2a8648ce3d030107"), bytes.fromhex("2a8648ce3d03017f"))
    body = base64.encodebytes(other)
    pem = b"-----BEGIN CERTIFICATE-----\n" + body + b"-----END CERTIFICATE-----\n"
    with pytest.raises(ValueError, match="not that of the CA's"):
        load_ca(pem, ca.key_pem)
