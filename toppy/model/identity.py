"""Who opened a tunnel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

ClaimValue = str | int | float | bool


@dataclass(frozen=True, slots=True)
class Identity:
    """An authenticated client.

    ``subject`` is the JWT's ``sub``; ``token`` for the static token, ``cert:NAME`` for a client
    certificate, ``anonymous`` without authentication. ``claims`` has the scalar claims of the JWT.
    """

    subject: str
    method: str
    """``static``, ``jwt``, ``oidc``, ``certificate`` or ``none``."""
    claims: Mapping[str, ClaimValue] = field(default_factory=dict)
    roles: tuple[str, ...] = ()
    """Given by the configuration (``[[auth.oidc.roles]]``), never by a client."""
    groups: tuple[str, ...] = ()
    """What the JWT's issuer says in the claim ``groups``."""
