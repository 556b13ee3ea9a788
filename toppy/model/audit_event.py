"""What the audit log tells: who did what to which target, and whether it was allowed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from enum import StrEnum

import msgspec


class AuditAction(StrEnum):
    """Every action that this version writes."""

    DOCTOR = "doctor"
    LOGIN = "login"
    UP = "up"
    UP_REFUSED = "up.refused"
    """The policy refused a connection of a port that it had allowed."""
    UP_CLOSED = "up.closed"
    PROXY = "proxy"
    PROXY_OPENED = "proxy.opened"
    """A program has reached a target; each target once, the first hundred."""
    PROXY_REFUSED = "proxy.refused"
    """The client's policy or the gateway's refused a program's target."""
    PROXY_CLOSED = "proxy.closed"
    EXEC = "exec"
    EXEC_CLOSED = "exec.closed"
    """Its targets are told as those of a proxy."""
    SSH_PROXY = "ssh-proxy"
    SSH_PROXY_REFUSED = "ssh-proxy.refused"
    SSH_PROXY_CLOSED = "ssh-proxy.closed"
    UDP = "udp"
    UDP_REFUSED = "udp.refused"
    """The gateway refused a tunnel."""
    UDP_CLOSED = "udp.closed"
    AUDIT_VERIFY = "audit.verify"
    AUDIT_RECOVERED = "audit.recovered"
    """The last writer was interrupted in the middle of an entry."""
    AUDIT_LOST = "audit.lost"
    """The log could not be written for so long that events were lost."""
    AUDIT_RETIRED = "audit.retired"
    """A file of the log is deleted: it was kept as long as the settings say."""
    GATEWAY_STARTED = "gateway.started"
    GATEWAY_STOPPED = "gateway.stopped"
    TUNNEL_OPENED = "tunnel.opened"
    TUNNEL_RENEWED = "tunnel.renewed"
    """A live tunnel has a newer credential."""
    TUNNEL_DENIED = "tunnel.denied"
    TUNNEL_CLOSED = "tunnel.closed"
    TUNNEL_REVOKED = "tunnel.revoked"
    """The policy or the credential does not allow a live tunnel any more."""
    AUTH_FAILED = "auth.failed"
    RELOAD = "reload"
    WORKER_DIED = "worker.died"
    ADMIN_DRAIN = "admin.drain"
    ADMIN_KICK = "admin.kick"
    ADMIN_UPGRADE = "admin.upgrade"
    ADMIN_STOP = "admin.stop"


class AuditEvent(msgspec.Struct, frozen=True, omit_defaults=True):
    """One event, in the order in which it is written; what is None is not (T-101).

    ``reason`` ends with the event's facts, see ``reason_with_facts``: the format has no other
    place for them.
    """

    actor: str
    """The user of a command; at the gateway the client's address, or who else acts."""
    action: str
    target: str
    allowed: bool
    auth_subject: str | None = None
    reason: str | None = None


Fact = str | int | float | bool

_PLAIN = r"[A-Za-z0-9_.:,/@+\[\]-]+"
_IS_PLAIN = re.compile(rf"{_PLAIN}\Z", re.ASCII)
_FACT = re.compile(rf'([a-z][a-z0-9_]*)=("(?:[^"\\]|\\.)*"|{_PLAIN})(?: |\Z)', re.ASCII)
_SEPARATOR = "; "


def reason_with_facts(text: str, facts: Mapping[str, Fact]) -> str:
    """``the client ended it; tunnel=s0g1c2t0 duration_s=1.5``: a sentence, then the facts."""
    shown = " ".join(f"{key}={_encode(value)}" for key, value in facts.items())
    return _SEPARATOR.join(part for part in (text, shown) if part)


def parse_facts(reason: str) -> tuple[str, dict[str, str]]:
    """The sentence and the facts of a reason; without facts the whole of it is the sentence."""
    text, _, shown = reason.rpartition(_SEPARATOR)
    facts: dict[str, str] = {}
    position = 0
    while position < len(shown):
        found = _FACT.match(shown, position)
        if found is None:
            return reason, {}
        key, value = found.groups()
        try:
            facts[key] = json.loads(value) if value.startswith('"') else value
        except ValueError:
            return reason, {}
        position = found.end()
    return text, facts


def _encode(value: Fact) -> str:
    text = str(value).lower() if isinstance(value, bool) else str(value)
    if _IS_PLAIN.match(text):
        return text
    # no text of a fact may look like the separator
    return json.dumps(text, ensure_ascii=False).replace(";", "\\u003b")
