"""How many files and sockets this process may have open."""

from __future__ import annotations

import resource


def raise_descriptor_limit() -> None:
    """Use all that the hard limit allows: every tunnel has a socket."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
