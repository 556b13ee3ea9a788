"""``toppy doctor``: what works on the way to the gateway, and what to do about what does not.

Check IDs, statuses and the JSON shape are T-080 to T-087. A check that cannot run because an
earlier one failed says so and warns.
"""

from __future__ import annotations

import asyncio
import errno
import os
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from toppy import __version__
from toppy.auth.oidc import OidcError
from toppy.auth.token_cache import TokenCacheError
from toppy.client.lookup import NameLookupError, look_up
from toppy.client.policy import check_policy, parse_target
from toppy.client.probe import Probe, ProbeError, ProbeRefusedError
from toppy.client.session import GatewaySettings
from toppy.client.settings import LoadedClientConfig, gateway_settings, load_client_config
from toppy.client.tokens import LoginRequiredError, login_settings, token_source
from toppy.errors import ConfigError, DeniedError
from toppy.model.target import Target
from toppy.quic.choose import SLOW_ENGINE_NOTICE, choose_engine
from toppy.quic.endpoint import H3_ALPN, PING_ALPN
from toppy.quic.engine import Address
from toppy.wire.connect_udp import DEFAULT_TEMPLATE_PATH

PING_TIMEOUT_S = 0.8
"""With CONNECT_UDP_TIMEOUT_S of T-085; each has the handshake in it, so a path with a round trip
of more than 200 ms fails although `toppy udp` would work on it."""
CONNECT_UDP_TIMEOUT_S = 1.2
ECHO_TIMEOUT_S = 1.2
_TUN = "/dev/net/tun"
_SANE_MTU = (1200, 9000)
_ETHERNET_PAYLOAD_BYTES = 1452
"""1,500 without the headers of IPv6 and UDP."""
_NO_ANSWER = (
    "no answer in time: is the gateway running (toppy-gw status there), are gateway and port "
    "right, and may UDP pass?"
)
_NO_ECHO = (
    "the tunnel is open, but no datagram came back in time: something on the way may drop larger "
    "UDP packets (try mtu = 1200), or the gateway drops (toppy-gw status there says why)"
)


class Status(IntEnum):
    """From best to worst."""

    PASS = 0
    WARN = 1
    FAIL = 2


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report."""

    check_id: str
    status: Status
    summary: str


@dataclass(slots=True)
class Report:
    """Everything that was found."""

    checks: list[Check] = field(default_factory=list)

    def add(self, check_id: str, status: Status, summary: str) -> None:
        """One more finding."""
        self.checks.append(Check(check_id, status, summary))

    @property
    def overall(self) -> Status:
        """The worst."""
        return max((check.status for check in self.checks), default=Status.PASS)

    def as_json(self) -> dict[str, Any]:
        """T-080."""
        return {
            "version": __version__,
            "overall": self.overall.name.lower(),
            "checks": [
                {"id": c.check_id, "status": c.status.name.lower(), "summary": c.summary}
                for c in self.checks
            ],
        }

    def as_text(self) -> str:
        """T-080."""
        lines = [f"doctor: {self.overall.name.lower()}", f"version: {__version__}"]
        lines += [f"- [{c.status.name.lower()}] {c.check_id}: {c.summary}" for c in self.checks]
        return "\n".join(lines)


NETWORK_CHECKS = ("net.dns", "h3.connect", "masque.connect_udp", "masque.connect_udp.datagram")


async def examine(flag: str | None, environ: Mapping[str, str]) -> Report:
    """Run every check, in the order in which one needs another."""
    report = Report()
    loaded = _check_configuration(report, flag, environ)
    settings = None
    forced = environ.get("TOPPY_DOCTOR_NET", "")
    if loaded is not None:
        authorization = None if forced else await _check_login(report, loaded, environ)
        try:
            settings = gateway_settings(loaded, authorization)
        except ConfigError as error:
            # the file is there, but not what it names: the configuration cannot be used
            report.checks[0] = Check("cfg.load", Status.FAIL, str(error))
    if forced:
        _force(report, NETWORK_CHECKS, forced, "TOPPY_DOCTOR_NET")
    elif loaded is None or settings is None:
        _skip(report, NETWORK_CHECKS, "the configuration cannot be used; mend cfg.load first")
    else:
        await _check_network(report, loaded, settings)
    _check_tun(report, environ.get("TOPPY_DOCTOR_TUN", ""))
    _check_mtu(report, loaded)
    if environ.get("TOPPY_DOCTOR_TARGET"):
        _check_policy(report, loaded, environ["TOPPY_DOCTOR_TARGET"])
    return report


def _force(report: Report, check_ids: tuple[str, ...], value: str, variable: str) -> None:
    """The environment says what these checks find (T-082)."""
    status = {"pass": Status.PASS, "fail": Status.FAIL, "skip": Status.WARN}.get(value.lower())
    for check_id in check_ids:
        if status is None:
            report.add(check_id, Status.FAIL, f"{variable} must be pass, fail or skip")
        else:
            report.add(
                check_id, status, f"{variable}={value}: nothing was checked, unset it to check"
            )


def _skip(report: Report, check_ids: tuple[str, ...], reason: str) -> None:
    for check_id in check_ids:
        report.add(check_id, Status.WARN, f"skipped: {reason}")


def _check_configuration(
    report: Report, flag: str | None, environ: Mapping[str, str]
) -> LoadedClientConfig | None:
    try:
        loaded = load_client_config(flag, environ)
        engine = choose_engine(loaded.config.quic.engine)
    except ConfigError as error:
        report.add("cfg.load", Status.FAIL, str(error))
        return None
    said = f"{loaded.path}, engine {engine}"
    if loaded.warnings:
        report.add("cfg.load", Status.WARN, "; ".join([said, *loaded.warnings]))
    elif engine == "aioquic" and loaded.config.quic.engine == "auto":
        report.add("cfg.load", Status.WARN, f"{said}; {SLOW_ENGINE_NOTICE}")
    else:
        report.add("cfg.load", Status.PASS, said)
    return loaded


async def _check_login(
    report: Report, loaded: LoadedClientConfig, environ: Mapping[str, str]
) -> str | None:
    """The login's token, renewed where it is too old (T-088)."""
    if login_settings(loaded, environ) is None:
        return None
    try:
        source = await token_source(loaded, environ)
    except (LoginRequiredError, OidcError, TokenCacheError) as error:
        report.add("auth.login", Status.FAIL, str(error))
        return None
    report.add("auth.login", Status.PASS, "logged in, the token is good")
    return source.authorization


