"""What the evidence says about the token and the gateway's certificates."""

from __future__ import annotations

import base64
import binascii
import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

from cryptography import x509

from toppy.auth.certificate_chain import find_chain
from toppy.client.doctor.evidence import Evidence
from toppy.client.doctor.host import days_and_hours
from toppy.client.doctor.report import Fact, Findings, Status
from toppy.client.session import GatewaySettings
from toppy.system.certificate_files import days_left, is_for, server_names

DAYS_TO_RENEW = 30
_TOKEN_DAYS = 7
_DAY_S = 86_400.0
_ASK_OPERATOR = "ask the gateway's operator"
_RENEW = f"{_ASK_OPERATOR} to renew it (toppy-gw cert), then to reload the gateway"


def judge_login(findings: Findings, evidence: Evidence) -> None:
    """``auth.login``: the login's token, renewed where it is too old (T-088)."""
    trouble = evidence.login_trouble
    if trouble is not None:
        findings.add(
            "auth.login",
            Status.FAIL,
            trouble.text,
            "is the provider up, and is this network? Then run the doctor again"
            if trouble.is_timeout
            else "toppy login",
        )
    else:
        findings.add("auth.login", Status.PASS, "logged in, the token is good")


def unverified_claims(token: str) -> Mapping[str, Any] | None:
    """What a JWT says, whoever signed it; None for a token that is none (RFC 7519)."""
    parts = token.split(".")
    if len(parts) != 3:
        return None
    try:
        header, claims = (
            json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
            for part in parts[:2]
        )
    except (ValueError, binascii.Error, RecursionError):
        return None
    is_jwt = isinstance(header, dict) and "alg" in header and isinstance(claims, dict)
    return claims if is_jwt else None


def judge_token(findings: Findings, evidence: Evidence, unix_now: float) -> None:
    """``auth.token``: what it says about its own life, and whether the gateway takes it.

    ``unix_now`` is the gateway's clock where it is known.
    """
    check_id = "auth.token"
    token = evidence.token
    claims = unverified_claims(token) if token is not None else None
    expires, begins = _time(claims, "exp"), _time(claims, "nbf")
    answer = evidence.ping.answer
    facts: dict[str, Fact] = {
        "kind": "none" if token is None else "opaque" if claims is None else "jwt"
    }
    if expires is not None:
        facts["expires_in_s"] = round(expires - unix_now)
    renew = "get a new one and set auth_token (or [auth] token)"
    if evidence.is_logged_in:
        renew = "toppy login"
    if expires is not None and expires <= unix_now:
        said = f"the token expired {days_and_hours(unix_now - expires)} ago"
        findings.add(check_id, Status.FAIL, said, renew, facts=facts)
    elif begins is not None and begins > unix_now + 60:
        said = f"the token is not valid for another {days_and_hours(begins - unix_now)}"
        remedy = "look at this host's clock and the issuer's"
        findings.add(check_id, Status.FAIL, said, remedy, facts=facts)
    elif answer and answer != "pong":
        # h3.connect has said it
        said = "the gateway does not take it"
        findings.add(check_id, Status.FAIL, said, renew, because="h3.connect", facts=facts)
    else:
        left_s = expires - unix_now if expires is not None else None
        _judge_good_token(findings, evidence, left_s, renew, facts)


def _judge_good_token(
    findings: Findings,
    evidence: Evidence,
    left_s: float | None,
    renew: str,
    facts: dict[str, Fact],
) -> None:
    check_id = "auth.token"
    is_taken = evidence.ping.answer == "pong"
    taken = "the gateway takes it" if is_taken else "the gateway was not asked"
    if evidence.token is None:
        if is_taken:
            said = "there is no token, and the gateway asks for none"
            findings.add(check_id, Status.PASS, said, facts=facts)
        else:
            findings.add(check_id, Status.WARN, "there is no token", "set auth_token", facts=facts)
    elif left_s is None:
        findings.add(check_id, Status.PASS, f"{taken}; it does not say when it ends", facts=facts)
    else:
        said = f"{taken}; it is good for another {days_and_hours(left_s)}"
        is_short = left_s < _TOKEN_DAYS * _DAY_S and not evidence.is_logged_in
        status = Status.WARN if is_short else Status.PASS
        findings.add(check_id, status, said, renew if is_short else None, facts=facts)


def _time(claims: Mapping[str, Any] | None, name: str) -> float | None:
    value = claims.get(name) if claims is not None else None
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 2**53:
        return None
    return float(value)


