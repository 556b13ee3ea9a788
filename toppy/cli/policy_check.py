"""What ``policy check`` finds out, and how it says it."""

from __future__ import annotations

import asyncio
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from toppy.auth.issuer import RoleMapping, roles_of
from toppy.cli.login import ask_passphrase
from toppy.client.policy import decide_here, own_ruleset, parse_target
from toppy.client.settings import LoadedClientConfig, load_client_config
from toppy.client.tokens import own_identity
from toppy.config.address import parse_host_port
from toppy.config.gateway import GatewayConfig
from toppy.config.policy_time import parse_moment
from toppy.control.authorization import Authorizer, OwnService
from toppy.control.settings import config_path, load_config
from toppy.errors import ConfigError, TargetError, ToppyError
from toppy.model.identity import ClaimValue, Identity
from toppy.model.target import Protocol, Target
from toppy.net.resolver import Resolver
from toppy.policy.criteria import is_address
from toppy.policy.ruleset import Decision, RuleFinding, Ruleset

EXIT_ALLOWED, EXIT_ERROR, EXIT_DENIED = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Answer:
    """What the policy says, and on what."""

    source: str
    """The configuration file."""
    identity: Identity
    target: Target
    at: float
    """Unix time."""
    decision: Decision
    addresses: tuple[str, ...]
    """Those that were judged."""
    resolution: str
    """How they came from the target's host."""
    rules: tuple[RuleFinding, ...]

    def as_json(self) -> dict[str, Any]:
        """Facts for programs; ``docs/policy.md`` has the table."""
        decision = self.decision
        return {
            "allowed": decision.is_allowed,
            "rule": decision.rule,
            "reason": decision.reason,
            "subject": self.identity.subject,
            "roles": list(self.identity.roles),
            "groups": list(self.identity.groups),
            "target": str(self.target),
            "protocol": self.target.protocol,
            "at": _iso(self.at),
            "until": _iso(decision.until) if decision.until is not None else None,
            "resolution": self.resolution,
            "addresses": [
                {"address": address, "allowed": address in decision.addresses}
                for address in self.addresses
            ],
            "configuration": self.source,
            "rules": [
                {
                    "name": each.name,
                    "action": each.action,
                    "matches": each.matches,
                    "reasons": list(each.reasons),
                }
                for each in self.rules
            ],
        }

    def as_text(self, *, explains: bool, protocols: str) -> str:
        """Facts for people. ``protocols``: the word for what they hold for."""
        decision = self.decision
        word = "allow" if decision.is_allowed else "deny"
        who = self.identity.subject or "nobody"
        lines = [f"{word}: {self.target} ({protocols}) for {who}"]
        lines.append(f"rule: {decision.rule}")
        if decision.reason:
            lines.append(f"reason: {decision.reason}")
        if self.addresses:
            shown = (
                address if address in decision.addresses else f"{address} (not allowed)"
                for address in self.addresses
            )
            lines.append(f"addresses: {', '.join(shown)}")
        if self.resolution:
            lines.append(f"names: {self.resolution}")
        if decision.until is not None:
            lines.append(f"until: {_iso(decision.until)}, then live tunnels are closed")
        if explains:
            lines.append(f"rules of {self.source}:")
            for each in self.rules:
                lines.append(f"  {each.action:5} {each.name}: {_finding(each, decision.rule)}")
            if not self.rules:
                lines.append("  none: what no rule allows is denied")
        return "\n".join(lines)


def _finding(found: RuleFinding, deciding: str) -> str:
    why = "; ".join(found.reasons)
    if not found.matches:
        return f"does not match: {why}"
    if found.name == deciding:
        return "matches, and decides"
    return f"matches, but {why}" if why else "matches, but another one decides"


def show(
    program: str,
    find: Callable[[], Sequence[Answer]],
    *,
    explains: bool,
    as_json: bool,
    is_list: bool,
) -> int:
    """Print what ``find`` answers, or why it cannot; the exit code: allowed only if all is.

    ``is_list``: the JSON is an array of all answers, not the object of one.
    """
    try:
        answers = find()
    except ToppyError as error:
        if as_json:
            print(json.dumps({"error": str(error)}, indent=2))
        print(f"{program} policy check: {error}", file=sys.stderr)
        return EXIT_ERROR
    if as_json:
        facts = [answer.as_json() for answer in answers]
        print(json.dumps(facts if is_list else facts[0], indent=2))
    else:
        print(_text(answers, explains=explains))
    return EXIT_ALLOWED if all(each.decision.is_allowed for each in answers) else EXIT_DENIED


def _text(answers: Sequence[Answer], *, explains: bool) -> str:
    """Each answer; once, where they say the same of both protocols."""
    both = " and ".join(each.target.protocol for each in answers)
    shared = {each.as_text(explains=explains, protocols=both) for each in answers}
    if len(shared) == 1:
        return shared.pop()
    return "\n".join(
        each.as_text(explains=explains, protocols=each.target.protocol) for each in answers
    )


