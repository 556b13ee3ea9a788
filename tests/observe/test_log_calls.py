"""Every log call in the source: constant text, and fields from the one list."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import toppy
from toppy.observe.log import FIELDS

_LEVELS = {"debug", "info", "warning", "error", "exception", "critical"}
_SOURCE = Path(toppy.__file__).parent


def _log_calls() -> Iterator[tuple[str, ast.Call]]:
    for path in sorted(_SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            owner = ast.unparse(node.func.value)
            says = node.func.attr in _LEVELS and owner.split(".")[-1] in {"log", "_log"}
            binds = node.func.attr == "bind" and "get_logger" in owner
            if says or binds:
                yield f"{path.relative_to(_SOURCE)}:{node.lineno}", node


def test_log_calls_are_found() -> None:
    assert len(list(_log_calls())) > 3


def _is_constant(text: ast.expr) -> bool:
    return isinstance(text, ast.Constant) or (isinstance(text, ast.Name) and text.id.isupper())


def test_the_text_of_a_log_call_is_constant() -> None:
    varying = [
        where
        for where, call in _log_calls()
        if call.args and not (len(call.args) == 1 and _is_constant(call.args[0]))
    ]
    assert varying == []


def test_fields_of_log_calls_are_on_the_list() -> None:
    strange = [
        f"{where}: {keyword.arg}"
        for where, call in _log_calls()
        for keyword in call.keywords
        if keyword.arg not in FIELDS | {"exc_info"}
    ]
    assert strange == [], "use a name of toppy.observe.log.FIELDS, or add one there"
