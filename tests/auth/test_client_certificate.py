"""Who a client's certificate says that it is, and whether it counts."""

from __future__ import annotations

from datetime import timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st

from tests.system.certificate_samples import NOW, authority, sample
from toppy.auth.authenticator import Authenticator
from toppy.auth.bearer import StaticToken
from toppy.auth.certificate_chain import MAX_CHAIN, find_chain, fingerprint
from toppy.auth.client_certificate import (
    CertificateTrust,
    parse_client_certificate,
    subject_of,
)
from toppy.auth.jwt import AuthenticationError, JwtVerifier
from toppy.model.client_certificate import ClientCertificate
from toppy.system.certificate_authority import KeyPair, make_ca

UNIX_NOW = NOW.timestamp()
TRUST = CertificateTrust(frozenset({fingerprint(authority().certificate)}))
REQUIRED = CertificateTrust(TRUST.authorities, is_required=True)
SECRET = "a secret of some length, for tests"


def der(*pairs: KeyPair) -> list[bytes]:
    return [pair.certificate.public_bytes(Encoding.DER) for pair in pairs]


def alice(**changes: object) -> ClientCertificate:
    fields: dict[str, object] = {
        "common_name": "Alice",
        "names": ("alice.example", "alice@example.com"),
        "fingerprint": "ab" * 32,
        "authority": fingerprint(authority().certificate),
        "not_after": UNIX_NOW + 100,
    }
    return ClientCertificate(**{**fields, **changes})  # type: ignore[arg-type]


class TestParsing:
    def test_a_verified_chain_says_who_until_when_and_by_whom(self) -> None:
        names = ("Alice.Example", "alice@example.com", "spiffe://example/alice")
        pair = sample(names=names, usages=("client",), common_name="Alice", end_days=9)
        found = parse_client_certificate(der(pair), [authority().certificate])
        assert found == ClientCertificate(
            common_name="Alice",
            names=("alice.example", "alice@example.com", "spiffe://example/alice"),
            fingerprint=fingerprint(pair.certificate),
            authority=fingerprint(authority().certificate),
            not_after=UNIX_NOW + 9 * 86_400,
        )

    def test_it_ends_when_the_first_of_its_chain_does(self) -> None:
        middle = sample(is_ca=True, usages=(), end_days=3)
        pair = sample(ca=middle, end_days=9)
        found = parse_client_certificate(der(pair, middle), [authority().certificate])
        assert found is not None
        assert found.not_after == UNIX_NOW + 3 * 86_400

    def test_nothing_is_nobody(self) -> None:
        assert parse_client_certificate([], [authority().certificate]) is None

    def test_what_leads_to_no_authority_is_nobody(self) -> None:
        other = make_ca("other")
        assert parse_client_certificate(der(sample(ca=other)), [authority().certificate]) is None
        # bringing the right authority along does not help
        brought = der(sample(ca=other), authority())
        assert parse_client_certificate(brought, [authority().certificate]) is None

    def test_a_name_that_no_line_can_hold_is_left_out(self) -> None:
        pair = sample(names=(), common_name="alice\nadmin")
        found = parse_client_certificate(der(pair), [authority().certificate])
        assert found is not None
        assert found.common_name == ""
        assert found.names == ()

    @given(st.lists(st.binary(max_size=100), max_size=3))
    def test_any_bytes_are_nobody(self, chain: list[bytes]) -> None:
        assert parse_client_certificate(chain, [authority().certificate]) is None

    # a serial number of zero is read, with a warning
    @pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")
    @given(st.integers(0, 1000), st.integers(1, 255))
    def test_a_changed_certificate_is_nobody(self, place: int, bits: int) -> None:
        data = bytearray(der(ALICE)[0])
        data[place % len(data)] ^= bits
        found = parse_client_certificate([bytes(data)], [authority().certificate])
        # what the signature does not cover, such as its own encoding, may differ
        assert found is None or found.names == ("gw.example",)


ALICE = sample()


class TestChain:
    def test_a_certificate_that_is_trusted_itself_is_a_chain(self) -> None:
        leaf = sample().certificate
        assert find_chain(leaf, [], [leaf]) == [leaf]

    def test_one_that_may_not_sign_ends_the_way(self) -> None:
        middle = sample()
        leaf = sample(ca=middle).certificate
        assert find_chain(leaf, [middle.certificate], [authority().certificate]) is None

    def test_certificates_that_sign_each_other_come_to_an_end(self) -> None:
        first = sample(is_ca=True, common_name="one", ca=make_ca("nobody's"))
        second = sample(is_ca=True, common_name="two", ca=first)
        others = [first.certificate, second.certificate]
        leaf = sample(ca=second).certificate
        assert find_chain(leaf, others, [authority().certificate]) is None

    def test_a_chain_has_a_longest_length(self) -> None:
        pairs = [authority()]
        for _ in range(MAX_CHAIN + 1):
            pairs.append(sample(is_ca=True, usages=(), ca=pairs[-1]))
        leaf = sample(ca=pairs[-1]).certificate
        presented = [pair.certificate for pair in pairs[1:]]
        assert find_chain(leaf, presented, [authority().certificate]) is None
        short = find_chain(pairs[4].certificate, presented, [authority().certificate])
        assert short is not None
        assert len(short) == 5

    def test_of_a_renewed_authority_the_certificate_that_ends_last_counts(self) -> None:
        key = authority().key
        ends = (NOW + timedelta(days=days) for days in (1, 900, 30))
        renewed = [
            x509.CertificateBuilder(
                authority().certificate.subject,
                authority().certificate.subject,
                key.public_key(),
                number,
                authority().certificate.not_valid_before_utc,
                end,
            )
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(key, hashes.SHA256())
            for number, end in enumerate(ends, 1)
        ]
        assert find_chain(ALICE.certificate, [], renewed) == [ALICE.certificate, renewed[1]]


