"""Policy rules as they are written, for gateway and client."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from toppy.config.policy_time import When
from toppy.config.rates import RuleLimits

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
        networks.append(_parse_network(text))
    return tuple(networks)


def _parse_network(text: Any) -> Network:
    written = text if isinstance(text, str) else ""
    try:
        # plain numbers are taken, too, and a slip of the pen must open nothing
        network, address = ipaddress.ip_network(written, False), ipaddress.ip_interface(written).ip
    except ValueError:
        raise ValueError(
            f"{text!r} is no network; write 10.0.0.0/8, 192.0.2.7 or 2001:db8::/32"
        ) from None
    if int(address) != int(network.network_address):
        raise ValueError(
            f"{text!r} says an address and the length of its network; write {network} or "
            f"{address}/{address.max_prefixlen}"
        )
    return network


def _parse_hosts(value: Any) -> Any:
    hosts = []
    for text in _items(value):
        host = text.lower().rstrip(".") if isinstance(text, str) else text
        if not isinstance(host, str) or not _HOST_PATTERN.match(host):
            raise ValueError(
                f"{text!r} is no host pattern; write db.example.com, *.example.com or *"
            )
        if _is_address(host):
            # by a name, or in another notation, the same address would not match
            raise ValueError(f"{text!r} is an address; write cidr = {text!r} instead")
        hosts.append(host)
    return tuple(hosts)


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


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


def _texts(value: Any) -> Any:
    texts = _items(value)
    if not all(isinstance(text, str) and text for text in texts):
        raise ValueError("must be a text or a list of texts, none of them empty")
    return tuple(texts)


Networks = Annotated[tuple[Network, ...], BeforeValidator(_parse_networks)]
Texts = Annotated[tuple[str, ...], BeforeValidator(_texts)]
Claims = Annotated[dict[str, tuple[Scalar, ...]], BeforeValidator(_parse_claims)]


class PolicyRole(BaseModel):
    """Gives a role to whom every criterion matches that is given."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: str = Field(description="The role, as `roles` of rules names it.", min_length=1)
    subjects: Texts = Field(
        (), description="The JWT's `sub`, with `*` for anything; `token` is the static token."
    )
    groups: Texts = Field((), description="Any of these in the JWT's claim `groups`.")
    claims: Claims = Field(
        default_factory=dict,
        description="JWT claims and the values allowed: `{ team = ['ops', 'net'] }`.",
    )

    @model_validator(mode="after")
    def _says_who(self) -> PolicyRole:
        if not (self.subjects or self.groups or self.claims):
            raise ValueError("needs subjects, groups or claims; subjects = '*' means everybody")
        return self


class PolicyRule(BaseModel):
    """One rule. Every criterion that is given must match; what is left out matches everything."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(
        "", description="How answers and logs call the rule. Default: `rule N`.", max_length=100
    )
    action: Literal["allow", "deny"] = Field(description="What a match means.")
    cidr: Networks = Field(
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
    subjects: Texts = Field(
        (), description="Who: the JWT's `sub`, with `*` for anything; `token` is the static token."
    )
    roles: Texts = Field(
        (),
        description=(
            "Who: any of these roles, as `[[policy.roles]]` gives them, or at the gateway "
            "`[[auth.oidc.roles]]`."
        ),
    )
    groups: Texts = Field((), description="Who: any of these in the JWT's claim `groups`.")
    claims: Claims = Field(
        default_factory=dict,
        description="Who: JWT claims and the values allowed: `{ team = ['ops', 'net'] }`.",
    )
    when: When | None = Field(
        None,
        description=(
            "Only at these times, a table: `{ days = 'mon-fri', hours = '08:00-18:00', zone = "
            "'Europe/Berlin' }`; see below."
        ),
    )
    limits: RuleLimits | None = Field(
        None,
        description=(
            "How much may go through, a table: `{ bytes_per_sec = 1_000_000, tunnels = 100 }`; "
            "see below. For `allow` rules of the gateway."
        ),
    )

    proxy_protocol: Literal["v2"] | None = Field(
        None,
        description=(
            "`v2`: TCP targets are told the client's address in a PROXY protocol header before "
            "anything else; they must expect it. For `allow` rules of the gateway."
        ),
    )

    @field_validator("name")
    @classmethod
    def _printable(cls, value: str) -> str:
        if not value.isprintable():
            raise ValueError("must be one line of printable characters")
        return value

    @field_validator("cidr", "host", "ports", "protocol", "subjects", "roles", "groups")
    @classmethod
    def _not_empty(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        if not value:
            raise ValueError("must not be an empty list, which would match nothing")
        return value

    @model_validator(mode="after")
    def _limits_what_it_allows(self) -> PolicyRule:
        if self.limits is not None and self.action == "deny":
            raise ValueError("limits: a deny rule lets nothing through; leave the key out")
        return self

    @model_validator(mode="after")
    def _tells_tcp_targets(self) -> PolicyRule:
        if self.proxy_protocol is None:
            return self
        if self.action == "deny":
            raise ValueError("proxy_protocol: a deny rule lets nothing through; leave the key out")
        if self.protocol and "tcp" not in self.protocol:
            raise ValueError("proxy_protocol: is for TCP, which this rule's protocol leaves out")
        return self

    @property
    def names_people(self) -> bool:
        """Whether it depends on who asks."""
        return bool(self.subjects or self.roles or self.groups or self.claims)


Rule = TypeVar("Rule", bound=PolicyRule)


def name_rules(
    rules: tuple[Rule, ...], word: str = "rule", places: Sequence[str] = ()
) -> tuple[Rule, ...]:
    """The rules, each with a name: ``word N``, counted from 1, where none was given.

    Raises ``ValueError`` where two have the same: answers and the audit log name rules. ``places``
    says where each stands; default: ``word N``.
    """
    named = tuple(
        rule if rule.name else rule.model_copy(update={"name": f"{word} {number}"})
        for number, rule in enumerate(rules, 1)
    )
    seen: dict[str, str] = {}
    for index, rule in enumerate(named):
        place = places[index] if places else f"{word} {index + 1}"
        if rule.name in seen:
            raise ValueError(
                f"the name {rule.name!r} is used twice, by {seen[rule.name]} and {place}; give "
                "each a name of its own"
            )
        seen[rule.name] = place
    return named
