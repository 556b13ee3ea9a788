"""Certificates and keys as files have them."""

from __future__ import annotations

from base64 import encodebytes

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from hypothesis import given
from hypothesis import strategies as st

from tests.system.certificate_samples import NOW, authority, sample, weak_key
from toppy.system.certificate_authority import issue_server_certificate
from toppy.system.certificate_check import check_certificate
from toppy.system.certificate_files import (
    check_pair,
    days_left,
    describe_certificate,
    end_of,
    is_encrypted,
    is_for,
    names_of,
    parse_certificates,
    parse_private_key,
    plain_key_pem,
)

UNIX_NOW = NOW.timestamp()
LABELS = st.text("abc-0", min_size=1, max_size=5)


def test_a_pair_that_fits_passes() -> None:
    pair = sample()
    check_pair(pair.certificate_pem + authority().certificate_pem, pair.key_pem, now=UNIX_NOW)
    encrypted = pair.encrypted_key_pem(b"correct horse")
    check_pair(pair.certificate_pem, encrypted, now=UNIX_NOW, passphrase=b"correct horse")


def test_every_other_pair_is_refused_with_the_reason() -> None:
    pair, other = sample(), sample()
    for certificate, key, reason in (
        (pair.certificate_pem, other.key_pem, "not the certificate's"),
        (b"nonsense", pair.key_pem, "no PEM certificate"),
        (pair.key_pem, pair.certificate_pem, "files swapped"),
        (pair.certificate_pem, b"nonsense", "no PEM private key"),
        (pair.certificate_pem, pair.certificate_pem, "no PEM private key"),
        (pair.certificate_pem, pair.encrypted_key_pem(b"horse"), "no passphrase is given"),
    ):
        with pytest.raises(ValueError, match=reason):
            check_pair(certificate, key, now=UNIX_NOW)


@pytest.mark.parametrize(
    ("begin_days", "end_days", "reason"),
    [(-10, -1, "expired on"), (1, 10, "not valid before"), (-10, 0, "expired on")],
)
def test_a_certificate_out_of_its_time_is_refused_with_the_day(
    begin_days: float, end_days: float, reason: str
) -> None:
    pair = sample(begin_days=begin_days, end_days=end_days)
    with pytest.raises(ValueError, match=reason):
        check_pair(pair.certificate_pem, pair.key_pem, now=UNIX_NOW)


def test_a_key_that_an_engine_does_not_take_is_refused() -> None:
    for key, reason in (
        (weak_key(), "1024 bits"),
        (ec.generate_private_key(ec.SECP521R1()), "521"),
    ):
        pair = sample(key=key)
        with pytest.raises(ValueError, match=reason):
            check_pair(pair.certificate_pem, pair.key_pem, now=UNIX_NOW)


def test_an_encrypted_key_opens_with_its_passphrase_alone() -> None:
    encrypted = sample().encrypted_key_pem(b"correct horse")
    assert is_encrypted(encrypted)
    plain = plain_key_pem(encrypted, b"correct horse")
    assert not is_encrypted(plain)
    load_pem_private_key(plain, None)
    with pytest.raises(ValueError, match="passphrase is wrong") as wrong:
        parse_private_key(encrypted, b"a wrong one")
    assert "a wrong one" not in str(wrong.value)
    with pytest.raises(ValueError, match="not encrypted, but a passphrase"):
        parse_private_key(plain, b"correct horse")


@pytest.mark.parametrize(
    ("end_days", "left"), [(0.5, 0), (1, 1), (29.9, 29), (30, 30), (-0.5, -1), (-3, -3)]
)
def test_days_left_are_whole_days(end_days: float, left: int) -> None:
    certificate = sample(begin_days=-9, end_days=end_days).certificate
    assert days_left(certificate, UNIX_NOW) == left
    assert end_of(sample(end_days=7).certificate_pem) == UNIX_NOW + 7 * 86400


def test_a_description_has_what_a_person_asks_for() -> None:
    pair = sample(names=("gw.example", "ops@example.com"), usages=("server", "client"))
    facts = describe_certificate(pair.certificate)
    assert facts.subject == "CN=sample"
    assert facts.issuer == "CN=sample CA"
    assert facts.names == ("gw.example", "ops@example.com")
    assert facts.usages == ("server", "client")
    assert facts.key_type == "ECDSA P-256"
    assert len(facts.sha256) == 64
    assert not facts.is_ca
    assert not facts.is_self_signed
    root = describe_certificate(authority().certificate)
    assert root.is_ca
    assert root.is_self_signed


def test_names_of_a_certificate_without_any_are_none() -> None:
    assert names_of(authority().certificate_pem) == ()


@pytest.mark.parametrize("text", [b"", b"nonsense", b"-----BEGIN CERTIFICATE-----\nAAAA\n"])
def test_names_of_what_is_no_certificate_are_a_value_error(text: bytes) -> None:
    with pytest.raises(ValueError, match="certificate"):
        names_of(text)


@pytest.mark.parametrize(
    ("name", "is_good"),
    [
        ("gw.example", True),
        ("GW.Example.", True),
        ("a.wild.example", True),
        ("wild.example", False),
        ("a.b.wild.example", False),
        ("127.0.0.1", True),
        ("::1", True),
        ("0:0:0:0:0:0:0:1", True),
        ("127.0.0.2", False),
        ("example", False),
        ("", False),
    ],
)
def test_a_name_is_matched_as_clients_do(name: str, is_good: bool) -> None:
    names = ["gw.example", "*.wild.example", "127.0.0.1", "::1"]
    assert is_for(issue_server_certificate(authority(), names).certificate, name) == is_good


@given(LABELS, LABELS, LABELS)
def test_a_wildcard_is_one_label(first: str, second: str, third: str) -> None:
    certificate = WILDCARD.certificate
    assert is_for(certificate, f"{first}.wild.example")
    assert not is_for(certificate, f"{first}.{second}.wild.example")
    assert not is_for(certificate, f"{first}.{third}.example") or third == "wild"


WILDCARD = sample(names=("*.wild.example",))
GOOD = WILDCARD.certificate_pem


@given(st.binary(max_size=200) | st.binary(max_size=100).map(lambda tail: GOOD[:300] + tail))
def test_any_bytes_are_certificates_or_a_value_error(data: bytes) -> None:
    for parse in (parse_certificates, names_of, parse_private_key):
        try:
            parse(data)
        except ValueError as error:
            assert str(error)


# a serial number of zero is read, with a warning
@pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")
@given(st.integers(0, 1000), st.integers(1, 255))
def test_a_changed_certificate_is_described_or_a_value_error(place: int, bits: int) -> None:
    data = bytearray(WILDCARD.certificate.public_bytes(Encoding.DER))
    data[place % len(data)] ^= bits
    pem = b"-----BEGIN CERTIFICATE-----\n%s-----END CERTIFICATE-----\n" % encodebytes(bytes(data))
    try:
        describe_certificate(parse_certificates(pem)[0])
    except ValueError as error:
        assert str(error)
    assert check_certificate(pem, now=UNIX_NOW, key_pem=WILDCARD.key_pem, ca_pem=GOOD)
