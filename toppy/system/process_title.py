"""What ``ps`` shows for this process."""

from __future__ import annotations

import setproctitle


def set_process_title(title: str) -> None:
    """Show ``title`` in place of the command line, such as ``toppy-gw: worker 1 gen 3``."""
    setproctitle.setproctitle(title)
