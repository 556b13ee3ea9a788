"""What is found wrong with a certificate; each finding says what to do."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.system.certificate_samples import NOW, authority, sample, weak_key
from toppy.system.certificate_authority import KeyPair, make_ca
from toppy.system.certificate_check import Finding, check_certificate


def check(pair: KeyPair, **options: Any) -> dict[str, Finding]:
    given: dict[str, Any] = {
        "now": NOW.timestamp(),
        "key_pem": pair.key_pem,
        "ca_pem": authority().certificate_pem,
        "names": ["gw.example"],
    }
    found = check_certificate(pair.certificate_pem, **{**given, **options})
    assert all(bool(finding.remedy) == (finding.status != "pass") for finding in found)
    return {finding.id: finding for finding in found}


def failed(found: dict[str, Finding]) -> set[str]:
    return {finding.id for finding in found.values() if finding.status == "fail"}


def test_a_good_certificate_passes_every_check() -> None:
    found = check(sample())
    assert set(found) == {"file", "key", "dates", "strength", "usage", "names", "chain"}
    assert {finding.status for finding in found.values()} == {"pass"}


@pytest.mark.parametrize(
    ("days", "status"), [(31, "pass"), (29, "warn"), (0.5, "warn"), (-1, "fail")]
)
def test_one_that_ends_soon_is_a_warning_and_an_ended_one_a_failure(
    days: float, status: str
) -> None:
    assert check(sample(begin_days=-9, end_days=days))["dates"].status == status


def test_one_that_has_not_begun_asks_for_the_clock() -> None:
    found = check(sample(begin_days=2))
    assert failed(found) == {"dates"}
    assert "clock" in found["dates"].remedy


def test_another_key_a_broken_one_and_a_locked_one_are_told_apart() -> None:
    pair = sample()
    assert "not the certificate's" in check(pair, key_pem=sample().key_pem)["key"].summary
    assert "no PEM private key" in check(pair, key_pem=b"nonsense")["key"].summary
    locked = pair.encrypted_key_pem(b"correct horse")
    assert "--passphrase-file" in check(pair, key_pem=locked)["key"].remedy
    assert "wrong" in check(pair, key_pem=locked, passphrase=b"donkey")["key"].summary
    assert check(pair, key_pem=locked, passphrase=b"correct horse")["key"].status == "pass"


def test_a_weak_key_is_a_failure() -> None:
    assert failed(check(sample(key=weak_key()))) == {"strength"}


def test_a_wrong_name_says_which_names_it_has() -> None:
    found = check(sample(names=("a.example", "b.example")))
    assert failed(found) == {"names"}
    assert "a.example, b.example" in found["names"].summary


def test_a_common_name_is_no_name() -> None:
    assert "subjectAltName" in check(sample(names=()))["names"].summary


def test_another_ca_is_told_with_the_issuer() -> None:
    found = check(sample(), ca_pem=make_ca("another").certificate_pem)
    assert failed(found) == {"chain"}
    assert "CN=sample CA" in found["chain"].summary
    assert failed(check(sample(), ca_pem=b"nonsense")) == {"chain"}


def test_an_expired_ca_is_told() -> None:
    ended = sample(begin_days=-9, end_days=-1, is_ca=True, common_name="old", usages=())
    pair = sample(ca=ended)
    assert (
        "CN=old of the chain expired" in check(pair, ca_pem=ended.certificate_pem)["chain"].summary
    )


def test_a_chain_over_an_intermediate_is_followed_and_a_missing_one_is_told() -> None:
    middle = sample(is_ca=True, common_name="middle", usages=())
    pair = sample(ca=middle)
    whole = check_certificate(
        pair.certificate_pem + middle.certificate_pem,
        now=NOW.timestamp(),
        ca_pem=authority().certificate_pem,
    )
    assert all(finding.status == "pass" for finding in whole)
    assert "intermediate" in check(pair)["chain"].remedy


@pytest.mark.parametrize(
    ("usages", "purpose", "is_good"),
    [
        (("server",), "server", True),
        (("client",), "server", False),
        (("server", "client"), "client", True),
        (("any",), "client", False),
        ((), "client", True),
    ],
)
def test_the_usage_must_be_the_one_that_is_meant(
    usages: tuple[str, ...], purpose: str, is_good: bool
) -> None:
    found = check(sample(usages=usages), purpose=purpose)
    assert ("usage" in failed(found)) is not is_good


def test_a_ca_cannot_be_a_party() -> None:
    assert "usage" in failed(check(authority()))


def test_a_clients_certificate_has_no_host_names_to_check() -> None:
    assert "names" not in check(sample(usages=("client",)), purpose="client")


@given(st.binary(max_size=300))
def test_any_bytes_are_findings(data: bytes) -> None:
    (finding,) = check_certificate(data, now=0.0, key_pem=data, ca_pem=data)
    assert finding.status == "fail"
    pair = sample()
    found = check(pair, key_pem=data, ca_pem=data)
    assert {"key", "chain"} <= failed(found)