async def _check_network(
    report: Report, loaded: LoadedClientConfig, settings: GatewaySettings
) -> None:
    """DNS, ping, tunnel, datagram: each needs the one before."""
    addresses = await _check_dns(report, settings)
    rest = NETWORK_CHECKS[1:]
    if not addresses:
        _skip(report, rest, "the gateway's name does not resolve; mend net.dns first")
        return
    missing = [
        key
        for key, value in (
            ("ca_cert_path", loaded.config.ca_cert_path),
            ("auth_token", settings.authorization),
        )
        if value is None
    ]
    note = f" ({' and '.join(missing)} not set)" if missing else ""
    if loaded.config.gateway_template is not None:
        _skip(
            report,
            rest,
            "gateway_template names another proxy, which has no built-in echo; try `toppy udp`",
        )
        return
    address = await _check_ping(report, settings, addresses, note)
    if address is None:
        _skip(report, rest[1:], "the gateway cannot be reached; mend h3.connect first")
        return
    await _check_tunnel(report, settings, address)


async def _check_dns(report: Report, settings: GatewaySettings) -> list[Address]:
    try:
        addresses = await look_up(settings.host, settings.port)
    except NameLookupError as error:
        report.add(
            "net.dns",
            Status.FAIL,
            f"{settings.host} does not resolve ({error}); check `gateway` and this host's DNS",
        )
        return []
    shown = ", ".join(host for host, _ in addresses)
    report.add("net.dns", Status.PASS, f"{settings.host} is {shown}")
    return addresses


async def _check_ping(
    report: Report, settings: GatewaySettings, addresses: Sequence[Address], note: str
) -> Address | None:
    """The address that answered, if one did and takes the token."""
    reached: list[Address] = []

    async def ping() -> tuple[Status, str]:
        async with Probe(settings, addresses, PING_ALPN) as probe:
            address, took_s = await probe.connect()
            reached.append(address)
            answer = await probe.ping()
        if answer == "pong":
            return Status.PASS, (
                f"certificate and token are good at {address[0]}, handshake {took_s * 1e3:.1f} ms"
            )
        return Status.FAIL, (
            f"the gateway answers {answer!r}: it does not accept the token{note}; "
            "set auth_token (or [auth] token) to one that it knows"
        )

    status, summary = await _within(PING_TIMEOUT_S, ping, note)
    if not reached and settings.initial_packet_bytes > _ETHERNET_PAYLOAD_BYTES:
        summary += f"; mtu = {settings.initial_packet_bytes} needs jumbo frames, try mtu = 1350"
    report.add("h3.connect", status, summary)
    return None if status is Status.FAIL else reached[0]


