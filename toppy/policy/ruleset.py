"""Policy: a deny wins, then the first rule that allows; default deny. Pure functions of what is
asked and when.

A rule matches when every criterion it has matches. Each resolved address is decided on its own;
special addresses (``address_guard``) need an allow rule whose network lies inside their range.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from toppy.config.policy import PolicyRole, PolicyRule, name_rules
from toppy.model.identity import Identity
from toppy.model.target import Target
from toppy.policy.address_guard import (
    Address,
    Network,
    Special,
    destination,
    embedded_address,
    embedded_network,
    special,
    unmapped,
    unmapped_network,
)
from toppy.policy.criteria import Criterion, Question, criteria_of, who_criteria
from toppy.policy.window import TimeWindow

DEFAULT_RULE = "default"
"""What answers call the rule that denies what no rule allows."""
_MOST_CHANGES = 64
"""Beginnings and ends of rules' times that are looked at to find a decision's end: a month of rules
for day and night that take turns. It ends there at the latest, and may be asked again."""


@dataclass(frozen=True, slots=True)
class Decision:
    """Yes or no, and why."""

    is_allowed: bool
    addresses: tuple[str, ...]
    """The allowed ones, in the order given."""
    rule: str
    """Of an allow: the rule of the first address."""
    reason: str
    category: str = ""
    """For a denied special address: what it is."""
    until: float | None = None
    """Of an allow: the Unix time at which rules' times end it; None: they do not."""
    proxy_protocol: bool = False
    """Of an allow: ``rule`` wants TCP targets to be told whose connection it is."""


@dataclass(frozen=True, slots=True)
class RuleFinding:
    """What one rule has to say to a question."""

    name: str
    action: str
    matches: bool
    reasons: tuple[str, ...]
    """Why it does not match, a text per criterion; or what keeps a matching one from allowing."""


class _Rule:
    """A rule, ready to be asked."""

    __slots__ = ("action", "cidr", "criteria", "name", "proxy_protocol", "window")

    def __init__(self, rule: PolicyRule) -> None:
        self.name = rule.name
        self.action = rule.action
        self.cidr = rule.cidr
        self.proxy_protocol = rule.proxy_protocol is not None
        self.criteria: tuple[Criterion, ...] = criteria_of(rule)
        self.window = TimeWindow(rule.when) if rule.when is not None else None

    def matches(self, asked: Question) -> bool:
        """Every criterion but address and time."""
        for criterion in self.criteria:  # noqa: SIM110  # each tunnel asks every rule; all() is slow
            if not criterion.matches(asked):
                return False
        return True

    def holds(self, now: float) -> bool:
        return self.window is None or self.window.is_open(now)


