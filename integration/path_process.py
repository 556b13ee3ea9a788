"""A process that emulates a path, and answers each line on its standard input with a report."""

from __future__ import annotations

import contextlib
import json
import select
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from integration.processes import DEADLINE_S


class PathProcess:
    """It runs, unless ``ask`` says otherwise."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.returncode

    def ask(self) -> dict[str, Any]:
        """Its report. Raises ``TimeoutError``, or ``RuntimeError`` when it has ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        if not select.select([self._process.stdout], [], [], DEADLINE_S)[0]:
            raise TimeoutError("the path does not answer")
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the path has ended; what it said is above")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextlib.contextmanager
def running_path_process(module: str, arguments: dict[str, Any]) -> Iterator[PathProcess]:
    """``python -m module ARGUMENTS``, ended with its standard input."""
    process = subprocess.Popen(
        [sys.executable, "-m", module, json.dumps(arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield PathProcess(process)
    finally:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        try:
            process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        assert process.stdout is not None
        process.stdout.close()
