"""``toppy doctor``: what works on the way to the gateway, and what to do about what does not.

Check IDs, statuses and the JSON shape are T-080 to T-087. First everything is asked at once
(``gather``), then the evidence is judged, causes before their consequences.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from cryptography import x509

from toppy.client.doctor.credentials import (
    judge_certificate,
    judge_client_certificate,
    judge_login,
    judge_token,
    unverified_claims,
)
from toppy.client.doctor.evidence import Evidence
from toppy.client.doctor.gateway import (
    TUNNEL_CHECKS,
    clock_skew_s,
    judge_clock,
    judge_handshake,
    judge_target,
    judge_tunnel,
    judge_version,
)
from toppy.client.doctor.gather import TOTAL_S, Gatherer, Network, Questions
from toppy.client.doctor.host import (
    check_configuration,
    check_mtu,
    check_own_policy,
    check_tun,
    force,
)
from toppy.client.doctor.path import (
    judge_dns,
    judge_latency,
    judge_mtu_down,
    judge_mtu_up,
    judge_nat,
    judge_udp,
)
from toppy.client.doctor.report import Findings, Report, Status
from toppy.client.lookup import look_up
from toppy.client.path_probe import (
    AddressFindings,
    TcpAnswer,
    fetch_certificate,
    probe_path,
    probe_tcp,
)
from toppy.client.policy import parse_target
from toppy.client.probe import Probe
from toppy.client.session import GatewaySettings
from toppy.client.settings import LoadedClientConfig, gateway_settings
from toppy.client.tokens import login_settings, token_source
from toppy.errors import ConfigError
from toppy.model.target import Protocol, Target
from toppy.quic.choose import choose_engine
from toppy.quic.engine import Address
from toppy.system.tun_probe import TunProbe, tun_probe

_NO_TIME = "not checked: there was no time left for it"
_BELOW = ("net.udp", "net.mtu.up", "tls.certificate")
_GATEWAY = ("auth.token", "h3.connect", *TUNNEL_CHECKS)
_THROUGH = ("net.mtu.down", "net.latency", "net.nat", "clock.skew", "gateway.version")
NETWORK_CHECKS = ("net.dns", *_BELOW, *_GATEWAY, *_THROUGH)
ORDER = (
    "cfg.load",
    "net.dns",
    "net.udp",
    "net.mtu.up",
    "tls.certificate",
    "tls.client_certificate",
    "auth.login",
    "auth.token",
    "h3.connect",
    *TUNNEL_CHECKS,
    *_THROUGH,
    "tun.perm",
    "mtu.sanity",
    "policy.denied",
    "policy.gateway",
)
"""Every check there is."""


class SystemNetwork:
    """``gather.Network``: the real one."""

    def __init__(self, loaded: LoadedClientConfig, environ: Mapping[str, str]) -> None:
        self._loaded = loaded
        self._environ = environ

    async def look_up(self, host: str, port: int) -> list[Address]:
        return await look_up(host, port)

    async def log_in(self) -> str | None:
        return (await token_source(self._loaded, self._environ)).authorization

    async def probe_path(
        self, addresses: Sequence[Address], sizes: Sequence[int], found: list[AddressFindings]
    ) -> None:
        await probe_path(addresses, sizes, found)

    async def probe_tcp(self, address: Address) -> TcpAnswer:
        return await probe_tcp(address)

    async def fetch_certificate(
        self, addresses: Sequence[Address], server_name: str
    ) -> tuple[x509.Certificate, ...]:
        return await fetch_certificate(addresses, server_name)

    def open_probe(
        self, settings: GatewaySettings, addresses: Sequence[Address], alpn_protocol: str
    ) -> Probe:
        return Probe(settings, addresses, alpn_protocol)


async def examine(
    flag: str | None,
    environ: Mapping[str, str],
    *,
    target: str | None = None,
    protocol: Protocol | None = None,
    network: Network | None = None,
    tun: TunProbe | None = None,
    unix_clock: Callable[[], float] = time.time,
) -> Report:
    """Run every check. ``flag`` is ``--config``, ``target`` is ``--target``, ``protocol`` is
    ``--protocol``: None asks about UDP and TCP.
    """
    findings = Findings()
    ends_at = asyncio.get_running_loop().time() + TOTAL_S
    loaded = check_configuration(findings, flag, environ)
    option = "--target" if target is not None else "TOPPY_DOCTOR_TARGET"
    asked_about = target if target is not None else environ.get("TOPPY_DOCTOR_TARGET", "")
    settings = None
    if loaded is not None:
        try:
            settings = gateway_settings(loaded)
        except ConfigError as error:
            # the file is there, but not what it names: the configuration cannot be used
            findings.add("cfg.load", Status.FAIL, str(error))

    check_mtu(findings, loaded)

    def ask_tun() -> Findings:
        found = Findings()
        check_tun(found, tun or tun_probe(environ), environ.get("TOPPY_DOCTOR_TUN", ""))
        return found

    def ask_own_policy() -> Findings:
        found = Findings()
        if loaded is not None:
            check_own_policy(found, loaded, asked_about, option, environ, protocol=protocol)
        return found

    beside = {"tun.perm": _beside(ask_tun)}
    if asked_about and loaded is None:
        findings.follow(("policy.denied",), "cfg.load")
    elif asked_about:
        beside["policy.denied"] = _beside(ask_own_policy)
    forced = environ.get("TOPPY_DOCTOR_NET", "")
    if forced:
        force(findings, NETWORK_CHECKS, forced, "TOPPY_DOCTOR_NET")
    elif loaded is None or settings is None:
        findings.follow(NETWORK_CHECKS, "cfg.load")
        if asked_about:
            findings.follow(("policy.gateway",), "cfg.load")
    else:
        questions = Questions(
            settings=settings,
            has_login=login_settings(loaded, environ) is not None,
            asks_gateway=loaded.config.gateway_template is None,
            target=_target(option, asked_about),
            protocols=("udp", "tcp") if protocol is None else (protocol,),
        )
        real = network or SystemNetwork(loaded, environ)
        evidence = await Gatherer(real, questions, unix_clock).run()
        _judge(findings, evidence, questions, loaded, unix_clock())
    left_s = max(0.0, ends_at - asyncio.get_running_loop().time())
    await asyncio.wait(beside.values(), timeout=left_s)
    for check_id, answer in beside.items():
        if answer.done():
            findings.add_all(answer.result())
        else:
            answer.cancel()
            findings.add(check_id, Status.SKIP, _NO_TIME)
    return findings.report(ORDER)


def _beside(call: Callable[[], Findings]) -> asyncio.Future[Findings]:
    """Run what may wait for the system beside the event loop; a program that ends does not wait."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Findings] = loop.create_future()

    def settle(found: Findings) -> None:
        if not done.done():
            done.set_result(found)

    def work() -> None:
        found = call()
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, found)

    threading.Thread(target=work, name="doctor", daemon=True).start()
    return done


