"""Commands that run inside the test's process leave its logging as it was."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    yield
    root.handlers, root.level = handlers, level
    structlog.reset_defaults()


@pytest.fixture(autouse=True)
def audit_log_of_the_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands without a HOME write their audit log to the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TOPPY_AUDIT_LOG", str(tmp_path / "audit.jsonl"))
