"""What ``toppy-gw status`` asks and prints."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import httpx

from toppy.control.main import ADMIN_SOCKET
from toppy.errors import ConfigError

_TIMEOUT_S = 5.0


def fetch_status(runtime_dir: Path) -> dict[str, Any]:
    """Ask through the unix socket. Raises ``ConfigError`` when nobody answers."""
    path = runtime_dir / ADMIN_SOCKET
    advice = "is it running, with this configuration, and may this user read its runtime_dir?"
    if not path.is_socket():
        raise ConfigError(f"no gateway answers at {path} (there is no socket); {advice}")
    transport = httpx.HTTPTransport(uds=str(path))
    try:
        with httpx.Client(transport=transport, timeout=_TIMEOUT_S, trust_env=False) as client:
            answer = client.get("http://toppy-gw/status")
            answer.raise_for_status()
            facts: dict[str, Any] = answer.json()
            return facts
    except (httpx.HTTPError, ValueError) as error:
        raise ConfigError(f"no gateway answers at {path} ({error}); {advice}") from None


def render_status(facts: dict[str, Any]) -> str:
    """The same facts for people."""
    lines = [
        f"toppy-gw {facts['version']}, engine {facts['engine']}, generation "
        f"{facts['generation']}, up {_ago(facts['since'])}, pid {facts['pid']}",
        f"listening on {', '.join(facts['listen'])}"
        + ("" if facts["steered"] else " (without BPF steering)"),
        f"{facts['connections']} connections, {facts['tunnels']} tunnels, "
        f"{facts['worker_deaths']} worker deaths",
    ]
    lines += [
        f"  worker {w['slot']} gen {w['generation']}: {w['state']}, pid {w['pid']}, up "
        f"{_ago(w['since'])}, {w['connections']} connections, {w['tunnels']} tunnels, "
        f"{w['datagrams_to_target']} datagrams to targets, {w['datagrams_to_client']} back"
        for w in facts["workers"]
    ]
    if facts["drops"]:
        drops = ", ".join(f"{reason} {count}" for reason, count in sorted(facts["drops"].items()))
        lines.append(f"dropped: {drops}")
    return "\n".join(lines)


def _ago(since: float) -> str:
    seconds = int(max(0.0, time.time() - since))
    days, rest = divmod(seconds, 86400)
    hours, rest = divmod(rest, 3600)
    minutes, seconds = divmod(rest, 60)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
