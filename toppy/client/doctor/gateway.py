"""What the evidence says about the gateway itself: handshake, tunnel, clock, version, policy."""

from __future__ import annotations

from toppy import __version__
from toppy.client.doctor.evidence import Evidence, TargetEvidence, Trouble
from toppy.client.doctor.path import answers_only_small
from toppy.client.doctor.report import Fact, Findings, Status
from toppy.client.session import GatewaySettings
from toppy.model.target import Target

_SLOW_S = 0.2
_SKEW_WARN_S = 5.0
_SKEW_FAIL_S = 60.0
"""The leeway that tokens have by default."""
_ETHERNET_PAYLOAD_BYTES = 1452
"""1,500 without the headers of IPv6 and UDP."""
_NO_TIME = "not checked: there was no time left for it"
_NO_TCP = (404, 501)
_FORBIDDEN = 403
TUNNEL_CHECKS = ("masque.connect_udp", "masque.connect_udp.datagram")


def judge_handshake(
    findings: Findings, evidence: Evidence, settings: GatewaySettings, note: str
) -> None:
    """``h3.connect``: handshake, certificate, token (T-010). ``note`` names what is not set."""
    check_id = "h3.connect"
    ping = evidence.ping
    trouble = ping.trouble
    if trouble is None and ping.answer == "pong" and ping.address is not None:
        took_ms = ping.handshake_s * 1e3
        findings.add(
            check_id,
            Status.PASS,
            f"certificate and token are good at {ping.address[0]}, handshake {took_ms:.1f} ms",
            facts={"address": ping.address[0], "handshake_ms": round(took_ms, 1)},
        )
    elif trouble is None and ping.address is not None:
        cause = "auth.token" if findings.is_cause("auth.token") else None
        findings.add(
            check_id,
            Status.FAIL,
            f"the gateway answers {ping.answer!r}: it does not accept the token{note}",
            "set auth_token (or [auth] token) to one that it knows, or run toppy login",
            because=cause,
        )
    elif trouble is None:
        cause = findings.first_failed("net.udp", "net.mtu.up")
        if cause is not None:
            findings.follow((check_id,), cause)
        else:
            findings.add(check_id, Status.SKIP, _NO_TIME)
    elif trouble.is_timeout and ping.address is None:
        _judge_silence(findings, evidence, settings)
    elif "client_certificate" in trouble.text:  # it asks for ours, and says so
        said, _, remedy = trouble.text.rpartition(": ")
        cause = "tls.client_certificate" if findings.is_cause("tls.client_certificate") else None
        findings.add(check_id, Status.FAIL, said or trouble.text, remedy, because=cause)
    else:
        is_certificate = "certificate" in trouble.text.lower()
        cause = "tls.certificate" if is_certificate else None
        findings.add(
            check_id,
            Status.FAIL,
            f"{trouble.text}{note}",
            "check ca_cert_path and server_name, and the gateway's certificate"
            if is_certificate
            else "check gateway and port, and look at the gateway's log",
            because=cause if cause and findings.is_cause(cause) else None,
        )


def _judge_silence(findings: Findings, evidence: Evidence, settings: GatewaySettings) -> None:
    check_id = "h3.connect"
    cause = findings.first_failed("net.udp", "net.mtu.up")
    round_trip_s = evidence.round_trip_s or 0.0
    said = "no answer to the handshake in time"
    remedy = (
        "is the gateway running (toppy-gw status there), are gateway and port right, and may UDP "
        "pass?"
    )
    if cause is None and answers_only_small(evidence):
        said = "the gateway answers in packets of 1,200 bytes, but not in those of its usual size"
        remedy = (
            "the way back is too narrow: set [quic] initial_packet_bytes = 1200 and "
            "max_packet_bytes = 1252 at the gateway, raise the MTU of the link in between, or let "
            "ICMP 'packet too big' through"
        )
    elif cause is None and round_trip_s > _SLOW_S:
        remedy = (
            f"the way is slow ({round_trip_s * 1e3:.0f} ms for a round trip); `toppy udp` waits "
            "longer than this check and may work"
        )
    elif cause is None and settings.initial_packet_bytes > _ETHERNET_PAYLOAD_BYTES:
        remedy = f"mtu = {settings.initial_packet_bytes} needs jumbo frames, try mtu = 1350"
    findings.add(check_id, Status.FAIL, said, remedy, because=cause)


