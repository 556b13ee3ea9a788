"""What admission answers: a grant or a denial."""

from __future__ import annotations

from dataclasses import dataclass

from toppy.model.rate import NO_TUNNEL_LIMITS, TunnelLimits


@dataclass(frozen=True, slots=True)
class Grant:
    """Permission for one tunnel; the worker needs no other word from the control plane.

    ``addresses`` are the checked addresses of the target, in the order to try; the worker connects
    to these and to nothing else. Empty for an echo tunnel.
    """

    addresses: tuple[str, ...]
    port: int
    subject: str
    rule: str
    """The policy rule that allowed it."""
    revision: int
    """Of the policy."""
    is_echo: bool = False
    expires_at: float | None = None
    """Unix time at which the credential or the rule's time ends, if one does."""
    ends_with_rule: bool = False
    """``expires_at`` is the end of the rule's time."""
    limits: TunnelLimits = NO_TUNNEL_LIMITS
    """How much may go through."""
    proxy_protocol: bool = False
    """TCP: tell the target whose connection it is (PROXY protocol, version 2)."""


@dataclass(frozen=True, slots=True)
class Denial:
    """Why a tunnel is refused, as the client will read it."""

    status: int
    """HTTP status: 400, 401, 403, 429, 502, 503, 504, 508."""
    proxy_status: str
    """Error type of RFC 9209 section 2.3; empty: none applies."""
    details: str
    """A sentence for people; names no secret."""
    rule: str = ""
    """For 403: the policy rule that denied, or ``default`` when none allowed."""
    subject: str = ""
    """Who was denied, where that is known; for the audit log."""
    retry_after_s: int = 0
    """Seconds after which asking again may help; 0: not known, or never."""
