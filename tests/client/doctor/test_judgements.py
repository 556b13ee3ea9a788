"""What evidence means: plain evidence in, checks out."""

from __future__ import annotations

import datetime

import pytest
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st

from tests.client.gateway import settings_for
from tests.quic.certificates import SERVER_NAME, certificates
from toppy import __version__
from toppy.client.doctor.credentials import (
    judge_certificate,
    judge_client_certificate,
    judge_token,
    unverified_claims,
)
from toppy.client.doctor.evidence import Evidence, TargetEvidence, Trouble
from toppy.client.doctor.gateway import (
    judge_clock,
    judge_handshake,
    judge_target,
    judge_tunnel,
    judge_version,
)
from toppy.client.doctor.host import days_and_hours
from toppy.client.doctor.path import (
    judge_dns,
    judge_latency,
    judge_mtu_down,
    judge_mtu_up,
    judge_nat,
    judge_udp,
)
from toppy.client.doctor.report import Check, Findings, Status
from toppy.client.path_probe import AddressFindings, TcpAnswer
from toppy.model.target import Target
from toppy.quic.engine import Address
from toppy.wire.gateway_facts import GatewayFacts

ADDRESS: Address = ("192.0.2.1", 4433)
SETTINGS = settings_for(ADDRESS)
NOW = 1_700_000_000.0
SILENCE = Trouble("no answer in time", is_timeout=True)
CHAIN = tuple(x509.load_pem_x509_certificates(certificates().chain_pem))


def the(findings: Findings, check_id: str) -> Check:
    (check,) = findings.report((check_id,)).checks
    return check


def path(**changes: object) -> AddressFindings:
    found = AddressFindings(ADDRESS)
    for name, value in changes.items():
        setattr(found, name, value)
    return found


def answered(*sizes: int, round_trip_s: float = 0.01) -> AddressFindings:
    return path(round_trips_s=dict.fromkeys(sizes, round_trip_s), local_host="198.51.100.7")


# names and UDP


@pytest.mark.parametrize("is_timeout", [False, True])
def test_a_name_that_does_not_resolve_fails(is_timeout: bool) -> None:
    findings = Findings()
    evidence = Evidence(lookup_trouble=Trouble("why", is_timeout))
    judge_dns(findings, evidence, SETTINGS)
    check = the(findings, "net.dns")
    assert check.status is Status.FAIL
    assert ("silent" in (check.remedy or "")) is is_timeout


@pytest.mark.parametrize(
    ("found", "tcp", "said", "remedy"),
    [
        (path(is_refused=True), None, "nothing listens", "start the gateway"),
        (path(error="Operation not permitted"), None, "cannot send UDP", "own firewall"),
        (path(), TcpAnswer.ANSWERED, "answers TCP, but no UDP", "UDP is blocked"),
        (path(), TcpAnswer.SILENT, "nothing at all", "firewall"),
        (path(), TcpAnswer.UNREACHABLE, "nothing at all", "network up"),
    ],
)
def test_silence_by_udp_says_who_may_keep_it(
    found: AddressFindings, tcp: TcpAnswer | None, said: str, remedy: str
) -> None:
    findings = Findings()
    judge_udp(findings, Evidence(addresses=[ADDRESS], path=[found], tcp=tcp), SETTINGS)
    check = the(findings, "net.udp")
    assert check.status is Status.FAIL
    assert said in check.summary
    assert remedy in (check.remedy or "")


def test_one_address_that_answers_is_enough() -> None:
    findings = Findings()
    judge_udp(findings, Evidence(path=[path(error="no route"), answered(1200)]), SETTINGS)
    check = the(findings, "net.udp")
    assert check.status is Status.PASS
    assert check.facts == {"round_trip_ms": 10.0}


def test_a_handshake_shows_that_udp_passes_whatever_the_probes_say() -> None:
    findings = Findings()
    evidence = Evidence(path=[path()])
    evidence.ping.address = ADDRESS
    judge_udp(findings, evidence, SETTINGS)
    judge_mtu_up(findings, evidence, SETTINGS)
    assert the(findings, "net.udp").status is Status.PASS
    assert the(findings, "net.mtu.up").status is Status.SKIP


# sizes


@pytest.mark.parametrize(("works", "status"), [(False, Status.FAIL), (True, Status.WARN)])
@pytest.mark.parametrize(("too_large", "where"), [(set(), "on the way"), ({1350}, "own link")])
def test_a_narrow_way_up_names_the_mtu_to_set(
    works: bool, status: Status, too_large: set[int], where: str
) -> None:
    found = answered(1200, 1252, 1280)
    found.too_large = too_large
    evidence = Evidence(path=[found])
    evidence.ping.address = ADDRESS if works else None
    findings = Findings()
    judge_udp(findings, evidence, SETTINGS)
    judge_mtu_up(findings, evidence, SETTINGS)
    check = the(findings, "net.mtu.up")
    assert check.status is status
    assert "set mtu = 1280" in (check.remedy or "")
    assert where in check.summary
    assert check.facts == {"largest_bytes": 1280, "used_bytes": 1350}


