"""From TOML text to a validated model, with errors that a person can act on."""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from toppy.errors import ConfigError

Model = TypeVar("Model", bound=BaseModel)
Location = tuple[str | int, ...]

_SECRET_KEYS = frozenset(
    {
        *("token", "secret", "auth_token", "signing_key", "ship_token", "private_key_passphrase"),
        *("audit_signing_key", "audit_ship_token", "audit_verify_token", "password"),
    }
)
_MAX_VALUE_CHARACTERS = 120

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+\Z")
_ONE_KEY = r"(?:[A-Za-z0-9_-]+|\"[^\"]*\"|'[^']*')"
_DOTTED = rf"{_ONE_KEY}(?:\s*\.\s*{_ONE_KEY})*"
_TABLE = re.compile(rf"\s*\[\s*({_DOTTED})\s*\]\s*(?:#.*)?\Z")
_ARRAY_TABLE = re.compile(rf"\s*\[\[\s*({_DOTTED})\s*\]\]\s*(?:#.*)?\Z")
_KEY = re.compile(rf"\s*({_DOTTED})\s*=")
_PART = re.compile(_ONE_KEY)


def parse_toml(text: str, source: str) -> dict[str, Any]:
    """The document. Raises ``ConfigError`` with the line."""
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        # a number of thousands of digits is a plain ValueError
        what = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ConfigError(f"{source}: not valid TOML: {what}") from None


