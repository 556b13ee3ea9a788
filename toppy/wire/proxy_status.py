"""Proxy-Status (RFC 9209): who refused, why, by which rule; and what that means to a person."""

from __future__ import annotations

import re
from dataclasses import dataclass

_TOKEN = re.compile(r"[A-Za-z*][A-Za-z0-9:/!#$%&'*+\-.^_`|~]*\Z")
_PARAMETER = re.compile(
    r';\s*([a-z*][a-z0-9_.*-]*)(?:=("(?:[^"\\]|\\["\\])*"|[A-Za-z0-9*][^;,\s"]*|-?[0-9.]+|\?[01]))?'
)
_MAX_TEXT = 400


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
    """A Proxy-Status field value. ``rule`` is a parameter of ours, ``toppy-rule``."""
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
    """The last proxy's entry of a field value (the one nearest to us), or None for nonsense."""
    entry = _last_member(value).strip()
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


def _last_member(value: str) -> str:
    start, is_quoted, is_escaped = 0, False, False
    for index, character in enumerate(value):
        if is_escaped:
            is_escaped = False
        elif is_quoted and character == "\\":
            is_escaped = True
        elif character == '"':
            is_quoted = not is_quoted
        elif character == "," and not is_quoted:
            start = index + 1
    return value[start:]


def _unquote(text: str) -> str:
    if text.startswith('"'):
        return re.sub(r"\\(.)", r"\1", text[1:-1])
    return text


_ADVICE = {
    400: "the gateway did not understand the request; check the target and the gateway's template",
    401: "the gateway does not accept the token; get a new one (auth_token, or `toppy login`)",
    403: "the gateway's policy does not allow this target; ask its operator for a rule",
    404: "there is no UDP proxy at this address; check gateway, port and gateway_template",
    407: "the gateway asks for credentials; set auth_token",
    429: "the gateway has reached a limit; try again later",
    502: "the gateway cannot reach the target; check that it runs and is reachable from there",
    503: "the gateway is overloaded or starting; try again later",
    504: "the gateway got no answer in time; try again, and check its name servers",
}


def explain(status: int, proxy_status: ProxyStatus | None) -> str:
    """One sentence: what, which rule, what to do next."""
    reason = ""
    if proxy_status is not None:
        reason = proxy_status.details or proxy_status.error.replace("_", " ")
        if proxy_status.rule:
            reason += f" (rule {proxy_status.rule!r})"
    advice = _ADVICE.get(status, "the gateway refused the tunnel")
    return f"{status}: {reason}; {advice}" if reason else f"{status}: {advice}"