def down(evidence: Evidence) -> Check:
    findings = Findings()
    judge_mtu_down(findings, evidence)
    return the(findings, "net.mtu.down")


def measured(came_back: dict[int, bool]) -> Evidence:
    evidence = Evidence()
    evidence.tunnel.sizes_sent = (1150, 1200, 1252, 1300)
    evidence.tunnel.came_back = came_back
    evidence.tunnel.has_measured_sizes = True
    return evidence


def test_payloads_that_come_back_whole_pass() -> None:
    check = down(measured({1150: True, 1200: True, 1252: True, 1300: False}))
    assert check.status is Status.PASS
    assert check.facts["largest_payload_bytes"] == 1252


def test_payloads_that_vanish_on_the_way_back_are_a_warning() -> None:
    check = down(measured({1150: True, 1200: True}))
    assert check.status is Status.WARN
    assert "1252 bytes do not come back, those of 1200 do" in check.summary
    assert "max_packet_bytes" in (check.remedy or "")


def test_no_room_for_quic_inside_a_tunnel_is_a_warning() -> None:
    check = down(measured({1150: True, 1200: False, 1252: False, 1300: False}))
    assert check.status is Status.WARN
    assert "only in pieces" in check.summary


def test_what_was_not_measured_in_time_is_skipped() -> None:
    assert down(Evidence()).status is Status.SKIP


# loss and NAT


@pytest.mark.parametrize(
    ("came", "status"), [(40, Status.PASS), (39, Status.PASS), (38, Status.WARN), (0, Status.WARN)]
)
def test_loss_is_a_warning_from_two_of_forty(came: int, status: Status) -> None:
    evidence = Evidence()
    evidence.tunnel.echoes_sent = 40
    evidence.tunnel.round_trips_s = [0.02] * came
    evidence.tunnel.has_measured_loss = True
    findings = Findings()
    judge_latency(findings, evidence)
    check = the(findings, "net.latency")
    assert check.status is status
    assert check.facts["lost"] == 40 - came
    assert check.facts.get("round_trip_ms", 20.0) == 20.0


@pytest.mark.parametrize(
    ("seen", "later", "status", "said"),
    [
        (("198.51.100.7", 5), ("198.51.100.7", 5), Status.PASS, "no NAT"),
        (("203.0.113.9", 5), ("203.0.113.9", 5), Status.PASS, "keeps the port"),
        (("203.0.113.9", 7), ("203.0.113.9", 7), Status.PASS, "changes the port"),
        (("203.0.113.9", 7), ("203.0.113.9", 8), Status.WARN, "rebinds"),
        (("2001:db8::9", 7), None, Status.PASS, "[2001:db8::9]:7"),
    ],
)
def test_what_the_gateway_sees_tells_of_nats(
    seen: Address, later: Address | None, status: Status, said: str
) -> None:
    evidence = Evidence(path=[answered(1200)])
    evidence.tunnel.local_port = 5
    evidence.tunnel.facts = GatewayFacts(client_address=seen)
    evidence.tunnel.facts_later = GatewayFacts(client_address=later)
    findings = Findings()
    judge_nat(findings, evidence)
    check = the(findings, "net.nat")
    assert check.status is status
    assert said in check.summary


# the handshake


def handshake(evidence: Evidence, findings: Findings | None = None) -> Check:
    findings = findings or Findings()
    judge_handshake(findings, evidence, SETTINGS, "")
    return the(findings, "h3.connect")


def test_small_packets_only_means_that_the_way_back_is_too_narrow() -> None:
    evidence = Evidence(path=[answered(1200, 1472)], chain=CHAIN)
    evidence.ping.trouble = SILENCE
    check = handshake(evidence)
    assert check.status is Status.FAIL
    assert "initial_packet_bytes" in (check.remedy or "")


def test_a_slow_way_is_told_apart_from_a_dead_one() -> None:
    evidence = Evidence(path=[answered(1200, 1472, round_trip_s=0.35)])
    evidence.ping.trouble = SILENCE
    assert "350 ms" in (handshake(evidence).remedy or "")


def test_packets_that_need_jumbo_frames_are_suspected() -> None:
    evidence = Evidence()
    evidence.ping.trouble = SILENCE
    findings = Findings()
    judge_handshake(findings, evidence, settings_for(ADDRESS, initial_packet_bytes=9000), "")
    assert "jumbo frames" in (the(findings, "h3.connect").remedy or "")