class Ruleset:
    """The rules of one revision."""

    def __init__(
        self,
        rules: Iterable[PolicyRule],
        *,
        roles: Iterable[PolicyRole] = (),
        revision: int = 0,
        guards_special: bool = True,
    ) -> None:
        """``guards_special`` is False on a client: what is special there is not at the gateway.

        ``roles`` are given to whom they match, beside those that an identity has already.
        """
        self._rules = [_Rule(rule) for rule in name_rules(tuple(rules))]
        self._roles = [(each.role, tuple(who_criteria(each))) for each in roles]
        self._guards_special = guards_special
        self.revision = revision

    def open_windows(self, now: float) -> tuple[bool, ...]:
        """Which rules with times hold at ``now``: when this changes, decisions may."""
        return tuple(rule.window.is_open(now) for rule in self._rules if rule.window is not None)

    def with_roles(self, identity: Identity, target: Target) -> Identity:
        """``identity`` with the roles that this policy gives it."""
        if not self._roles:
            return identity
        asked = Question(identity, target)
        given = [
            role
            for role, criteria in self._roles
            if all(criterion.matches(asked) for criterion in criteria)
        ]
        return replace(identity, roles=tuple(dict.fromkeys((*identity.roles, *given))))

    def _matching(self, identity: Identity, target: Target) -> list[_Rule]:
        asked = Question(self.with_roles(identity, target), target)
        return [rule for rule in self._rules if rule.matches(asked)]

    def may_resolve(self, identity: Identity, target: Target, *, now: float) -> Decision:
        """Whether some rule could allow ``target`` whatever it resolves to.

        Ask before resolving, so that nobody makes us resolve names that no rule allows.
        """
        rules = [rule for rule in self._matching(identity, target) if rule.holds(now)]
        for rule in rules:
            if rule.action == "deny" and not rule.cidr:
                return self._denied(target, rule.name)
        for rule in rules:
            if rule.action == "allow":
                return Decision(True, (), rule.name, "")
        return self._denied(target, DEFAULT_RULE)

    def decide_name(self, identity: Identity, target: Target, *, now: float) -> Decision | None:
        """The decision where no address can change it; None: resolve, then ``decide``.

        For rulesets without ``guards_special``; with it, an address can always change an allow.
        """
        early = self.may_resolve(identity, target, now=now)
        if not early.is_allowed:
            return early
        rules = [rule for rule in self._matching(identity, target) if rule.holds(now)]
        if self._guards_special or any(rule.action == "deny" for rule in rules):
            return None  # a deny that is left has networks
        for rule in rules:
            if not rule.cidr:
                return Decision(True, (), rule.name, "")
        return None

    def decide(
        self,
        identity: Identity,
        target: Target,
        addresses: Sequence[str],
        own_addresses: frozenset[str] = frozenset(),
        *,
        now: float,
    ) -> Decision:
        """Which of the resolved ``addresses`` a tunnel may lead to.

        ``addresses`` are numeric; ``own_addresses`` those among them that are the gateway's.
        ``now`` is Unix time in seconds.
        """
        rules = self._matching(identity, target)
        allowed: list[Decision] = []
        refusals: list[Decision] = []
        for text in addresses:
            found = self._found(text, own_addresses)
            at_address = [rule for rule in rules if _covers(rule, found.address)]
            decision = self._decide_address(at_address, target, found, now)
            if decision.is_allowed:
                until = self._until(at_address, target, found, now)
                allowed.append(replace(decision, until=until))
            else:
                refusals.append(decision)
        if allowed:
            return Decision(
                True,
                tuple(address for each in allowed for address in each.addresses),
                allowed[0].rule,
                "",
                until=min((each.until for each in allowed if each.until is not None), default=None),
                proxy_protocol=allowed[0].proxy_protocol,
            )
        if not refusals:
            return Decision(
                False, (), DEFAULT_RULE, f"target {target} is not allowed: it has no address"
            )
        # the one that tells most: a rule or a special address, rather than that nothing matched
        return next((r for r in refusals if r.category or r.rule != DEFAULT_RULE), refusals[0])

    def explain(
        self,
        identity: Identity,
        target: Target,
        addresses: Sequence[str],
        own_addresses: frozenset[str] = frozenset(),
        *,
        now: float,
    ) -> tuple[RuleFinding, ...]:
        """What each rule has to say, in order. Without ``addresses``, ``cidr`` is left out."""
        asked = Question(self.with_roles(identity, target), target)
        found = [self._found(text, own_addresses) for text in addresses]
        return tuple(_explain(rule, asked, found, now) for rule in self._rules)

    def _found(self, text: str, own_addresses: frozenset[str]) -> _Found:
        address = unmapped(ipaddress.ip_address(text))
        is_special = special(address, own_addresses) if self._guards_special else None
        return _Found(text, address, is_special)

    def _decide_address(
        self, rules: list[_Rule], target: Target, found: _Found, now: float
    ) -> Decision:
        """By the rules that match at this address, but for their times."""
        holding = [rule for rule in rules if rule.holds(now)]
        for rule in holding:
            if rule.action == "deny":
                return self._denied(target, rule.name)
        for rule in holding:
            if found.is_named_by(rule.cidr):
                return Decision(
                    True, (found.text,), rule.name, "", proxy_protocol=rule.proxy_protocol
                )
        if holding and found.special is not None:
            category = found.special.category
            return Decision(
                False,
                (),
                DEFAULT_RULE,
                f"target {target} is not allowed: {found.text} is a special address ({category}) "
                "and no rule's cidr names it",
                category,
            )
        return self._denied(target, DEFAULT_RULE)

    def _until(self, rules: list[_Rule], target: Target, found: _Found, now: float) -> float | None:
        """When an allow of ``now`` ends, by times alone."""
        opening = [
            each for each in rules if each.action == "allow" and found.is_named_by(each.cidr)
        ]
        is_lasting = any(rule.window is None for rule in opening)
        windows = [
            rule.window
            for rule in rules
            if rule.window is not None and (rule.action == "deny" or not is_lasting)
        ]
        moment = now
        for _ in range(_MOST_CHANGES if windows else 0):
            moments = [window.next_change(moment) for window in windows]
            upcoming = [each for each in moments if each is not None]
            if not upcoming:
                return None
            moment = min(upcoming)
            if not self._decide_address(rules, target, found, moment).is_allowed:
                return moment
        return moment if windows else None

    @staticmethod
    def _denied(target: Target, rule: str) -> Decision:
        why = "no rule allows it" if rule == DEFAULT_RULE else f"denied by {rule!r}"
        return Decision(False, (), rule, f"target {target} is not allowed: {why}")


