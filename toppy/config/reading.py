"""From TOML text to a validated model, with errors that a person can act on."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, SecretStr, ValidationError
from pydantic_core import ErrorDetails

from toppy.errors import ConfigError

Model = TypeVar("Model", bound=BaseModel)

_SECRET_KEYS = frozenset({"token", "secret", "auth_token", "audit_signing_key", "audit_ship_token"})


def parse_toml(text: str, source: str) -> dict[str, Any]:
    """The document. Raises ``ConfigError`` with the line."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source}: not valid TOML: {error}") from None


def validate(model: type[Model], data: dict[str, Any], text: str, source: str) -> Model:
    """``data`` as ``model``. Raises ``ConfigError`` that lists every error, one per line."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        lines = [_describe(e, model, text, source) for e in error.errors(include_url=False)]
        key = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise ConfigError("\n".join(lines), key=key) from None


def suggest(unknown: str, known: list[str]) -> str:
    """`` (did you mean X?)`` or nothing."""
    close = difflib.get_close_matches(unknown, known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def find_line(text: str, location: tuple[str | int, ...]) -> int | None:
    """The line that sets the key at ``location``, counted from 1, where it can be found."""
    wanted = [part for part in location if isinstance(part, str)]
    indexes = [part for part in location if isinstance(part, int)]
    seen = 0
    section: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        header = re.match(r"\s*(\[\[?)\s*([A-Za-z0-9_.\"-]+)\s*\]", line)
        if header:
            section = [part.strip('"') for part in header.group(2).split(".")]
            if header.group(1) == "[[" and section == wanted[: len(section)]:
                seen += 1
            if section == wanted:
                return number
            continue
        key = re.match(r"\s*([A-Za-z0-9_-]+)\s*=", line)
        if key and [*section, key.group(1)] == wanted[: len(section) + 1]:
            if indexes and seen and seen != indexes[0] + 1:
                continue
            return number
    return None


def _describe(
    error: ErrorDetails, model: type[BaseModel], text: str, source: str
) -> str:
    location = error["loc"]
    key = "".join(
        f"[{part}]" if isinstance(part, int) else f".{part}" for part in location
    ).lstrip(".")
    line = find_line(text, location)
    where = f"{source}:{line}" if line else source
    if error["type"] == "extra_forbidden":
        known = list(_model_at(model, location[:-1]).model_fields)
        return (
            f"{where}: {key}: unknown key{suggest(str(location[-1]), known)}; "
            f"known here: {', '.join(known)}"
        )
    if error["type"] == "missing":
        return f"{where}: {key}: is required"
    what = error["msg"].removeprefix("Value error, ")
    value = error.get("input")
    is_secret = bool(location) and location[-1] in _SECRET_KEYS
    if not location:
        return f"{source}: {what}"
    if is_secret or isinstance(value, dict | BaseModel | SecretStr):
        return f"{where}: {key}: {what}"
    return f"{where}: {key} = {value!r}: {what}"


def _model_at(model: type[BaseModel], location: tuple[str | int, ...]) -> type[BaseModel]:
    for part in location:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part)
        if field is None:
            break
        for candidate in _models_in(field.annotation):
            model = candidate
            break
    return model


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    found: list[type[BaseModel]] = []
    for argument in getattr(annotation, "__args__", ()):
        found += _models_in(argument)
    return found


def put(data: dict[str, Any], path: str, value: Any) -> None:
    """Set ``a.b.c`` in nested tables, making those that are missing."""
    *tables, last = path.split(".")
    for name in tables:
        table = data.setdefault(name, {})
        if not isinstance(table, dict):
            return  # the file has something else there; validation says so
        data = table
    data[last] = value


def apply_environment(
    data: dict[str, Any], environ: Mapping[str, str], variables: Mapping[str, str]
) -> None:
    """Let each variable that is set override its key. An empty value is as good as unset."""
    for variable, path in variables.items():
        value = environ.get(variable, "")
        if value:
            put(data, path, value)
