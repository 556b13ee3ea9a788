"""The client's own policy: asked before a socket opens (T-038, T-040, T-041)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from toppy.client.lookup import NameLookupError, look_up, look_up_now
from toppy.client.own_identity import identity_of_token
from toppy.config.address import parse_host_port
from toppy.config.client import ClientConfig
from toppy.errors import ConfigError, DeniedError
from toppy.model.identity import Identity
from toppy.model.target import Protocol, Target
from toppy.policy.ruleset import DEFAULT_RULE, Decision, Ruleset
from toppy.wire.connect_udp import RequestError, parse_host


def parse_target(option: str, text: str, protocol: Protocol = "udp") -> Target:
    """``HOST:PORT`` with a name or an address. Raises ``ConfigError``."""
    if text.strip().startswith(":"):
        raise ConfigError(f"{option}: {text!r} names no host; write HOST:PORT")
    try:
        host, port = parse_host_port(text, may_be_zero=False)
        return Target(parse_host(host), port, protocol)
    except (ValueError, RequestError) as error:
        raise ConfigError(f"{option}: {error}") from None


@dataclass(frozen=True, slots=True)
class OwnDecision:
    """What the client's policy says, and on what."""

    decision: Decision
    addresses: tuple[str, ...] = ()
    """What the name resolved to here, where that was needed; or the address that was asked for."""
    unresolved: str = ""
    """Why the name has no address here, where it needed one."""


def own_ruleset(config: ClientConfig) -> Ruleset:
    """The rules of ``[policy]``; none without it."""
    policy = config.policy
    if policy is None:
        return Ruleset((), guards_special=False)
    return Ruleset(policy.rules, roles=policy.roles, guards_special=False)


def decide_here(
    config: ClientConfig, target: Target, identity: Identity, now: float
) -> OwnDecision:
    """What the client's own policy says about ``target`` at ``now`` (Unix time).

    Where only an address can decide about a name, it is resolved here, within
    ``LOOKUP_TIMEOUT_S``, and every address must be allowed. Not to be called on an event loop.
    """
    decision = _decide_by_name(config, target, identity, now)
    if decision is not None:
        return decision
    try:
        found = look_up_now(target.host, target.port)
    except NameLookupError as error:
        return _unresolved(target, error)
    return _decide_by_addresses(config, target, identity, found, now)


async def decide_on_loop(
    config: ClientConfig, target: Target, identity: Identity, now: float
) -> OwnDecision:
    """The same as ``decide_here`` on an event loop."""
    decision = _decide_by_name(config, target, identity, now)
    if decision is not None:
        return decision
    try:
        found = await look_up(target.host, target.port)
    except NameLookupError as error:
        return _unresolved(target, error)
    return _decide_by_addresses(config, target, identity, found, now)


def _decide_by_name(
    config: ClientConfig, target: Target, identity: Identity, now: float
) -> OwnDecision | None:
    """None: the name's addresses decide."""
    if config.policy is None:
        return _denied(
            f"target {target} is not allowed: the configuration has no [policy], and what is not "
            "allowed is denied"
        )
    decision = own_ruleset(config).decide_name(identity, target, now=now)
    return OwnDecision(decision) if decision is not None else None


def _unresolved(target: Target, error: NameLookupError) -> OwnDecision:
    why = (
        f"target {target} is not allowed: its name cannot be resolved here ({error}) to "
        f'compare it with the cidr rules; add a rule with host = "{target.host}"'
    )
    return OwnDecision(Decision(False, (), DEFAULT_RULE, why), unresolved=str(error))


def _decide_by_addresses(
    config: ClientConfig,
    target: Target,
    identity: Identity,
    found: Sequence[tuple[str, int]],
    now: float,
) -> OwnDecision:
    ruleset = own_ruleset(config)
    addresses = tuple(address for address, _ in found)
    decision = ruleset.decide(identity, target, addresses, now=now)
    if decision.is_allowed and len(decision.addresses) != len(addresses):
        others = [address for address in addresses if address not in decision.addresses]
        refused = ruleset.decide(identity, target, others, now=now)
        why = f"target {target} is not allowed: it has addresses that no rule allows"
        decision = Decision(False, (), refused.rule, why)
    return OwnDecision(decision, addresses)


def check_policy(config: ClientConfig, target: Target, identity: Identity | None = None) -> None:
    """Raise ``DeniedError`` unless the client's own policy allows ``target`` now (T-040, T-041).

    ``identity`` is ``own_identity``'s; without it the configuration's token says who it is.
    """
    who = identity if identity is not None else identity_of_token(config)
    decision = decide_here(config, target, who, time.time()).decision
    if decision.is_allowed:
        return
    reason = decision.reason
    rules = config.policy.rules if config.policy is not None else ()
    is_nobody = not who.subject and any(rule.names_people for rule in rules)
    if is_nobody and decision.rule == DEFAULT_RULE:
        reason += " (there are rules for some people; nobody is logged in: run toppy login)"
    raise DeniedError(reason, rule=decision.rule)


def own_denial(error: DeniedError, path: Path) -> str:
    """A denial of ``check_policy`` with the file whose rules it is of, and what to do there."""
    what = "add a [[policy.allow]] there" if error.rule == DEFAULT_RULE else "see its rule there"
    return f"{error} (this client's policy, {path}; {what})"


def policy_warnings(config: ClientConfig) -> tuple[str, ...]:
    """Rules that can match nobody with this configuration, and why."""
    policy = config.policy
    if policy is None:
        return ()
    who = identity_of_token(config)
    has_login = config.auth is not None and config.token is None
    given = {each.role for each in policy.roles}
    warnings = []
    for rule in policy.rules:
        where = f"policy rule {rule.name!r}"
        missing = [role for role in rule.roles if role not in given]
        if rule.roles and len(missing) == len(rule.roles):
            warnings.append(
                f"{where} names the role {missing[0]!r}, which no [[policy.roles]] of this file "
                "gives: it matches nobody here (roles of the gateway are not known to a client)"
            )
        elif rule.names_people and not has_login and who.method == "none":
            warnings.append(
                f"{where} names people, and there is neither a token nor [auth]: it matches nobody"
            )
        elif (rule.groups or rule.claims) and not has_login and who.method == "static":
            warnings.append(
                f"{where} asks for claims, and the token is no JWT that has some: it matches nobody"
            )
    return tuple(warnings)


def _denied(reason: str) -> OwnDecision:
    return OwnDecision(Decision(False, (), DEFAULT_RULE, reason))
