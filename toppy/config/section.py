"""What every table of a configuration file shares."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

Engine = Literal["auto", "native", "aioquic"]
CongestionControl = Literal["cubic", "bbr", "newreno"]


def setting(default: Any, description: str, *, applies: str = "restart", **bounds: Any) -> Any:
    """A field with what the reference says about it.

    ``applies`` says when a change takes effect: ``hot`` (at once), ``reload`` or ``restart``.
    """
    return Field(default, description=description, json_schema_extra={"applies": applies}, **bounds)


class Table(BaseModel):
    """Frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Section(Table):
    """A table that is not one of several kinds told apart by ``mode``."""

    @field_validator("*", mode="before")
    @classmethod
    def _plain(cls, value: Any, info: ValidationInfo) -> Any:
        # pydantic takes true for 1; a NUL would end a path early in the system call
        annotation = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and annotation is not bool:
            raise ValueError("must not be true or false")
        if isinstance(value, str) and "\0" in value:
            raise ValueError("has a NUL character")
        return value


def _split(value: Any) -> Any:
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


CommaList = Annotated[tuple[str, ...], BeforeValidator(_split)]
"""A list, or one text with commas (as environment variables have it)."""


def check_token(token: str, *, min_characters: int = 1) -> None:
    """Raise ``ValueError`` unless ``token`` can stand in an Authorization field (RFC 6750)."""
    if not token:
        raise ValueError("must not be empty")
    if len(token) < min_characters:
        raise ValueError(f"is too short: at least {min_characters} characters")
    if not all("!" <= character <= "~" for character in token):
        raise ValueError("must be printable ASCII without spaces")
