"""What differs between two gateway configurations, and what it takes to apply it (pure)."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import BaseModel

from toppy.config.gateway import GatewayConfig


def changed_settings(old: GatewayConfig, new: GatewayConfig) -> dict[str, str]:
    """Keys whose values differ, with their ``applies``: ``hot``, ``reload`` or ``restart``."""
    return dict(_changes(old, new, ""))


def _changes(old: BaseModel, new: BaseModel, prefix: str) -> Iterator[tuple[str, str]]:
    for name, field in type(new).model_fields.items():
        before, after = getattr(old, name), getattr(new, name)
        if isinstance(before, BaseModel) and isinstance(after, BaseModel):
            yield from _changes(before, after, f"{prefix}{name}.")
        elif before != after:
            extra = field.json_schema_extra
            applies = extra.get("applies") if isinstance(extra, dict) else None
            yield f"{prefix}{name}", str(applies or "restart")
