"""Policy rules as they are written, for gateway and client."""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
PortRange = tuple[int, int]
Scalar = str | int | float | bool

_PORTS = re.compile(r"\s*([0-9]{1,5})\s*(?:-\s*([0-9]{1,5})\s*)?\Z")
_HOST_PATTERN = re.compile(r"(\*|(\*\.)?[a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?)\Z")


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str | int) else value


def _items(value: Any) -> list[Any]:
    items = _as_list(value)
    if not isinstance(items, list | tuple):
        raise ValueError("must be one value or a list")  # noqa: TRY004  # pydantic's own protocol
    return list(items)


def _parse_networks(value: Any) -> Any:
    networks = []
    for text in _items(value):
        if isinstance(text, Network):
            networks.append(text)
            continue
        try:
            # ip_network takes plain numbers too, and a slip of the pen must open nothing
            networks.append(ipaddress.ip_network(str(text) if isinstance(text, str) else "", False))
        except ValueError:
            raise ValueError(
                f"{text!r} is no network; write 10.0.0.0/8, 192.0.2.7 or 2001:db8::/32"
            ) from None
    return tuple(networks)


def _parse_hosts(value: Any) -> Any:
    hosts = []
    for text in _items(value):
        host = text.lower().rstrip(".") if isinstance(text, str) else text
        if not isinstance(host, str) or not _HOST_PATTERN.match(host):
            raise ValueError(
                f"{text!r} is no host pattern; write db.example.com, *.example.com or *"
            )
        hosts.append(host)
    return tuple(hosts)


def _parse_ports(value: Any) -> Any:
    ranges = []
    for item in _items(value):
        match = _PORTS.match(str(item)) if isinstance(item, str | int) else None
        if match is None:
            raise ValueError(f"{item!r} is no port; write 53 or '8000-8999'")
        low, high = int(match.group(1)), int(match.group(2) or match.group(1))
        if not 1 <= low <= high <= 65535:
            raise ValueError(f"{item!r}: ports go from 1 to 65535, the lower one first")
        ranges.append((low, high))
    return tuple(ranges)


def _parse_claims(value: Any) -> Any:
    if not isinstance(value, dict):
        raise ValueError("must be a table, such as { team = 'ops' }")  # noqa: TRY004
    claims = {}
    for name, allowed in value.items():
        values = tuple(allowed) if isinstance(allowed, list | tuple) else (allowed,)
        if not values or not all(isinstance(one, str | int | float) for one in values):
            raise ValueError(f"{name}: must be a text, a number, true, false or a list of these")
        claims[name] = values
    return claims


class PolicyRule(BaseModel):
    """One rule. Every criterion that is given must match; what is left out matches everything."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(
        "", description="How answers and logs call the rule. Default: `rule N`.", max_length=100
    )
    action: Literal["allow", "deny"] = Field(description="What a match means.")
    cidr: Annotated[tuple[Network, ...], BeforeValidator(_parse_networks)] = Field(
        (),
        description=(
            "Networks, checked on the address *after* resolution. An allow rule opens private and "
            "other special addresses only when its network lies inside such a range."
        ),
    )
    host: Annotated[tuple[str, ...], BeforeValidator(_parse_hosts)] = Field(
        (), description="Names as the client wrote them; `*.example.com` means any depth below."
    )
    ports: Annotated[tuple[PortRange, ...], BeforeValidator(_parse_ports)] = Field(
        (), description="Ports and ranges: `[53, '8000-8999']`."
    )
    protocol: Annotated[tuple[Literal["udp", "tcp"], ...], BeforeValidator(_as_list)] = Field(
        (), description="`udp`, `tcp` or both."
    )
    subjects: Annotated[tuple[str, ...], BeforeValidator(_as_list)] = Field(
        (), description="Who: the JWT's `sub`, with `*` for anything; `token` is the static token."
    )
    roles: Annotated[tuple[str, ...], BeforeValidator(_as_list)] = Field(
        (), description="Who: any of these roles, as `[[auth.oidc.roles]]` of the gateway gives."
    )
    claims: Annotated[dict[str, tuple[Scalar, ...]], BeforeValidator(_parse_claims)] = Field(
        default_factory=dict,
        description="JWT claims and the values allowed: `{ team = ['ops', 'net'] }`.",
    )

    @field_validator("name")
    @classmethod
    def _printable(cls, value: str) -> str:
        if not value.isprintable():
            raise ValueError("must be one line of printable characters")
        return value

    @field_validator("cidr", "host", "ports", "protocol", "subjects", "roles")
    @classmethod
    def _not_empty(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        if not value:
            raise ValueError("must not be an empty list, which would match nothing")
        return value


def name_rules(rules: tuple[PolicyRule, ...]) -> tuple[PolicyRule, ...]:
    """The rules, each with a name: ``rule N``, counted from 1, where none was given."""
    return tuple(
        rule if rule.name else rule.model_copy(update={"name": f"rule {number}"})
        for number, rule in enumerate(rules, 1)
    )