def judge_tunnel(findings: Findings, evidence: Evidence) -> None:
    """``masque.connect_udp`` and its datagrams."""
    first, second = TUNNEL_CHECKS
    tunnel = evidence.tunnel
    trouble = tunnel.trouble
    if tunnel.is_open:
        findings.add(first, Status.PASS, "the gateway opened a tunnel to its echo")
    elif findings.has_failed("h3.connect"):
        findings.follow(TUNNEL_CHECKS, "h3.connect")
        return
    elif trouble is None:
        findings.add(first, Status.SKIP, _NO_TIME)
        findings.add(second, Status.SKIP, _NO_TIME)
        return
    else:
        if trouble.is_refusal:
            said, remedy = _split(trouble.text)
        else:
            said, remedy = _sentence(trouble), _advice(trouble)
        findings.add(first, Status.FAIL, said, remedy)
        findings.follow((second,), first)
        return
    if tunnel.echo_s is not None:
        took_ms = tunnel.echo_s * 1e3
        said = f"an HTTP Datagram came back in {took_ms:.1f} ms"
        findings.add(second, Status.PASS, said, facts={"round_trip_ms": round(took_ms, 1)})
    elif tunnel.echo_trouble is None:
        findings.add(second, Status.SKIP, _NO_TIME)
    elif tunnel.echo_trouble.is_timeout:
        findings.add(
            second,
            Status.FAIL,
            "the tunnel is open, but no datagram came back in time",
            "something on the way may drop UDP packets (try mtu = 1200), or the gateway drops "
            "(toppy-gw status there says why)",
        )
    else:
        findings.add(second, Status.FAIL, tunnel.echo_trouble.text, _advice(tunnel.echo_trouble))


def _sentence(trouble: Trouble) -> str:
    return "no answer to the request in time" if trouble.is_timeout else trouble.text


def _advice(trouble: Trouble) -> str | None:
    if trouble.is_refusal:  # it says by itself what to do
        return None
    if trouble.is_timeout:
        return "is the gateway overloaded? Look at toppy-gw status there and at its log"
    return "look at the gateway's log"


def clock_skew_s(evidence: Evidence) -> float | None:
    """How much this host's clock is ahead of the gateway's; None where it does not say."""
    facts = evidence.tunnel.facts
    if facts is None or facts.unix_time is None:
        return None
    # the gateway cuts off the fraction
    skew = evidence.tunnel.facts_at - (facts.unix_time + 0.5)
    return skew if abs(skew) > 1.5 else 0.0


def judge_clock(findings: Findings, evidence: Evidence, *, has_jwt: bool) -> None:
    """``clock.skew``: this host's clock against the gateway's."""
    check_id = "clock.skew"
    skew = clock_skew_s(evidence)
    if skew is None:
        cause = findings.first_failed("h3.connect", "masque.connect_udp")
        if cause is not None:
            findings.follow((check_id,), cause)
        else:
            findings.add(check_id, Status.SKIP, "not checked: the gateway does not say its time")
        return
    facts: dict[str, Fact] = {"ahead_s": round(skew, 1)}
    if abs(skew) <= _SKEW_WARN_S:
        findings.add(check_id, Status.PASS, "this clock and the gateway's agree", facts=facts)
        return
    how = "ahead of" if skew > 0 else "behind"
    findings.add(
        check_id,
        Status.FAIL if abs(skew) > _SKEW_FAIL_S and has_jwt else Status.WARN,
        f"this clock is {abs(skew):.0f} s {how} the gateway's",
        "set both by NTP (timedatectl set-ntp true): tokens and certificates are judged by them",
        facts=facts,
    )


