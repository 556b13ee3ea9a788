"""Policy: ordered rules, the first match decides, default deny. Pure functions of what is asked.

A rule matches when every criterion it has matches. Each resolved address is decided on its own;
special addresses (``address_guard``) need an allow rule whose network lies inside their range.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from toppy.config.policy import PolicyRule, name_rules
from toppy.model.identity import Identity
from toppy.model.target import Target
from toppy.policy.address_guard import Address, Network, embedded_address, special

DEFAULT_RULE = "default"
"""What answers call the rule that denies what no rule allows."""


@dataclass(frozen=True, slots=True)
class Decision:
    """Yes or no, and why."""

    is_allowed: bool
    addresses: tuple[str, ...]
    """The allowed ones, in the order given."""
    rule: str
    reason: str
    category: str = ""
    """For a denied special address: what it is."""


class Ruleset:
    """The rules of one revision."""

    def __init__(
        self,
        rules: Iterable[PolicyRule],
        *,
        revision: int = 0,
        guards_special: bool = True,
    ) -> None:
        """``guards_special`` is False on a client: what is special there is not at the gateway."""
        self._rules = name_rules(tuple(rules))
        self._guards_special = guards_special
        self.revision = revision

    def may_resolve(self, identity: Identity, target: Target) -> Decision:
        """Whether some rule could allow ``target`` whatever it resolves to.

        Ask before resolving, so that nobody makes us resolve names that no rule allows.
        """
        for rule in self._rules:
            if not _matches_request(rule, identity, target):
                continue
            if rule.action == "allow":
                return Decision(True, (), rule.name, "")
            if not rule.cidr:
                return self._denied(target, rule.name)
        return self._denied(target, DEFAULT_RULE)

    def decide_name(self, identity: Identity, target: Target) -> Decision | None:
        """A decision that needs no address; None when a rule has to see the addresses first."""
        for rule in self._rules:
            if not _matches_request(rule, identity, target):
                continue
            if rule.cidr:
                return None
            if rule.action == "allow":
                return Decision(True, (), rule.name, "")
            return self._denied(target, rule.name)
        return self._denied(target, DEFAULT_RULE)

    def decide(
        self,
        identity: Identity,
        target: Target,
        addresses: Sequence[str],
        own_addresses: frozenset[str] = frozenset(),
    ) -> Decision:
        """Which of the resolved ``addresses`` a tunnel may lead to."""
        rules = [rule for rule in self._rules if _matches_request(rule, identity, target)]
        allowed, allowing_rule = [], ""
        refusal = self._denied(target, DEFAULT_RULE)
        for text in addresses:
            decision = self._decide_address(rules, target, text, own_addresses)
            if decision.is_allowed:
                allowed.append(text)
                allowing_rule = allowing_rule or decision.rule
            else:
                refusal = decision
        if allowed:
            return Decision(True, tuple(allowed), allowing_rule, "")
        return refusal

    def _decide_address(
        self, rules: list[PolicyRule], target: Target, text: str, own_addresses: frozenset[str]
    ) -> Decision:
        address = ipaddress.ip_address(text)
        found = special(address, own_addresses) if self._guards_special else None
        was_unnamed = False
        for rule in rules:
            if rule.cidr and not _contains(rule.cidr, address):
                continue
            if rule.action == "deny":
                return self._denied(target, rule.name)
            if found is None or _names(rule.cidr, address, found.network):
                return Decision(True, (text,), rule.name, "")
            was_unnamed = True
        if found is not None and was_unnamed:
            return Decision(
                False,
                (),
                DEFAULT_RULE,
                f"target {target} is not allowed: {text} is a special address ({found.category}) "
                "and no rule's cidr names it",
                found.category,
            )
        return self._denied(target, DEFAULT_RULE)

    @staticmethod
    def _denied(target: Target, rule: str) -> Decision:
        why = "no rule allows it" if rule == DEFAULT_RULE else f"denied by {rule!r}"
        return Decision(False, (), rule, f"target {target} is not allowed: {why}")


def _matches_request(rule: PolicyRule, identity: Identity, target: Target) -> bool:
    """Every criterion but the address."""
    if rule.protocol and target.protocol not in rule.protocol:
        return False
    if rule.ports and not any(low <= target.port <= high for low, high in rule.ports):
        return False
    if rule.subjects and not any(_matches_glob(p, identity.subject) for p in rule.subjects):
        return False
    if rule.host and not any(_matches_host(pattern, target.host) for pattern in rule.host):
        return False
    return all(
        any(_is_same(identity.claims.get(name), value) for value in values)
        for name, values in rule.claims.items()
    )


def _is_same(claim: object, value: object) -> bool:
    # True == 1 in Python; a claim of another type is another claim
    return type(claim) is type(value) and claim == value


def _matches_glob(pattern: str, text: str) -> bool:
    regex = ".*".join(re.escape(part) for part in pattern.split("*"))
    return re.fullmatch(regex, text, re.DOTALL) is not None


def _matches_host(pattern: str, host: str) -> bool:
    if pattern == "*":
        return True
    if pattern.startswith("*."):
        return host.endswith(pattern[1:])
    return host == pattern


def _contains(networks: Sequence[Network], address: Address) -> bool:
    inner = embedded_address(address)
    return any(
        candidate in network
        for network in networks
        for candidate in (address, inner)
        if candidate is not None and candidate.version == network.version
    )


def _names(networks: Sequence[Network], address: Address, special_range: Network) -> bool:
    """Whether a network that contains ``address`` lies inside the special range (or names the very
    form that embeds it).
    """
    inner = embedded_address(address)
    for network in networks:
        for candidate in (address, inner):
            if candidate is None or candidate.version != network.version:
                continue
            if candidate not in network:
                continue
            if network.version == special_range.version and network.subnet_of(special_range):  # type: ignore[arg-type]
                return True
            if candidate is address and inner is not None and network.prefixlen >= 96:
                return True
    return False
