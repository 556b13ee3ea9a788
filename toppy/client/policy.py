"""The client's own policy: asked before a socket opens (T-040, T-041)."""

from __future__ import annotations

from toppy.client.lookup import NameLookupError, look_up_now
from toppy.config.address import parse_host_port
from toppy.config.client import ClientConfig
from toppy.errors import ConfigError, DeniedError
from toppy.model.identity import Identity
from toppy.model.target import Target
from toppy.policy.ruleset import Ruleset
from toppy.wire.connect_udp import RequestError, parse_host


def parse_target(option: str, text: str) -> Target:
    """``HOST:PORT`` with a name or an address. Raises ``ConfigError``."""
    try:
        host, port = parse_host_port(text, may_be_zero=False)
        return Target(parse_host(host), port)
    except (ValueError, RequestError) as error:
        raise ConfigError(f"{option}: {error}") from None


def check_policy(config: ClientConfig, target: Target) -> None:
    """Raise ``DeniedError`` unless the client's own policy allows ``target`` (T-040, T-041).

    Where only an address can decide about a name, it is resolved here, within
    ``LOOKUP_TIMEOUT_S``, and every address must be allowed.
    """
    if config.policy is None:
        raise DeniedError(
            f"target {target} is not allowed: the configuration has no [policy], and what is not "
            "allowed is denied"
        )
    ruleset = Ruleset(config.policy.allow, guards_special=False)
    identity = Identity("", "none")
    decision = ruleset.decide_name(identity, target)
    if decision is None:
        addresses = _resolve(target)
        decision = ruleset.decide(identity, target, addresses)
        if decision.is_allowed and len(decision.addresses) != len(addresses):
            raise DeniedError(
                f"target {target} is not allowed: it has addresses that no rule allows"
            )
    if not decision.is_allowed:
        raise DeniedError(decision.reason, rule=decision.rule)


def _resolve(target: Target) -> list[str]:
    try:
        found = look_up_now(target.host, target.port)
    except NameLookupError as error:
        raise DeniedError(
            f"target {target} is not allowed: its name cannot be resolved here ({error}) to "
            f'compare it with the cidr rules; add a rule with host = "{target.host}"'
        ) from None
    return [address for address, _ in found]