def test_an_answer_that_ends_the_handshake_is_shown() -> None:
    evidence = Evidence()
    evidence.ping.trouble = Trouble("no application protocol")
    check = handshake(evidence)
    assert check.summary == "no application protocol"
    assert "gateway and port" in (check.remedy or "")


def test_a_gateway_that_answers_no_request_is_told() -> None:
    evidence = Evidence()
    evidence.tunnel.trouble = SILENCE
    findings = Findings()
    judge_tunnel(findings, evidence)
    check = the(findings, "masque.connect_udp")
    assert check.status is Status.FAIL
    assert "overloaded" in (check.remedy or "")


# credentials


def token_check(
    evidence: Evidence, claims: dict[str, object] | None, *, now: float = NOW, answer: str = "pong"
) -> Check:
    import jwt

    evidence.token = jwt.encode(claims, "x" * 32) if claims is not None else evidence.token
    evidence.ping.answer = answer
    findings = Findings()
    judge_token(findings, evidence, now)
    return the(findings, "auth.token")


@pytest.mark.parametrize(
    ("claims", "is_logged_in", "status", "said"),
    [
        ({"exp": NOW + 30 * 86_400}, False, Status.PASS, "another 30 days"),
        ({"exp": NOW + 3 * 86_400}, False, Status.WARN, "another 3 days"),
        ({"exp": NOW + 3600}, True, Status.PASS, "another 1 hour"),
        ({"exp": NOW - 1}, False, Status.FAIL, "expired less than a minute ago"),
        ({"nbf": NOW + 3600, "exp": NOW + 7200}, False, Status.FAIL, "not valid for another"),
        ({"exp": "soon"}, False, Status.PASS, "does not say when it ends"),
        ({}, False, Status.PASS, "does not say when it ends"),
    ],
)
def test_a_token_is_judged_by_its_own_times(
    claims: dict[str, object], is_logged_in: bool, status: Status, said: str
) -> None:
    check = token_check(Evidence(is_logged_in=is_logged_in), claims)
    assert check.status is status
    assert said in check.summary
    assert check.facts["kind"] == "jwt"


@pytest.mark.parametrize(
    ("answer", "status", "said"),
    [("pong", Status.PASS, "asks for none"), ("", Status.WARN, "there is no token")],
)
def test_no_token_is_fine_where_none_is_asked_for(answer: str, status: Status, said: str) -> None:
    check = token_check(Evidence(), None, answer=answer)
    assert check.status is status
    assert said in check.summary


@pytest.mark.parametrize(
    "token", ["", "opaque", "a.b.c", "e30.e30.x", "eyJhbGciOjF9.W10.x", "é.é.é", "..", "{}.{}.{}"]
)
def test_what_is_no_jwt_has_no_claims(token: str) -> None:
    assert unverified_claims(token) is None


@given(st.text())
def test_any_text_is_a_jwt_or_none(token: str) -> None:
    claims = unverified_claims(token)
    assert claims is None or isinstance(claims, dict)


def certificate_check(days: float, **changes: object) -> Check:
    findings = Findings()
    end = min(each.not_valid_after_utc for each in CHAIN)
    now = (end - datetime.timedelta(days=days)).timestamp()
    settings = settings_for(ADDRESS, **changes)
    judge_certificate(findings, Evidence(chain=CHAIN), settings, now)
    return the(findings, "tls.certificate")


@pytest.mark.parametrize(
    ("days", "status", "said"),
    [
        (30.5, Status.PASS, "another 30 days"),
        (29.5, Status.WARN, "another 29 days only"),
        (0.1, Status.WARN, "another 2 hours only"),
        (-1.0, Status.FAIL, "expired on"),
        (32.0, Status.FAIL, "is not valid before"),
    ],
)
def test_a_certificate_is_judged_by_what_is_left_of_it(
    days: float, status: Status, said: str
) -> None:
    check = certificate_check(days)
    assert check.status is status
    assert said in check.summary


@pytest.mark.parametrize(
    ("name", "status"),
    [
        (SERVER_NAME, Status.WARN),
        (SERVER_NAME.upper(), Status.WARN),
        ("127.0.0.1", Status.WARN),
        ("other.example", Status.FAIL),
        ("127.0.0.2", Status.FAIL),
    ],
)
def test_a_certificate_is_for_the_name_or_it_is_not(name: str, status: Status) -> None:
    check = certificate_check(9.0, server_name=name)
    assert check.status is status


def test_with_the_systems_roots_only_the_dates_and_names_are_judged() -> None:
    assert certificate_check(9.0, ca_certificates_pem=None).status is Status.WARN


