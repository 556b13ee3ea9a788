"""Whether the gateway in this container serves: exit code 0, or 1 and the reason.

Asks ``/healthz`` at the port of ``TOPPY_GW_LISTEN``. The standard library alone, and little of it:
this runs every few seconds.
"""

from __future__ import annotations

import http.client
import os
import sys

_TIMEOUT_S = 1.5
"""Below the 2 s that Docker waits, so that the reason is said."""


def main() -> str | None:
    """The problem, if there is one."""
    host, _, port = os.environ.get("TOPPY_GW_LISTEN", "0.0.0.0:8080").rpartition(":")
    host = host.strip("[]")
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  # asks, binds nothing
    connection = http.client.HTTPConnection(host, int(port), timeout=_TIMEOUT_S)
    try:
        connection.request("GET", "/healthz")
        answer = connection.getresponse()
        body = answer.read(1024).decode("utf-8", "replace")
    except OSError as error:
        return f"{host}:{port}: {error}"
    finally:
        connection.close()
    return None if answer.status == 200 else f"{answer.status} {body}"


if __name__ == "__main__":
    sys.exit(main())
