"""Policy: ordered rules, the first match decides, default deny. Pure functions of what is asked.

A rule matches when every criterion it has matches. Each resolved address is decided on its own;
special addresses (``address_guard``) need an allow rule whose network lies inside their range.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from toppy.config.policy import PolicyRule, name_rules
from toppy.model.identity import Identity
from toppy.model.target import Target
from toppy.policy.address_guard import (
    Address,
    Network,
    embedded_address,
    embedded_network,
    special,
    unmapped,
    unmapped_network,
)

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
        """The decision where no address can change it; None: resolve, then ``decide``.

        For rulesets without ``guards_special``; with it, an address can always change an allow.
        """
        depends_on = set()
        decision = self._denied(target, DEFAULT_RULE)
        for rule in self._rules:
            if not _matches_request(rule, identity, target):
                continue
            if rule.cidr:
                depends_on.add(rule.action)
                continue
            if rule.action == "allow":
                decision = Decision(True, (), rule.name, "")
            else:
                decision = self._denied(target, rule.name)
            break
        if decision.is_allowed and self._guards_special:
            return None
        other = "deny" if decision.is_allowed else "allow"
        return None if other in depends_on else decision

    def decide(
        self,
        identity: Identity,
        target: Target,
        addresses: Sequence[str],
        own_addresses: frozenset[str] = frozenset(),
    ) -> Decision:
        """Which of the resolved ``addresses`` a tunnel may lead to.

        ``addresses`` are numeric; ``own_addresses`` those among them that are the gateway's.
        """
        rules = [rule for rule in self._rules if _matches_request(rule, identity, target)]
        allowed, allowing_rule = [], ""
        refusals = []
        for text in addresses:
            decision = self._decide_address(rules, target, text, own_addresses)
            if decision.is_allowed:
                allowed.append(text)
                allowing_rule = allowing_rule or decision.rule
            else:
                refusals.append(decision)
        if allowed:
            return Decision(True, tuple(allowed), allowing_rule, "")
        if not refusals:
            return Decision(
                False, (), DEFAULT_RULE, f"target {target} is not allowed: it has no address"
            )
        # the one that tells most: a rule or a special address, rather than that nothing matched
        return next((r for r in refusals if r.category or r.rule != DEFAULT_RULE), refusals[0])

    def _decide_address(
        self, rules: list[PolicyRule], target: Target, text: str, own_addresses: frozenset[str]
    ) -> Decision:
        address = unmapped(ipaddress.ip_address(text))
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
    if rule.roles and not any(role in identity.roles for role in rule.roles):
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
    """``*`` stands for any text. Takes time in proportion to the text, whoever chose it."""
    first, *others = pattern.split("*")
    if not others:
        return text == first
    *middle, last = others
    if not text.startswith(first) or len(text) < len(first) + len(last):
        return False
    position, end = len(first), len(text) - len(last)
    for part in middle:
        found = text.find(part, position, end)
        if found < 0:
            return False
        position = found + len(part)
    return text.endswith(last)


def _matches_host(pattern: str, host: str) -> bool:
    if pattern == "*":
        return True
    if pattern.startswith("*."):
        return host.endswith(pattern[1:]) and not _is_address(host)
    return host == pattern


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _contains(networks: Sequence[Network], address: Address) -> bool:
    """Whether ``address``, or the IPv4 address that it leads to, is in one of ``networks``."""
    candidates = (address, embedded_address(address))
    return any(
        candidate in unmapped_network(network)
        for network in networks
        for candidate in candidates
        if candidate is not None
    )


def _names(networks: Sequence[Network], address: Address, special_range: Network) -> bool:
    """Whether a network that has ``address`` in it lies inside the special range, itself or by the
    IPv4 network that it embeds: ``64:ff9b::a00:0/104`` names 10.0.0.0/8, ``64:ff9b::/96`` does not.
    """
    return any(
        _is_inside(form, special_range)
        for network in networks
        if _contains((network,), address)
        for form in (unmapped_network(network), embedded_network(network))
        if form is not None
    )


def _is_inside(network: Network, outer: Network) -> bool:
    if isinstance(network, ipaddress.IPv4Network):
        return isinstance(outer, ipaddress.IPv4Network) and network.subnet_of(outer)
    return isinstance(outer, ipaddress.IPv6Network) and network.subnet_of(outer)