@pytest.mark.parametrize(
    ("days", "status"), [(40.0, Status.PASS), (9.0, Status.WARN), (-1.0, Status.FAIL)]
)
def test_the_clients_own_certificate_is_judged_where_there_is_one(
    days: float, status: Status
) -> None:
    findings = Findings()
    now = CHAIN[0].not_valid_after_utc.timestamp() - days * 86_400
    judge_client_certificate(findings, SETTINGS, now)
    assert not findings.report(("tls.client_certificate",)).checks
    own = settings_for(ADDRESS, certificate_chain_pem=certificates().chain_pem)
    judge_client_certificate(findings, own, now)
    assert the(findings, "tls.client_certificate").status is status


def test_a_gateway_that_asks_for_a_client_certificate_says_what_to_set() -> None:
    evidence = Evidence()
    evidence.ping.address = ADDRESS
    said = "certificate required: set client_certificate and client_key"
    evidence.ping.trouble = Trouble(said)
    check = handshake(evidence)
    assert check.summary == "certificate required"
    assert check.remedy == "set client_certificate and client_key"


# clock, version, target


@pytest.mark.parametrize(
    ("ahead_s", "has_jwt", "status", "said"),
    [
        (0.0, True, Status.PASS, "agree"),
        (1.4, True, Status.PASS, "agree"),
        (-4.9, True, Status.PASS, "agree"),
        (6.0, True, Status.WARN, "6 s ahead of"),
        (-30.0, True, Status.WARN, "30 s behind"),
        (90.0, True, Status.FAIL, "90 s ahead of"),
        (90.0, False, Status.WARN, "90 s ahead of"),
    ],
)
def test_clocks_are_compared(ahead_s: float, has_jwt: bool, status: Status, said: str) -> None:
    evidence = Evidence()
    evidence.tunnel.facts = GatewayFacts(unix_time=NOW)
    evidence.tunnel.facts_at = NOW + 0.5 + ahead_s
    findings = Findings()
    judge_clock(findings, evidence, has_jwt=has_jwt)
    check = the(findings, "clock.skew")
    assert check.status is status
    assert said in check.summary


@pytest.mark.parametrize(
    ("version", "engine", "status"),
    [
        (__version__, "native", Status.PASS),
        (__version__, "aioquic", Status.WARN),
        ("99.1.0", "native", Status.WARN),
    ],
)
def test_versions_and_engines_of_both_ends_are_shown(
    version: str, engine: str, status: Status
) -> None:
    evidence = Evidence()
    evidence.tunnel.facts = GatewayFacts(version=version, engine=engine)
    findings = Findings()
    judge_version(findings, evidence, "native")
    check = the(findings, "gateway.version")
    assert check.status is status
    assert check.facts == {
        "client": __version__,
        "client_engine": "native",
        "gateway": version,
        "gateway_engine": engine,
    }


def test_a_target_that_was_not_asked_about_in_time_is_skipped() -> None:
    findings = Findings()
    judge_target(findings, Evidence(), Target("10.0.0.1", 53))
    assert the(findings, "policy.gateway").status is Status.SKIP


def test_one_protocol_that_the_gateway_denies_is_a_warning_that_names_it() -> None:
    evidence = Evidence()
    evidence.tunnel.targets = [
        TargetEvidence("udp", 200),
        TargetEvidence("tcp", 403, "403: not allowed; ask"),
    ]
    findings = Findings()
    judge_target(findings, evidence, Target("10.0.0.1", 53))
    check = the(findings, "policy.gateway")
    assert check.status is Status.WARN
    assert check.summary.startswith("the gateway denies TCP: the gateway opens UDP tunnels to ")
    assert "--protocol udp" in (check.remedy or "")


@pytest.mark.parametrize("status", [403, 404, 502])
def test_the_only_protocol_that_was_asked_for_fails_where_it_is_not_opened(status: int) -> None:
    evidence = Evidence()
    evidence.tunnel.targets = [TargetEvidence("tcp", status, f"{status}: no; ask")]
    findings = Findings()
    judge_target(findings, evidence, Target("10.0.0.1", 53))
    assert the(findings, "policy.gateway").status is Status.FAIL


def test_a_target_that_gets_no_answer_fails() -> None:
    evidence = Evidence()
    evidence.tunnel.targets = [TargetEvidence("udp", trouble=SILENCE)]
    findings = Findings()
    judge_target(findings, evidence, Target("10.0.0.1", 53))
    check = the(findings, "policy.gateway")
    assert check.status is Status.FAIL
    assert "no answer in time" in check.summary


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (59, "less than a minute"),
        (60, "1 minute"),
        (7199, "1 hour"),
        (86_400 * 2.5, "2 days"),
    ],
)
def test_times_are_told_in_words(seconds: float, said: str) -> None:
    assert days_and_hours(seconds) == said