def _target(option: str, text: str) -> Target | None:
    if text:
        with contextlib.suppress(ConfigError):  # policy.denied says it
            return parse_target(option, text)
    return None


def _judge(
    findings: Findings,
    evidence: Evidence,
    questions: Questions,
    loaded: LoadedClientConfig,
    unix_now: float,
) -> None:
    settings = questions.settings
    if questions.has_login:
        judge_login(findings, evidence)
    judge_client_certificate(findings, settings, unix_now)
    judge_dns(findings, evidence, settings)
    after_dns = [i for i in NETWORK_CHECKS if i != "net.dns"]
    if questions.target is not None:
        after_dns.append("policy.gateway")
    if findings.has_failed("net.dns"):
        findings.follow(tuple(after_dns), "net.dns")
        return
    judge_udp(findings, evidence, settings)
    judge_mtu_up(findings, evidence, settings)
    skew = clock_skew_s(evidence) or 0.0
    judge_certificate(findings, evidence, settings, unix_now)
    gateway = [i for i in after_dns if i not in _BELOW]
    if not questions.asks_gateway:
        for check_id in gateway:
            findings.add(
                check_id,
                Status.SKIP,
                "gateway_template names another proxy, which has no built-in echo; try `toppy udp`",
            )
        return
    if findings.has_failed("auth.login"):
        findings.follow(tuple(gateway), "auth.login")
        return
    judge_token(findings, evidence, unix_now - skew)
    judge_handshake(findings, evidence, settings, _missing(loaded, evidence))
    judge_tunnel(findings, evidence)
    judge_mtu_down(findings, evidence)
    judge_latency(findings, evidence)
    judge_nat(findings, evidence)
    has_jwt = evidence.token is not None and unverified_claims(evidence.token) is not None
    judge_clock(findings, evidence, has_jwt=has_jwt)
    judge_version(findings, evidence, choose_engine(settings.engine))
    if questions.target is not None:
        judge_target(findings, evidence, questions.target)


def _missing(loaded: LoadedClientConfig, evidence: Evidence) -> str:
    """T-084."""
    missing = [
        key
        for key, value in (
            ("ca_cert_path", loaded.config.ca_cert_path),
            ("auth_token", evidence.token),
        )
        if value is None
    ]
    return f" ({' and '.join(missing)} not set)" if missing else ""
