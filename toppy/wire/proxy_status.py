"""Proxy-Status (RFC 9209): who refused, why, by which rule; and what that means to a person."""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass

from toppy.errors import LocalError

_TOKEN = re.compile(r"[A-Za-z*][A-Za-z0-9:/!#$%&'*+\-.^_`|~]*\Z")
_PARAMETER = re.compile(
    r';\s*([a-z*][a-z0-9_.*-]*)(?:=("(?:[^"\\]|\\["\\])*"|[A-Za-z0-9*][^;,\s"]*|-?[0-9.]+|\?[01]))?'
)
_MAX_TEXT = 400
_MAX_FIELD = 8192


@dataclass(frozen=True, slots=True)
class ProxyStatus:
    """One proxy's word about a request."""

    proxy: str
    error: str = ""
    details: str = ""
    rule: str = ""
    next_hop: str = ""


def encode_proxy_status(
    proxy: str, *, error: str = "", details: str = "", rule: str = "", next_hop: str = ""
) -> str:
    """A Proxy-Status field value. ``rule`` is a parameter of ours, ``toppy-rule``.

    ``error`` is a type of RFC 9209 section 2.3; the texts may be anything, and are cut to 400
    characters. Raises ``LocalError`` for an ``error`` that is no token.
    """
    if error and not _TOKEN.match(error):
        raise LocalError(f"{error!r} is no Proxy-Status error type")
    parts = [proxy if _TOKEN.match(proxy) else _string(proxy)]
    if error:
        parts.append(f"error={error}")
    if next_hop:
        parts.append(f"next-hop={_string(next_hop)}")
    if rule:
        parts.append(f"toppy-rule={_string(rule)}")
    if details:
        parts.append(f"details={_string(details)}")
    return "; ".join(parts)


def _string(text: str) -> str:
    """An RFC 8941 string: printable ASCII only; everything else becomes a question mark."""
    kept = "".join(c if " " <= c <= "~" else "?" for c in text[:_MAX_TEXT])
    escaped = kept.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def parse_proxy_status(value: str) -> ProxyStatus | None:
    """The entry that says most: the nearest proxy's (the last) with an error, else the nearest's.

    Lenient: what cannot be read is left out; None when there is nothing. The texts have printable
    characters only, whatever was sent, and are cut to 400.
    """
    found = [status for status in map(_parse_member, _members(value[:_MAX_FIELD])) if status]
    return next((s for s in reversed(found) if s.error), found[-1] if found else None)


def _parse_member(member: str) -> ProxyStatus | None:
    entry = member.strip()
    head = re.match(r'("(?:[^"\\]|\\["\\])*"|[^;,\s"]+)', entry)
    if head is None:
        return None
    parameters = {name: _unquote(found) for name, found in _PARAMETER.findall(entry[head.end() :])}
    return ProxyStatus(
        proxy=_unquote(head.group(1)),
        error=parameters.get("error", ""),
        details=parameters.get("details", ""),
        rule=parameters.get("toppy-rule", ""),
        next_hop=parameters.get("next-hop", ""),
    )


def _members(value: str) -> list[str]:
    """The entries of the list; commas inside strings do not part them."""
    members, start, is_quoted, is_escaped = [], 0, False, False
    for index, character in enumerate(value):
        if is_escaped:
            is_escaped = False
        elif is_quoted and character == "\\":
            is_escaped = True
        elif character == '"':
            is_quoted = not is_quoted
        elif character == "," and not is_quoted:
            members.append(value[start:index])
            start = index + 1
    return [*members, value[start:]]


def _unquote(text: str) -> str:
    if text.startswith('"'):
        text = re.sub(r"\\(.)", r"\1", text[1:-1])
    # it goes to a terminal
    return "".join(c if c.isprintable() else "?" for c in text[:_MAX_TEXT])