def judge_version(findings: Findings, evidence: Evidence, engine: str) -> None:
    """``gateway.version``: version and QUIC engine of both ends."""
    check_id = "gateway.version"
    facts_seen = evidence.tunnel.facts
    own = f"toppy {__version__} ({engine}) here"
    if facts_seen is None or not facts_seen.version:
        cause = findings.first_failed("h3.connect", "masque.connect_udp")
        if cause is not None:
            findings.follow((check_id,), cause)
        else:
            findings.add(check_id, Status.SKIP, f"{own}; the gateway does not say its own")
        return
    facts: dict[str, Fact] = {
        "client": __version__,
        "client_engine": engine,
        "gateway": facts_seen.version,
        "gateway_engine": facts_seen.engine,
    }
    said = f"{own}, toppy-gw {facts_seen.version} ({facts_seen.engine}) there"
    if _release(facts_seen.version) != _release(__version__):
        remedy = "they understand each other, but bring both to the newer one"
        findings.add(check_id, Status.WARN, said, remedy, facts=facts)
    elif facts_seen.engine == "aioquic":
        remedy = "the gateway runs on the slow engine: have it built with a Rust toolchain there"
        findings.add(check_id, Status.WARN, said, remedy, facts=facts)
    else:
        findings.add(check_id, Status.PASS, said, facts=facts)


def _release(version: str) -> list[str]:
    return version.split(".")[:2]


def judge_target(findings: Findings, evidence: Evidence, target: Target) -> None:
    """``policy.gateway``: whether the gateway opens tunnels to a target. Where both protocols were
    asked for, one that it has no way for is only mentioned, one that it denies is a warning.
    """
    check_id = "policy.gateway"
    asked = evidence.tunnel.targets
    if len(asked) > 1:
        asked = [e for e in asked if e.protocol == "udp" or e.status not in _NO_TCP]
    answered = [e for e in asked if e.status]
    opened = [e for e in answered if 200 <= e.status < 300]
    facts: dict[str, Fact] = {f"{e.protocol}_status": e.status for e in answered}
    facts |= {f"{e.protocol}_rule": e.rule for e in answered if e.rule}
    if opened:
        names = " and ".join(e.protocol.upper() for e in opened)
        said = f"the gateway opens {names} tunnels to {target}"
        said += "".join(f"; {e.protocol.upper()}: {_outcome(e)}" for e in asked if e not in opened)
        denied = [e.protocol for e in asked if e.status == _FORBIDDEN]
        if denied:
            other = opened[0].protocol
            findings.add(
                check_id,
                Status.WARN,
                f"the gateway denies {denied[0].upper()}: {said}",
                f"if you need {denied[0].upper()}, ask the gateway's operator for a rule; if not, "
                f"--protocol {other} asks for {other.upper()} alone",
                facts=facts,
            )
        else:
            findings.add(check_id, Status.PASS, said, facts=facts)
    elif not asked:
        cause = findings.first_failed("h3.connect", "masque.connect_udp")
        if cause is not None:
            findings.follow((check_id,), cause)
        else:
            findings.add(check_id, Status.SKIP, _NO_TIME)
    else:
        outcomes = [(each.protocol.upper(), *_split(_outcome(each))) for each in asked]
        said = "; ".join(f"{protocol}: {what}" for protocol, what, _ in outcomes)
        advice = dict.fromkeys(remedy for _, _, remedy in outcomes if remedy is not None)
        findings.add(
            check_id,
            Status.FAIL,
            f"the gateway opens no tunnel to {target}: {said}",
            "; ".join(advice) or None,
            facts=facts,
        )


def _split(text: str) -> tuple[str, str | None]:
    """What was refused, and the advice that ``explain`` put behind it."""
    said, _, remedy = text.rpartition("; ")
    return (said, remedy) if said else (text, None)


def _outcome(target: TargetEvidence) -> str:
    if target.trouble is not None:
        return target.trouble.text
    return target.explanation if target.status else "not asked in time"
