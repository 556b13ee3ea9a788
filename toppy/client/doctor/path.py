"""What the evidence says about the way to the gateway: names, UDP, sizes, loss, NAT."""

from __future__ import annotations

import statistics

from toppy.client.doctor.evidence import Evidence
from toppy.client.doctor.report import Fact, Findings, Status
from toppy.client.path_probe import TcpAnswer
from toppy.client.session import GatewaySettings
from toppy.quic.engine import Address

_MUCH_LOSS = 0.04
"""Two of forty; one may be chance."""
_INNER_QUIC_BYTES = 1200
"""A QUIC connection inside a tunnel needs payloads of this size (RFC 9000 section 14)."""
_NO_TIME = "there was no time left for it"


def judge_dns(findings: Findings, evidence: Evidence, settings: GatewaySettings) -> None:
    """``net.dns``."""
    trouble = evidence.lookup_trouble
    if trouble is not None:
        findings.add(
            "net.dns",
            Status.FAIL,
            f"{settings.host} does not resolve ({trouble.text})",
            "this host's name servers are silent: check the network (can it resolve anything?)"
            if trouble.is_timeout
            else "check `gateway` and this host's DNS",
        )
        return
    shown = ", ".join(host for host, _ in evidence.addresses)
    findings.add("net.dns", Status.PASS, f"{settings.host} is {shown}")


def judge_udp(findings: Findings, evidence: Evidence, settings: GatewaySettings) -> None:
    """``net.udp``: whether anything comes back by UDP, and if not, who keeps it."""
    port = settings.port
    if evidence.answers_udp:
        facts: dict[str, Fact] = {}
        said = f"UDP to port {port} is answered"
        trip = evidence.round_trip_s
        if trip is not None:
            facts["round_trip_ms"] = round(trip * 1e3, 1)
            said += f" within {trip * 1e3:.1f} ms"
        findings.add("net.udp", Status.PASS, said, facts=facts)
        return
    shown = ", ".join(host for host, _ in evidence.addresses)
    errors = [each for each in evidence.path if each.error]
    if any(each.is_refused for each in evidence.path):
        findings.add(
            "net.udp",
            Status.FAIL,
            f"{shown} says that nothing listens at UDP port {port}",
            "start the gateway (toppy-gw status there), or mend `port`",
        )
    elif errors and len(errors) == len(evidence.path):
        findings.add(
            "net.udp",
            Status.FAIL,
            f"this host cannot send UDP to {shown}: {errors[0].error}",
            f"look at this host's own firewall (it must let UDP to port {port} out) and its routes",
        )
    elif evidence.tcp is TcpAnswer.ANSWERED:
        findings.add(
            "net.udp",
            Status.FAIL,
            f"{shown} answers TCP, but no UDP at port {port}",
            f"UDP is blocked on the way, or the gateway listens at another port: allow UDP {port} "
            "at the firewalls on both sides, or try another network (a phone's, say)",
        )
    else:
        findings.add(
            "net.udp",
            Status.FAIL,
            f"nothing at all comes back from {shown}, neither UDP at port {port} nor TCP",
            "is that the gateway's address, does its host run, and is this network up? A firewall "
            "that drops everything looks the same",
        )


def judge_mtu_up(findings: Findings, evidence: Evidence, settings: GatewaySettings) -> None:
    """``net.mtu.up``: the largest UDP payload that reaches the gateway whole."""
    check_id = "net.mtu.up"
    if findings.has_failed("net.udp"):
        findings.follow((check_id,), "net.udp")
        return
    largest = max((size for each in evidence.path for size in each.round_trips_s), default=0)
    if not largest:
        findings.add(
            check_id,
            Status.SKIP,
            "cannot be told: the gateway, or a firewall, does not answer QUIC version probes",
        )
        return
    used = settings.initial_packet_bytes
    best = max(evidence.path, key=lambda each: max(each.round_trips_s, default=0))
    facts: dict[str, Fact] = {"largest_bytes": largest, "used_bytes": used}
    if used <= largest:
        said = f"UDP payloads of {largest} bytes reach the gateway, mtu = {used} is used"
        findings.add(check_id, Status.PASS, said, facts=facts)
        return
    where = "this host's own link" if used in best.too_large else "something on the way"
    works = bool(evidence.ping.address or evidence.tunnel.status)
    findings.add(
        check_id,
        # an engine may have found out by itself; that costs time at each beginning
        Status.WARN if works else Status.FAIL,
        f"UDP payloads of {largest} bytes reach the gateway, those of {used} do not: {where} is "
        "narrower",
        f"set mtu = {largest}; or raise the MTU of the link or tunnel in between, or let ICMP "
        "'packet too big' through",
        facts=facts,
    )