_ADVICE_BY_ERROR = {
    "dns_timeout": "the gateway's name servers did not answer in time; try again later",
    "dns_error": "the gateway cannot resolve the target's name; check the name",
    "destination_not_found": "the gateway knows no such target; check its name",
    "destination_unavailable": "the target does not answer; check that it runs and is reachable "
    "from the gateway",
    "destination_ip_prohibited": "the target's address is one that the gateway opens only by a "
    "rule whose cidr names it; ask its operator for one",
    "destination_ip_unroutable": "the gateway has no route to the target; check the address and "
    "the gateway's network",
    "connection_refused": "nothing listens at the target; check its port and that it runs",
    "connection_timeout": "the target did not answer in time; check that it runs and is reachable "
    "from the gateway",
    "connection_read_timeout": "nothing was sent for too long; connect again",
    "connection_terminated": "if that goes on, ask the gateway's operator",
    "connection_limit_reached": "the gateway has reached a limit; try again later",
    "proxy_loop_detected": "the target is the gateway itself; ask it for another one",
    "proxy_internal_error": "the gateway failed; try again, and if it stays so ask its operator to "
    "look at its log",
    "proxy_configuration_error": "the gateway is not set up right; ask its operator",
}
_ADVICE_BY_STATUS = {
    400: "the gateway did not understand the request; check the target and the gateway's template",
    401: "the gateway does not accept the token; get a new one (auth_token, or `toppy login`)",
    403: "the gateway's policy does not allow this target; ask its operator for a rule",
    404: "there is no such proxy at this address; check gateway, port and gateway_template",
    407: "the gateway asks for credentials; set auth_token",
    425: "the request came too early in the handshake; try again",
    429: "the gateway has reached a limit; try again later",
    501: "the gateway does not know this kind of tunnel; it may be of an older version",
    502: "the gateway cannot reach the target; check that it runs and is reachable from there",
    503: "the gateway is overloaded or starting; try again later",
    504: "the gateway got no answer in time; try again, and check its name servers",
    508: "the target is the gateway itself; ask it for another one",
}


_ADVICE_AFTER_DETAILS = {
    401: "get a new token (auth_token, or `toppy login`)",
    403: "ask the gateway's operator for a rule",
}
"""Shorter: that it is the token or the policy has been said."""


_STATUS_BY_ERROR = {
    "dns_timeout": 504,
    "dns_error": 502,
    "destination_not_found": 500,
    "destination_unavailable": 503,
    "destination_ip_prohibited": 502,
    "destination_ip_unroutable": 502,
    "connection_refused": 502,
    # of a tunnel that was open: nothing failed, the gateway wants it so
    "connection_terminated": 403,
    "connection_timeout": 504,
    "connection_read_timeout": 504,
    "connection_limit_reached": 503,
    "http_request_denied": 403,
    "proxy_loop_detected": 502,
    "proxy_internal_error": 500,
    "proxy_configuration_error": 500,
}


def recommended_status(error: str) -> int:
    """The HTTP status for why a gateway ended an open tunnel, as RFC 9209 section 2.3 recommends it
    for the error type but for ``connection_terminated``; 403 for others.
    """
    return _STATUS_BY_ERROR.get(error, 403)


_FAILURE_BY_ERRNO = {
    errno.ECONNREFUSED: (502, "connection_refused"),
    errno.ETIMEDOUT: (504, "connection_timeout"),
    errno.ENETUNREACH: (502, "destination_ip_unroutable"),
    errno.EHOSTUNREACH: (502, "destination_ip_unroutable"),
    errno.EADDRNOTAVAIL: (502, "destination_ip_unroutable"),
    # a firewall on the gateway's machine says so
    errno.EACCES: (502, "destination_ip_unroutable"),
    errno.EPERM: (502, "destination_ip_unroutable"),
    errno.ECONNRESET: (502, "connection_terminated"),
    errno.EMFILE: (503, "connection_limit_reached"),
    errno.ENFILE: (503, "connection_limit_reached"),
    errno.ENOBUFS: (503, "connection_limit_reached"),
    errno.ENOMEM: (503, "connection_limit_reached"),
}


def failure_of_errno(number: int | None) -> tuple[int, str]:
    """(HTTP status, error type) for the system error with which connecting to a target failed."""
    return _FAILURE_BY_ERRNO.get(number or 0, (502, "destination_unavailable"))


def explain(status: int, proxy_status: ProxyStatus | None) -> str:
    """One sentence for a person: what, by which rule, what to do next.

    Details that end in a question or have a part behind a semicolon say that last by themselves.
    """
    reason = error = ""
    is_advised = False
    if proxy_status is not None:
        error = proxy_status.error
        details = proxy_status.details
        is_advised = "; " in details or details.endswith("?")
        reason = details or error.replace("_", " ")
        if proxy_status.rule:
            reason = f"{reason} (rule {proxy_status.rule!r})".lstrip()
    if is_advised:
        return f"{status}: {reason}"
    advice = _ADVICE_BY_STATUS.get(status, "the gateway refused the tunnel")
    if proxy_status is not None and proxy_status.details:
        advice = _ADVICE_AFTER_DETAILS.get(status, advice)
    # a missing token or a wrong path is what the status says, whatever the error type
    if status not in (400, 401, 404, 407):
        advice = _ADVICE_BY_ERROR.get(error, advice)
    return f"{status}: {reason}; {advice}" if reason else f"{status}: {advice}"
