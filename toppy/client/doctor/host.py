"""What the doctor finds without the network: configuration, TUN, MTU, the client's own policy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from toppy.auth.token_cache import TokenCacheError
from toppy.client.doctor.report import Findings, Status
from toppy.client.own_identity import NOBODY
from toppy.client.policy import check_policy, parse_target
from toppy.client.settings import DEFAULT_MTU, LoadedClientConfig, load_client_config
from toppy.client.tokens import own_identity
from toppy.errors import ConfigError, DeniedError
from toppy.model.target import Protocol
from toppy.quic.choose import SLOW_ENGINE_NOTICE, choose_engine
from toppy.system.tun_probe import TunAnswer, TunProbe

_SANE_MTU = (1200, 9000)
FORCED = {"pass": Status.PASS, "fail": Status.FAIL, "skip": Status.WARN}


def force(findings: Findings, check_ids: tuple[str, ...], value: str, variable: str) -> None:
    """The environment says what these checks find (T-082)."""
    status = FORCED.get(value.lower())
    for check_id in check_ids:
        if status is None:
            findings.add(
                check_id,
                Status.FAIL,
                f"{variable} must be pass, fail or skip",
                f"mend or unset {variable}",
            )
        else:
            said = f"{variable}={value}: nothing was checked"
            findings.add(check_id, status, said, f"unset {variable} to check")


def check_configuration(
    findings: Findings, flag: str | None, environ: Mapping[str, str]
) -> LoadedClientConfig | None:
    """``cfg.load``."""
    try:
        loaded = load_client_config(flag, environ)
        engine = choose_engine(loaded.config.quic.engine)
    except ConfigError as error:
        findings.add("cfg.load", Status.FAIL, str(error))
        return None
    said = f"{loaded.path}, engine {engine}"
    if loaded.warnings:
        findings.add("cfg.load", Status.WARN, said, "; ".join(loaded.warnings))
    elif engine == "aioquic" and loaded.config.quic.engine == "auto":
        findings.add("cfg.load", Status.WARN, said, SLOW_ENGINE_NOTICE)
    else:
        findings.add("cfg.load", Status.PASS, said)
    return loaded


def check_tun(findings: Findings, probe: TunProbe, forced: str) -> None:
    """``tun.perm``: whether a TUN device could be used; only later commands need one (T-087)."""
    if forced:
        force(findings, ("tun.perm",), forced, "TOPPY_DOCTOR_TUN")
        return
    answer: TunAnswer = probe.check()
    if answer.is_usable:
        findings.add("tun.perm", Status.PASS, answer.summary)
    else:
        findings.add(
            "tun.perm",
            Status.WARN,
            f"{answer.summary}; `toppy udp` needs no TUN, a VPN would",
            answer.remedy or None,
        )


def check_mtu(findings: Findings, loaded: LoadedClientConfig | None) -> None:
    """``mtu.sanity`` (T-083)."""
    if loaded is None:
        findings.follow(("mtu.sanity",), "cfg.load")
        return
    mtu = loaded.config.mtu
    low, high = _SANE_MTU
    remedy = f"set mtu = {DEFAULT_MTU}, or what net.mtu.up says"
    if mtu is None:
        said = f"mtu is not set; mtu = {DEFAULT_MTU} is recommended"
        findings.add("mtu.sanity", Status.WARN, said, remedy)
    elif not low <= mtu <= high:
        said = f"mtu = {mtu} is outside {low} to {high}; mtu = {DEFAULT_MTU} is recommended"
        findings.add("mtu.sanity", Status.WARN, said, remedy, facts={"mtu": mtu})
    else:
        findings.add("mtu.sanity", Status.PASS, f"mtu = {mtu}", facts={"mtu": mtu})


def check_own_policy(
    findings: Findings,
    loaded: LoadedClientConfig,
    text: str,
    option: str,
    environ: Mapping[str, str],
    *,
    protocol: Protocol | None = None,
) -> None:
    """``policy.denied``: what this client's policy says about a target (T-081), or about one
    protocol of it. May look up a name and read the kept login: not for the event loop.
    """
    check_id = "policy.denied"
    try:
        target = parse_target(option, text)
    except ConfigError as error:
        findings.add(check_id, Status.FAIL, str(error), f"mend {option}")
        return
    if loaded.config.policy is None:
        findings.add(
            check_id,
            Status.WARN,
            f"there is no [policy], so everything is denied, {target} too",
            "add [[policy.allow]] rules: without them `toppy up` and `toppy udp` deny every target",
        )
        return
    try:
        who = own_identity(loaded, environ)
    except TokenCacheError:
        who = NOBODY  # auth.login says it
    allowed: list[str] = []
    denial: DeniedError | None = None
    protocols: tuple[Protocol, ...] = ("udp",)
    if protocol is not None:
        protocols = (protocol,)
    elif any(rule.protocol for rule in loaded.config.policy.rules):
        protocols = ("udp", "tcp")
    for each in protocols:
        try:
            check_policy(loaded.config, replace(target, protocol=each), who)
        except DeniedError as error:
            denial = denial or error
        else:
            allowed.append(each.upper())
    if denial is None:
        findings.add(check_id, Status.PASS, f"{target} is allowed")
    elif allowed:
        findings.add(check_id, Status.PASS, f"{target} is allowed for {allowed[0]} only")
    else:
        findings.add(check_id, Status.FAIL, str(denial), "add a [[policy.allow]] rule for it")


def days_and_hours(seconds: float) -> str:
    """``3 days``, ``5 hours``, ``12 minutes``, rounded down."""
    for size, name in ((86_400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= size:
            count = math.floor(seconds / size)
            return f"{count} {name}" if count == 1 else f"{count} {name}s"
    return "less than a minute"