async def _check_tunnel(report: Report, settings: GatewaySettings, address: Address) -> None:
    template = f"https://{Target(settings.host, settings.port)}{DEFAULT_TEMPLATE_PATH}"
    async with Probe(settings, [address], H3_ALPN) as probe:

        async def handshake() -> tuple[Status, str]:
            await probe.connect()
            await probe.open_echo(template)
            return Status.PASS, "the gateway opened a tunnel to its echo"

        async def echo() -> tuple[Status, str]:
            took_s = await probe.echo()
            return Status.PASS, f"an HTTP Datagram came back in {took_s * 1e3:.1f} ms"

        status, summary = await _within(CONNECT_UDP_TIMEOUT_S, handshake)
        report.add("masque.connect_udp", status, summary)
        if status is Status.FAIL:
            _skip(report, NETWORK_CHECKS[3:], "there is no tunnel; mend masque.connect_udp first")
            return
        status, summary = await _within(ECHO_TIMEOUT_S, echo, no_answer=_NO_ECHO)
        report.add("masque.connect_udp.datagram", status, summary)


async def _within(
    deadline_s: float,
    check: Callable[[], Awaitable[tuple[Status, str]]],
    note: str = "",
    *,
    no_answer: str = _NO_ANSWER,
) -> tuple[Status, str]:
    try:
        async with asyncio.timeout(deadline_s):
            return await check()
    except TimeoutError:
        return Status.FAIL, no_answer
    except ProbeRefusedError as error:  # says by itself what to do
        return Status.FAIL, f"{error}{note}"
    except ProbeError as error:
        return Status.FAIL, f"{error}; {_advice(str(error))}{note}"
    except ConfigError as error:
        return Status.FAIL, str(error)


def _advice(reason: str) -> str:
    if "certificate" in reason.lower():
        return "check ca_cert_path and server_name, and the gateway's certificate"
    return "check gateway and port, and look at the gateway's log"


def _check_tun(report: Report, forced: str) -> None:
    """Whether a TUN device could be used; only later commands need one (T-087)."""
    if forced:
        _force(report, ("tun.perm",), forced, "TOPPY_DOCTOR_TUN")
        return
    if not sys.platform.startswith("linux"):
        report.add(
            "tun.perm", Status.WARN, "skipped: checked on Linux only; `toppy udp` needs no TUN"
        )
        return
    try:
        os.close(os.open(_TUN, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        advice = (
            "run `modprobe tun`"
            if error.errno in (errno.ENOENT, errno.ENODEV)
            else "run as root, or give this user CAP_NET_ADMIN and access to the device"
        )
        report.add(
            "tun.perm",
            Status.WARN,
            f"{_TUN}: {error.strerror}; `toppy udp` needs no TUN, a VPN would: {advice}",
        )
        return
    report.add("tun.perm", Status.PASS, f"{_TUN} can be opened")


def _check_mtu(report: Report, loaded: LoadedClientConfig | None) -> None:
    """T-083."""
    mtu = loaded.config.mtu if loaded is not None else None
    low, high = _SANE_MTU
    if loaded is None:
        report.add("mtu.sanity", Status.WARN, "skipped: mend cfg.load first")
    elif mtu is None:
        report.add("mtu.sanity", Status.WARN, "mtu is not set; mtu = 1350 is recommended")
    elif not low <= mtu <= high:
        report.add(
            "mtu.sanity",
            Status.WARN,
            f"mtu = {mtu} is outside {low} to {high}; mtu = 1350 is recommended",
        )
    else:
        report.add("mtu.sanity", Status.PASS, f"mtu = {mtu}")


def _check_policy(report: Report, loaded: LoadedClientConfig | None, text: str) -> None:
    """T-081: what this client's policy says about ``TOPPY_DOCTOR_TARGET``."""
    if loaded is None:
        report.add("policy.denied", Status.WARN, "skipped: mend cfg.load first")
        return
    try:
        target = parse_target("TOPPY_DOCTOR_TARGET", text)
        if loaded.config.policy is None:
            report.add(
                "policy.denied",
                Status.WARN,
                "there is no [policy], so everything is denied; add [[policy.allow]] rules",
            )
            return
        check_policy(loaded.config, target)
    except ConfigError as error:
        report.add("policy.denied", Status.FAIL, str(error))
    except DeniedError as error:
        report.add("policy.denied", Status.FAIL, f"{error}; add a [[policy.allow]] rule for it")
    else:
        report.add("policy.denied", Status.PASS, f"{target} is allowed")