class TestAuthentication:
    def authenticator(self, trust: CertificateTrust, **changes: object) -> Authenticator:
        given: dict[str, object] = {"static_token": StaticToken("the-token"), "trust": trust}
        return Authenticator(**{**given, **changes})  # type: ignore[arg-type]

    def test_a_certificate_alone_is_a_subject_where_that_is_wanted(self) -> None:
        accepting = self.authenticator(TRUST, certificate_name="san")
        who = accepting.authenticate(None, UNIX_NOW, alice())
        assert who.identity.subject == "cert:alice.example"
        assert who.identity.method == "certificate"
        assert who.expires_at == UNIX_NOW + 100

    def test_the_common_name_is_the_subject_where_that_is_wanted(self) -> None:
        accepting = self.authenticator(TRUST, certificate_name="common_name")
        assert accepting.authenticate(None, UNIX_NOW, alice()).identity.subject == "cert:Alice"
        assert subject_of(alice(), "common_name") == "cert:Alice"

    def test_a_certificate_without_the_name_is_nobody(self) -> None:
        accepting = self.authenticator(TRUST, certificate_name="san")
        with pytest.raises(AuthenticationError, match="no name"):
            accepting.authenticate(None, UNIX_NOW, alice(names=()))

    def test_a_certificate_alone_is_not_enough_otherwise(self) -> None:
        with pytest.raises(AuthenticationError, match="bearer token is required"):
            self.authenticator(TRUST).authenticate(None, UNIX_NOW, alice())

    def test_a_token_says_who_it_is_even_beside_a_certificate(self) -> None:
        accepting = self.authenticator(TRUST, certificate_name="san")
        who = accepting.authenticate("Bearer the-token", UNIX_NOW, alice())
        assert who.identity.subject == "token"
        assert who.expires_at is None

    def test_a_wrong_token_is_refused_even_beside_a_certificate(self) -> None:
        accepting = self.authenticator(TRUST, certificate_name="san")
        with pytest.raises(AuthenticationError, match="wrong"):
            accepting.authenticate("Bearer another", UNIX_NOW, alice())

    def test_where_one_is_required_a_token_is_not_enough(self) -> None:
        strict = self.authenticator(REQUIRED)
        with pytest.raises(AuthenticationError, match="client certificate is required"):
            strict.authenticate("Bearer the-token", UNIX_NOW)
        who = strict.authenticate("Bearer the-token", UNIX_NOW, alice())
        assert who.identity.subject == "token"
        assert who.expires_at == UNIX_NOW + 100

    @pytest.mark.parametrize("changes", [{"not_after": UNIX_NOW}, {"authority": "cd" * 32}])
    def test_one_that_ended_or_whose_ca_went_counts_no_more(
        self, changes: dict[str, object]
    ) -> None:
        accepting = self.authenticator(TRUST, certificate_name="san")
        with pytest.raises(AuthenticationError):
            accepting.authenticate(None, UNIX_NOW, alice(**changes))
        with pytest.raises(AuthenticationError, match="expired, or its CA"):
            self.authenticator(REQUIRED).authenticate(
                "Bearer the-token", UNIX_NOW, alice(**changes)
            )

    def test_other_trust_takes_the_place_of_the_first(self) -> None:
        before = self.authenticator(CertificateTrust(), certificate_name="san")
        assert before.trusting(TRUST).authenticate(None, UNIX_NOW, alice()).identity.subject
        with pytest.raises(AuthenticationError):
            before.authenticate(None, UNIX_NOW, alice())

    def test_no_token_can_pretend_to_be_a_certificate(self) -> None:
        import jwt

        token = jwt.encode({"sub": "cert:alice.example", "exp": UNIX_NOW + 50}, SECRET, "HS256")
        both = self.authenticator(TRUST, certificate_name="san", jwt=JwtVerifier(secret=SECRET))
        with pytest.raises(AuthenticationError, match="must not begin with cert:"):
            both.authenticate(f"Bearer {token}", UNIX_NOW, None)

    def test_certificates_as_credentials_close_what_was_open(self) -> None:
        accepting = Authenticator(is_open=True, trust=TRUST, certificate_name="san")
        with pytest.raises(AuthenticationError):
            accepting.authenticate(None, UNIX_NOW)