def validate(
    model: type[Model],
    data: dict[str, Any],
    text: str,
    source: str,
    variables: Mapping[str, str] | None = None,
) -> Model:
    """``data`` as ``model``. Raises ``ConfigError`` that lists every error, one per line.

    ``variables`` has, by dotted key, the environment variables that set a value.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        found = [_Found.of(details, model) for details in error.errors(include_url=False)]
        # a key that is misspelt is why another one is missing
        found.sort(key=lambda one: not one.suggestion)
        lines = [one.describe(text, source, variables or {}) for one in found]
        raise ConfigError("\n".join(dict.fromkeys(lines)), key=found[0].key) from None


def suggest(unknown: str, known: Iterable[str]) -> str:
    """`` (did you mean X?)`` or nothing."""
    close = difflib.get_close_matches(unknown, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def find_line(text: str, location: Location) -> int | None:
    """The line, counted from 1, that sets ``location`` or begins the table that should.

    Reads line by line: what stands in an inline table is found at its first line.
    """
    lines: dict[Location, int] = {}
    counts: dict[Location, int] = {}
    table: Location = ()

    def resolve(keys: Location) -> Location:
        # the last table of an array of tables is the one that is meant
        resolved: Location = ()
        for key in keys:
            resolved = (*resolved, key)
            if resolved in counts:
                resolved = (*resolved, counts[resolved] - 1)
        return resolved

    for number, line in enumerate(text.splitlines(), 1):
        if header := _ARRAY_TABLE.match(line):
            *parents, last = _split_key(header.group(1))
            array = (*resolve(tuple(parents)), last)
            counts[array] = counts.get(array, 0) + 1
            lines.setdefault(array, number)
            table = (*array, counts[array] - 1)
            lines.setdefault(table, number)
        elif header := _TABLE.match(line):
            table = resolve(_split_key(header.group(1)))
            lines.setdefault(table, number)
        elif key := _KEY.match(line):
            lines.setdefault((*table, *_split_key(key.group(1))), number)
    for length in range(len(location), 0, -1):
        if location[:length] in lines:
            return lines[location[:length]]
    return None


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
) -> dict[str, str]:
    """Let each variable that is set override its key. An empty value is as good as unset.

    Returns the variables that were applied, by dotted key.
    """
    applied = {path: variable for variable, path in variables.items() if environ.get(variable)}
    for path, variable in applied.items():
        put(data, path, environ[variable])
    return applied


@dataclass(frozen=True, slots=True)
class _Found:
    """An error of pydantic's, with its place in our words."""

    details: ErrorDetails
    location: Location
    owners: tuple[type[BaseModel], ...]
    """The models that may stand where the location's last part is a key."""

    @classmethod
    def of(cls, details: ErrorDetails, model: type[BaseModel]) -> _Found:
        location: Location = ()
        owners: tuple[type[BaseModel], ...] = (model,)
        scope: tuple[type[BaseModel], ...] = (model,)
        for part in details["loc"]:
            tagged = [m for m in scope if part in _tags(m)] if len(scope) > 1 else []
            if tagged:
                scope = tuple(tagged)
                continue  # the tag of a union is no key
            location = (*location, part)
            if isinstance(part, str):
                owners = scope
                fields = [m.model_fields[part] for m in scope if part in m.model_fields]
                scope = tuple(m for field in fields for m in _models_in(field.annotation))
        return cls(details, location, owners)

    @property
    def key(self) -> str:
        """``policy.rules[0].ports``."""
        return "".join(
            f"[{part}]" if isinstance(part, int) else f".{_quote(part)}" for part in self.location
        ).lstrip(".")

    @property
    def _known(self) -> list[str]:
        return list(dict.fromkeys(key for m in self.owners for key in m.model_fields))

    @property
    def suggestion(self) -> str:
        """Which key an unknown one may be meant to be; nothing for other errors."""
        if self.details["type"] != "extra_forbidden":
            return ""
        return suggest(str(self.location[-1]), self._known)

    def describe(self, text: str, source: str, variables: Mapping[str, str]) -> str:
        """One line: where, which key, which value, what is allowed."""
        key, what, value = self.key, self._what(), self._shown_value()
        dotted = ".".join(str(part) for part in self.location if isinstance(part, str))
        line = find_line(text, self.location)
        if dotted in variables:
            where = variables[dotted]
        else:
            # what is wrong with a table may come from either
            below = [name for path, name in variables.items() if path.startswith(f"{dotted}.")]
            if line or not below:
                below.insert(0, f"{source}:{line}" if line else source)
            where = ", ".join(below)
        return f"{where}: {key}{value}: {what}" if key else f"{where}: {what}"

    def _shown_value(self) -> str:
        """`` = value``; nothing where there is none, or where it may be a secret."""
        value = self.details.get("input")
        hidden = ("missing", "extra_forbidden", "model_type", "model_attributes_type")
        is_secret = any(part in _SECRET_KEYS for part in self.location)
        one = value[0] if isinstance(value, list | tuple) and value else value
        is_whole_table = isinstance(one, dict | BaseModel)
        if is_secret or is_whole_table or self.details["type"] in hidden:
            return ""
        shown = repr(value)
        if len(shown) > _MAX_VALUE_CHARACTERS:
            shown = f"{shown[:_MAX_VALUE_CHARACTERS]}…"
        return f" = {shown}"

    def _what(self) -> str:
        match self.details["type"]:
            case "extra_forbidden":
                hint = self.suggestion or f"; known here: {', '.join(self._known)}"
                return f"unknown key{hint}"
            case "missing":
                return "is required"
            case "model_type" | "model_attributes_type":
                return f"must be a table, such as [{self.key}]"
            case "tuple_type":
                return "must be a list"
            case "string_too_short":
                return "must not be empty"
            case "union_tag_not_found":
                return "mode: is required; it says which kind this is"
            case "union_tag_invalid":
                context = self.details["ctx"]
                return f"mode = {context['tag']!r}: must be one of {context['expected_tags']}"
            case "greater_than" | "greater_than_equal" | "less_than" | "less_than_equal":
                return f"must be {self._allowed()}"
        message = self.details["msg"].removeprefix("Value error, ")
        return message.replace("Input should be", "must be", 1)

    def _allowed(self) -> str:
        field = self.owners[0].model_fields.get(str(self.location[-1]))
        return allowed_range(field) if field is not None else "in range"


def allowed_range(field: FieldInfo) -> str:
    """``from 1 to 64``, ``at least 1``, ``more than 0 and at most 30``; nothing without bounds."""
    bounds = {
        name: getattr(item, name)
        for item in field.metadata
        for name in ("ge", "gt", "le")
        if hasattr(item, name)
    }
    if "ge" in bounds and "le" in bounds:
        return f"from {bounds['ge']} to {bounds['le']}"
    words = {"ge": "at least", "gt": "more than", "le": "at most"}
    return " and ".join(f"{words[name]} {limit}" for name, limit in bounds.items())


def _quote(key: str) -> str:
    return key if _BARE_KEY.match(key) else json.dumps(key)


def _split_key(dotted: str) -> tuple[str, ...]:
    return tuple(part.strip("\"'") for part in _PART.findall(dotted))


def _tags(model: type[BaseModel]) -> tuple[Any, ...]:
    mode = model.model_fields.get("mode")
    if mode is None or get_origin(mode.annotation) is not Literal:
        return ()
    return get_args(mode.annotation)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for argument in get_args(annotation) for found in _models_in(argument)]