def judge_mtu_down(findings: Findings, evidence: Evidence) -> None:
    """``net.mtu.down``: the largest payload that comes back from the gateway in one packet."""
    check_id = "net.mtu.down"
    tunnel = evidence.tunnel
    if not (tunnel.has_measured_sizes or tunnel.came_back):
        cause = findings.first_failed(
            "h3.connect", "masque.connect_udp", "masque.connect_udp.datagram"
        )
        if cause is not None:
            findings.follow((check_id,), cause)
        else:
            findings.add(check_id, Status.SKIP, f"not checked: {_NO_TIME}")
        return
    whole = max((size for size, is_whole in tunnel.came_back.items() if is_whole), default=0)
    lost = [size for size in tunnel.sizes_sent if size not in tunnel.came_back]
    facts: dict[str, Fact] = {"largest_payload_bytes": whole}
    if tunnel.largest_up_bytes > 0:
        facts["largest_payload_up_bytes"] = tunnel.largest_up_bytes
    if lost and tunnel.has_measured_sizes:
        findings.add(
            check_id,
            Status.WARN,
            f"payloads of {min(lost)} bytes do not come back"
            + (f", those of {whole} do" if 0 < whole < min(lost) else ""),
            "the way back is narrower than the gateway believes: set [quic] max_packet_bytes and "
            "initial_packet_bytes at the gateway to a smaller value, such as 1252",
            facts=facts,
        )
    elif whole < _INNER_QUIC_BYTES:
        findings.add(
            check_id,
            Status.WARN,
            f"payloads come back, but those of {_INNER_QUIC_BYTES} bytes only in pieces",
            "QUIC through a tunnel will be slow; raise the path's MTU (1,300 bytes of UDP payload "
            "do), or [quic] initial_packet_bytes at the gateway",
            facts=facts,
        )
    else:
        said = f"payloads of {whole} bytes come back in one packet each, larger ones in pieces"
        findings.add(check_id, Status.PASS, said, facts=facts)


def judge_latency(findings: Findings, evidence: Evidence) -> None:
    """``net.latency``: round trip and loss."""
    check_id = "net.latency"
    tunnel = evidence.tunnel
    if not tunnel.has_measured_loss:
        cause = findings.first_failed(
            "h3.connect", "masque.connect_udp", "masque.connect_udp.datagram"
        )
        if cause is not None:
            findings.follow((check_id,), cause)
        else:
            findings.add(check_id, Status.SKIP, f"not checked: {_NO_TIME}")
        return
    trips, sent = tunnel.round_trips_s, tunnel.echoes_sent
    lost = sent - len(trips)
    facts: dict[str, Fact] = {"echoes": sent, "lost": lost}
    said = f"{lost} of {sent} echoes lost"
    if trips:
        median, least, most = statistics.median(trips), min(trips), max(trips)
        facts |= {
            "round_trip_ms": round(median * 1e3, 1),
            "round_trip_least_ms": round(least * 1e3, 1),
            "round_trip_most_ms": round(most * 1e3, 1),
        }
        said += (
            f", round trip {median * 1e3:.1f} ms (from {least * 1e3:.1f} to {most * 1e3:.1f} ms)"
        )
    if lost / sent >= _MUCH_LOSS:
        findings.add(
            check_id,
            Status.WARN,
            said,
            "the way loses packets: try a cable instead of radio, or another network; see "
            "toppy-gw status for drops at the gateway",
            facts=facts,
        )
    else:
        findings.add(check_id, Status.PASS, said, facts=facts)


def judge_nat(findings: Findings, evidence: Evidence) -> None:
    """``net.nat``: how the gateway sees this host, and whether that changed during the run."""
    check_id = "net.nat"
    tunnel = evidence.tunnel
    seen = tunnel.facts.client_address if tunnel.facts is not None else None
    if seen is None:
        cause = findings.first_failed("h3.connect", "masque.connect_udp")
        if cause is not None:
            findings.follow((check_id,), cause)
        else:
            said = "not checked: the gateway does not say which address it sees"
            findings.add(check_id, Status.SKIP, said)
        return
    own_hosts = {each.local_host for each in evidence.path if each.local_host}
    facts: dict[str, Fact] = {"seen": _shown(seen), "local_port": tunnel.local_port}
    later = tunnel.facts_later.client_address if tunnel.facts_later is not None else None
    if later is not None and later != seen:
        findings.add(
            check_id,
            Status.WARN,
            f"the gateway saw {_shown(seen)}, and a moment later {_shown(later)}: a NAT rebinds, "
            "or the route changed",
            "QUIC connections go on, others may not; look at the NAT's UDP timeout and at "
            "routes that take turns",
            facts={**facts, "seen_later": _shown(later)},
        )
    elif own_hosts and seen[0] not in own_hosts:
        kept = "keeps" if seen[1] == tunnel.local_port else "changes"
        said = f"behind a NAT that {kept} the port: the gateway sees {_shown(seen)}"
        findings.add(check_id, Status.PASS, said, facts={**facts, "is_behind_nat": True})
    else:
        said = f"no NAT on the way: the gateway sees {_shown(seen)}"
        findings.add(check_id, Status.PASS, said, facts={**facts, "is_behind_nat": False})


def answers_only_small(evidence: Evidence, largest: int = _INNER_QUIC_BYTES) -> bool:
    """Whether the gateway completed a handshake in packets of 1,200 bytes, and none in its own
    size: then it is the way back that is too narrow.
    """
    tunnel, ping = evidence.tunnel, evidence.ping
    is_silent = ping.address is None and ping.trouble is not None and ping.trouble.is_timeout
    others = [size for each in evidence.path for size in each.round_trips_s if size > largest]
    return bool(evidence.chain and is_silent and not tunnel.status and others)


def _shown(address: Address) -> str:
    host = f"[{address[0]}]" if ":" in address[0] else address[0]
    return f"{host}:{address[1]}"
