"""``HOST:PORT`` as it is written: ``0.0.0.0:4433``, ``[::]:4433``, ``:4433``."""

from __future__ import annotations


def parse_host_port(text: str, *, may_be_zero: bool = True) -> tuple[str, int]:
    """(host, port); the host without brackets, ``0.0.0.0`` when left out. Raises ``ValueError``."""
    host, colon, port = text.strip().rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{text!r} is no HOST:PORT; write 127.0.0.1:4433 or [::1]:4433")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(f"{text!r}: put an IPv6 address in brackets, as in [::1]:4433")
    if int(port) == 0 and not may_be_zero:
        raise ValueError(f"{text!r}: the port must be from 1 to 65535")
    return host or "0.0.0.0", int(port)  # noqa: S104  # what an empty host means everywhere


def parse_listen_address(text: str) -> tuple[str, int]:
    """The same for a client's port, whose host must be written: who reaches it uses the client's
    access. Raises ``ValueError``.
    """
    host, port = parse_host_port(text)
    if text.strip().startswith((":", "[]")):
        raise ValueError(
            f"{text!r} names no address; write 127.0.0.1:{port} for this host alone, or "
            f"{host}:{port} for everybody who reaches it"
        )
    return host, port
