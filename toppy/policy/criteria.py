"""What rules ask for, one criterion at a time: whether it matches, and why not."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from toppy.config.policy import PolicyRole, PolicyRule, Scalar
from toppy.model.identity import Identity
from toppy.model.target import Target


@dataclass(frozen=True, slots=True)
class Question:
    """Who wants to go where. The time is asked about apart, for it goes on."""

    identity: Identity
    target: Target


@dataclass(frozen=True, slots=True)
class Criterion:
    """One of a rule's. ``explain`` is asked only where ``matches`` says no."""

    key: str
    """As the configuration names it."""
    matches: Callable[[Question], bool]
    explain: Callable[[Question], str]


def criteria_of(rule: PolicyRule) -> tuple[Criterion, ...]:
    """Those that ``rule`` gives, but for address and time."""
    found = [*_about_target(rule), *who_criteria(rule)]
    return tuple(found)


def _about_target(rule: PolicyRule) -> Iterable[Criterion]:
    if rule.protocol:
        yield Criterion(
            "protocol",
            lambda asked: asked.target.protocol in rule.protocol,
            lambda asked: f"{asked.target.protocol} is not {_any_of(rule.protocol)}",
        )
    if rule.ports:
        shown = [str(low) if low == high else f"{low}-{high}" for low, high in rule.ports]
        yield Criterion(
            "ports",
            lambda asked: _is_within(asked.target.port, rule.ports),
            lambda asked: f"{asked.target.port} is not {_any_of(shown)}",
        )
    if rule.host:
        yield Criterion(
            "host",
            lambda asked: any(_matches_host(one, asked.target.host) for one in rule.host),
            lambda asked: f"{asked.target.host} is not {_any_of(rule.host)}",
        )


def who_criteria(rule: PolicyRule | PolicyRole) -> Iterable[Criterion]:
    """Those about who asks."""
    if rule.subjects:
        yield Criterion(
            "subjects",
            lambda asked: _matches_any(rule.subjects, asked.identity.subject),
            lambda asked: f"{asked.identity.subject!r} is not {_any_of(rule.subjects)}",
        )
    if isinstance(rule, PolicyRule) and rule.roles:
        yield Criterion(
            "roles",
            lambda asked: any(role in asked.identity.roles for role in rule.roles),
            lambda asked: _none_of("role", asked.identity.roles, rule.roles),
        )
    if rule.groups:
        yield Criterion(
            "groups",
            lambda asked: any(group in asked.identity.groups for group in rule.groups),
            lambda asked: _none_of("group", asked.identity.groups, rule.groups),
        )
    if rule.claims:
        yield Criterion(
            "claims",
            lambda asked: not _unmatched_claims(rule.claims, asked.identity),
            lambda asked: "; ".join(_unmatched_claims(rule.claims, asked.identity)),
        )


def _is_within(port: int, ranges: Iterable[tuple[int, int]]) -> bool:
    for low, high in ranges:  # noqa: SIM110  # as in ``_Rule.matches``
        if low <= port <= high:
            return True
    return False


def _matches_any(patterns: Iterable[str], text: str) -> bool:
    for pattern in patterns:  # noqa: SIM110
        if _matches_glob(pattern, text):
            return True
    return False


def _unmatched_claims(claims: Mapping[str, tuple[Scalar, ...]], identity: Identity) -> list[str]:
    return [
        f"{name} is {identity.claims[name]!r}, not {_any_of(repr(value) for value in values)}"
        if name in identity.claims
        else f"there is no claim {name}"
        for name, values in claims.items()
        if not any(_is_same(identity.claims.get(name), value) for value in values)
    ]


def _is_same(claim: object, value: object) -> bool:
    # True == 1 in Python; a claim of another type is another claim
    return type(claim) is type(value) and claim == value


def _any_of(wanted: Iterable[object]) -> str:
    shown = [str(one) for one in wanted]
    return shown[0] if len(shown) == 1 else f"any of {', '.join(shown)}"


def _none_of(what: str, has: tuple[str, ...], wanted: tuple[str, ...]) -> str:
    shown = f"{what}s {', '.join(has)}" if has else f"no {what}"
    return f"has {shown}, needs {_any_of(wanted)}"


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
        return host.endswith(pattern[1:]) and not is_address(host)
    return host == pattern


def is_address(host: str) -> bool:
    """Whether a target's host is an address rather than a name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