def judge_certificate(
    findings: Findings, evidence: Evidence, settings: GatewaySettings, unix_now: float
) -> None:
    """``tls.certificate``: what the gateway shows, and for how long it is good."""
    check_id = "tls.certificate"
    chain = evidence.chain
    if not chain:
        if findings.has_failed("net.udp"):
            findings.follow((check_id,), "net.udp")
        else:
            findings.add(check_id, Status.SKIP, "the gateway showed no certificate in time")
        return
    now = datetime.datetime.fromtimestamp(unix_now, datetime.UTC)
    leaf = chain[0]
    roots = _roots(settings.ca_certificates_pem)
    path = find_chain(leaf, chain[1:], roots) if roots is not None else list(chain)
    first_end = min(path or chain, key=lambda each: each.not_valid_after_utc)
    left_s = (first_end.not_valid_after_utc - now).total_seconds()
    facts: dict[str, Fact] = {
        "days_left": days_left(first_end, unix_now),
        "not_after": first_end.not_valid_after_utc.isoformat(),
        "subject": leaf.subject.rfc4514_string(),
        "issuer": leaf.issuer.rfc4514_string(),
    }
    names = _names(leaf)
    which = "the gateway's certificate" if first_end is leaf else "a certificate of its chain"
    if left_s <= 0:
        said = f"{which} expired on {first_end.not_valid_after_utc:%Y-%m-%d}"
        findings.add(check_id, Status.FAIL, said, _RENEW, facts=facts)
    elif any(now < each.not_valid_before_utc for each in chain):
        said = f"{which} is not valid before {leaf.not_valid_before_utc:%Y-%m-%d %H:%M} UTC"
        remedy = f"look at this host's clock; else {_ASK_OPERATOR}"
        findings.add(check_id, Status.FAIL, said, remedy, facts=facts)
    elif not names or not is_for(leaf, settings.server_name):
        said = f"it is for {', '.join(names[:5]) or 'nobody'}, not for {settings.server_name}"
        remedy = (
            "set server_name to one of these names, or `gateway`; else "
            f"{_ASK_OPERATOR} for a certificate with this name"
        )
        findings.add(check_id, Status.FAIL, said, remedy, facts=facts)
    elif path is None:
        findings.add(
            check_id,
            Status.FAIL,
            f"it was issued by {facts['issuer']}, which ca_cert_path does not lead to",
            "set ca_cert_path to the CA that issued the gateway's certificate (ca.pem of "
            "`toppy-gw init`)",
            facts=facts,
        )
    elif left_s < DAYS_TO_RENEW * _DAY_S:
        said = f"{which} is good for another {days_and_hours(left_s)} only"
        findings.add(check_id, Status.WARN, said, _RENEW, facts=facts)
    else:
        said = f"{names[0]}, good for another {days_and_hours(left_s)}, {len(chain)} in the chain"
        findings.add(check_id, Status.PASS, said, facts=facts)


def judge_client_certificate(
    findings: Findings, settings: GatewaySettings, unix_now: float
) -> None:
    """``tls.client_certificate``: what this client shows, where it has something to show."""
    check_id = "tls.client_certificate"
    if not settings.certificate_chain_pem:
        return
    own = x509.load_pem_x509_certificates(settings.certificate_chain_pem)[0]
    left_s = own.not_valid_after_utc.timestamp() - unix_now
    facts: dict[str, Fact] = {
        "days_left": days_left(own, unix_now),
        "not_after": own.not_valid_after_utc.isoformat(),
        "subject": own.subject.rfc4514_string(),
    }
    remedy = f"{_ASK_OPERATOR} for a new one (toppy-gw cert client)"
    if left_s <= 0:
        said = f"this client's certificate expired on {own.not_valid_after_utc:%Y-%m-%d}"
        findings.add(check_id, Status.FAIL, said, remedy, facts=facts)
    elif left_s < DAYS_TO_RENEW * _DAY_S:
        said = f"this client's certificate is good for another {days_and_hours(left_s)} only"
        findings.add(check_id, Status.WARN, said, remedy, facts=facts)
    else:
        said = f"this client's certificate is good for another {days_and_hours(left_s)}"
        findings.add(check_id, Status.PASS, said, facts=facts)


def _roots(pem: bytes | None) -> Sequence[x509.Certificate] | None:
    """None: the system's, which the handshake itself asks."""
    return x509.load_pem_x509_certificates(pem) if pem is not None else None


def _names(certificate: x509.Certificate) -> Sequence[str]:
    try:
        return server_names(certificate)
    except ValueError:
        return ()