def check_client(
    config: str | None,
    environ: Mapping[str, str],
    target: str,
    protocols: Sequence[Protocol],
    at: str | None,
) -> list[Answer]:
    """What the client's own policy says of each protocol for whom its token names. Raises
    ``ToppyError``.
    """
    loaded = load_client_config(config, environ)
    for warning in loaded.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    wanted = [parse_target("--target", target, protocol) for protocol in protocols]
    now = _moment(at)
    who = own_identity(loaded, environ, ask_passphrase)
    return [_client_answer(loaded, who, where, now) for where in wanted]


def _client_answer(loaded: LoadedClientConfig, who: Identity, where: Target, now: float) -> Answer:
    found = decide_here(loaded.config, where, who, now)
    ruleset = own_ruleset(loaded.config)
    if found.unresolved:
        resolution = f"{where.host} has no address here: {found.unresolved}"
    elif found.addresses and where.host not in found.addresses:
        resolution = f"{where.host} was resolved by this host; every address must be allowed"
    elif not found.addresses and not is_address(where.host):
        resolution = "the target is decided as it is written; the gateway resolves it"
    else:
        resolution = ""
    return Answer(
        str(loaded.path),
        ruleset.with_roles(who, where),
        where,
        now,
        found.decision,
        found.addresses,
        resolution,
        ruleset.explain(who, where, found.addresses, now=now),
    )


def check_gateway(
    config: str | None,
    environ: Mapping[str, str],
    target: str,
    protocols: Sequence[Protocol],
    at: str | None,
    *,
    subject: str,
    roles: Sequence[str],
    groups: Sequence[str],
    claims: Sequence[str],
) -> list[Answer]:
    """What the gateway of this configuration would say of each protocol to a client whose
    credential proves all this. Raises ``ToppyError``.
    """
    loaded = load_config(config_path(config, environ), environ)
    for warning in loaded.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    settings = loaded.config
    wanted = [parse_target("--target", target, protocol) for protocol in protocols]
    now = _moment(at)
    said = parse_claims(claims)
    mappings = (
        RoleMapping(each.role, each.claim, each.values) for each in settings.auth.oidc.roles
    )
    given = roles_of({**said, "groups": list(groups)}, mappings)
    identity = Identity(
        subject,
        "jwt",
        {name: values[0] for name, values in said.items() if len(values) == 1},
        roles=tuple(dict.fromkeys((*roles, *given))),
        groups=tuple(groups),
    )
    source = str(config_path(config, environ) or "environment")
    return [_gateway_answer(settings, source, identity, where, now) for where in wanted]


def _gateway_answer(
    settings: GatewayConfig, source: str, identity: Identity, where: Target, now: float
) -> Answer:
    ruleset = Ruleset(settings.policy.rules, roles=settings.policy.roles)
    nameservers = settings.resolver.nameservers
    authorizer = Authorizer(
        ruleset,
        Resolver(nameservers, settings.resolver.timeout_s),
        lambda: now,
        _own_services(settings.listen.quic, settings.listen.health),
    )
    resolver = (
        f"the nameservers of the configuration ({', '.join(nameservers)})"
        if nameservers
        else "this host's hosts file and nameservers"
    )
    try:
        found = asyncio.run(authorizer.authorize(identity, where))
    except TargetError as error:
        raise TargetError(
            f"{error}; asked were {resolver}. The rules would have it resolved: a gateway answers "
            f"{error.status}",
            status=error.status,
            proxy_status=error.proxy_status,
        ) from None
    if where.host in found.addresses:
        resolution = ""
    elif found.addresses:
        resolution = f"resolved by {resolver}, as the gateway does"
    else:
        resolution = "not resolved: no address could change the decision"
    return Answer(
        source,
        ruleset.with_roles(identity, where),
        where,
        now,
        found.decision,
        found.addresses,
        resolution,
        ruleset.explain(identity, where, found.addresses, found.own_addresses, now=now),
    )


def _own_services(quic: Sequence[str], health: str) -> list[OwnService]:
    found = [OwnService("udp", *parse_host_port(text)) for text in quic]
    if health:
        found.append(OwnService("tcp", *parse_host_port(health)))
    return found


def parse_claims(written: Sequence[str]) -> dict[str, list[ClaimValue]]:
    """``name=value``, each name perhaps several times. Raises ``ConfigError``."""
    claims: dict[str, list[ClaimValue]] = {}
    for text in written:
        name, separator, value = text.partition("=")
        if not separator or not name:
            raise ConfigError(f"--claim: {text!r} is no claim; write team=ops")
        claims.setdefault(name, []).append(_scalar(value))
    return claims


def _scalar(text: str) -> ClaimValue:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    is_number = isinstance(value, int | float) and math.isfinite(value)
    return value if is_number or isinstance(value, str) else text


def _moment(at: str | None) -> float:
    if at is None:
        return time.time()
    try:
        return parse_moment(at, UTC).timestamp()
    except ValueError as error:
        raise ConfigError(f"--at: {error}") from None


def _iso(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
