"""What a client says of a gateway's certificate that it does not accept; nothing goes through."""

from __future__ import annotations

import pytest

from tests.quic.link import attempt, client_config, server_config
from tests.system.certificate_samples import authority, sample
from toppy.quic.engine import ConnectionClosed
from toppy.system.certificate_authority import KeyPair, make_ca

NAME = "gateway.test"


def reason(engines: tuple[str, str], pair: KeyPair, *, name: str = NAME) -> str:
    """Why a client that trusts the samples' authority does not accept it."""
    link, client, server = attempt(
        engines,
        client=client_config(ca_certificates_pem=authority().certificate_pem),
        server=server_config(
            certificate_chain_pem=pair.certificate_pem, private_key_pem=pair.key_pem
        ),
        server_name=name,
    )
    link.run_until(lambda: client.closed and server.closed)
    assert not client.is_ready
    assert not server.is_ready
    (closed,) = client.of(ConnectionClosed)
    assert not closed.by_peer
    assert "certificate" in closed.reason
    return closed.reason


def test_a_good_one_is_accepted(engines: tuple[str, str]) -> None:
    pair = sample(names=(NAME,))
    link, client, server = attempt(
        engines,
        client=client_config(ca_certificates_pem=authority().certificate_pem),
        server=server_config(
            certificate_chain_pem=pair.certificate_pem, private_key_pem=pair.key_pem
        ),
    )
    link.run_until(lambda: client.is_ready and server.is_ready)


@pytest.mark.parametrize(
    ("begin_days", "end_days", "words"),
    [(-9, -1, ("expired", "no longer valid")), (1, 9, ("not valid yet",))],
    ids=["expired", "not-yet-valid"],
)
def test_one_out_of_its_time_is_said_to_be(
    engines: tuple[str, str], begin_days: int, end_days: int, words: tuple[str, ...]
) -> None:
    said = reason(engines, sample(names=(NAME,), begin_days=begin_days, end_days=end_days))
    assert any(word in said for word in words), said


def test_one_for_other_names_says_for_which(engines: tuple[str, str]) -> None:
    said = reason(engines, sample(names=("other.test", "more.test")))
    assert "other.test" in said
    assert "more.test" in said


def test_one_of_an_unknown_authority_is_said_to_be(engines: tuple[str, str]) -> None:
    said = reason(engines, sample(names=(NAME,), ca=make_ca("another")))
    assert "UnknownIssuer" in said or "unable to get local issuer certificate" in said


def test_one_of_an_authority_with_the_same_name_is_said_to_be(engines: tuple[str, str]) -> None:
    twin = make_ca("sample CA")
    said = reason(engines, sample(names=(NAME,), ca=twin))
    assert "signature" in said or "issuer" in said


def test_the_native_engine_refuses_one_for_clients(server_engine: str) -> None:
    reason(("native", server_engine), sample(names=(NAME,), usages=("client",)))
