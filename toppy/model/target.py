"""Where a tunnel leads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Protocol = Literal["udp", "tcp"]


@dataclass(frozen=True, slots=True)
class Target:
    """What a client asked for, before resolution.

    ``host`` is a DNS name in lower case without a trailing dot, or an IP address in its canonical
    text form (no brackets, no zone).
    """

    host: str
    port: int
    """1 to 65535."""
    protocol: Protocol = "udp"

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"
