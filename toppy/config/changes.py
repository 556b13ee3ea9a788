"""What differs between two gateway configurations, and what it takes to apply it (pure)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from toppy.config.gateway import GatewayConfig

_M = TypeVar("_M", bound=BaseModel)


def changed_settings(old: GatewayConfig, new: GatewayConfig) -> dict[str, str]:
    """Keys whose values differ, with their ``applies``: ``hot``, ``reload`` or ``restart``."""
    return dict(_changes(old, new, ""))


def without_restart(running: _M, wanted: _M) -> _M:
    """``wanted``, but for what applies at a restart only: there it has the values of ``running``.

    The result is not validated.
    """
    kept: dict[str, Any] = {}
    for name, field in type(wanted).model_fields.items():
        before, after = getattr(running, name), getattr(wanted, name)
        if isinstance(before, BaseModel) and isinstance(after, BaseModel):
            kept[name] = without_restart(before, after)
        elif _applies(field) == "restart":
            kept[name] = before
    return wanted.model_copy(update=kept)


def _changes(old: BaseModel, new: BaseModel, prefix: str) -> Iterator[tuple[str, str]]:
    for name, field in type(new).model_fields.items():
        before, after = getattr(old, name), getattr(new, name)
        if isinstance(before, BaseModel) and isinstance(after, BaseModel):
            yield from _changes(before, after, f"{prefix}{name}.")
        elif before != after:
            yield f"{prefix}{name}", _applies(field)


def _applies(field: FieldInfo) -> str:
    extra = field.json_schema_extra
    applies = extra.get("applies") if isinstance(extra, dict) else None
    return str(applies or "restart")