@dataclass(frozen=True, slots=True)
class _Found:
    """A resolved address, and what it is."""

    text: str
    address: Address
    special: Special | None

    def is_named_by(self, networks: Sequence[Network]) -> bool:
        """Whether an allow rule with these networks, which cover it, opens it."""
        return self.special is None or _names(networks, self.address, self.special.network)


def _explain(rule: _Rule, asked: Question, addresses: Sequence[_Found], now: float) -> RuleFinding:
    reasons = [
        f"{criterion.key}: {criterion.explain(asked)}"
        for criterion in rule.criteria
        if not criterion.matches(asked)
    ]
    if rule.window is not None and not rule.window.is_open(now):
        reasons.append(f"when: {rule.window.describe(now)}")
    covered = [found for found in addresses if _covers(rule, found.address)]
    if addresses and not covered:
        shown = ", ".join(found.text for found in addresses)
        networks = ", ".join(str(network) for network in rule.cidr)
        reasons.append(f"cidr: {shown} not in {networks}")
    if reasons:
        return RuleFinding(rule.name, rule.action, False, tuple(reasons))
    if rule.cidr and not addresses:
        reasons.append("its cidr was not compared: nothing was resolved")
    if rule.action == "allow":
        reasons += [
            f"{found.text} is special ({found.special.category}): only a network within "
            f"{found.special.network} names it"
            for found in covered
            if found.special is not None and not found.is_named_by(rule.cidr)
        ]
    return RuleFinding(rule.name, rule.action, True, tuple(reasons))


def _covers(rule: _Rule, address: Address) -> bool:
    if not rule.cidr:
        return True
    # what is denied is denied in every form; what is allowed must surely be that address
    leads_to = embedded_address if rule.action == "deny" else destination
    return _contains(rule.cidr, address, leads_to(address))


def _contains(
    networks: Sequence[Network], address: Address, inner: ipaddress.IPv4Address | None
) -> bool:
    """Whether ``address``, or the IPv4 address that it leads to, is in one of ``networks``."""
    candidates = (address, inner)
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
        if _contains((network,), address, destination(address))
        for form in (unmapped_network(network), embedded_network(network))
        if form is not None
    )


def _is_inside(network: Network, outer: Network) -> bool:
    if isinstance(network, ipaddress.IPv4Network):
        return isinstance(outer, ipaddress.IPv4Network) and network.subnet_of(outer)
    return isinstance(outer, ipaddress.IPv6Network) and network.subnet_of(outer)
