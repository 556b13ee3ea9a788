"""``docs/configuration.md`` from the settings: ``python -m toppy.config.reference``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from toppy.config import client, gateway
from toppy.config.client import AllowRule, ClientConfig
from toppy.config.gateway import GatewayConfig
from toppy.config.policy import PolicyRule

_INTRODUCTION = """\
# Configuration reference

This page is generated from the settings (`make docs`); a test keeps it current. `applies` says
when a changed value takes effect: `restart` of the gateway.

Values are checked when a file is read: `toppy-gw check-config` names the file, line, key, value
and what is allowed. Unknown keys are errors. Relative paths begin at the file's own directory.
"""


def render_reference() -> str:
    """The page."""
    parts = [_INTRODUCTION]
    parts.append("## The gateway: `gateway.toml`\n")
    parts.append(
        "Found by `--config`, else `TOPPY_GW_CONFIG`, else `/etc/toppy/gateway.toml`. Without a "
        "file the environment alone configures the gateway.\n"
    )
    parts += _sections(GatewayConfig, shows_applies=True)
    parts.append("### `[[policy.rules]]`\n")
    parts.append(_table(PolicyRule, shows_applies=False))
    parts += _subsections(PolicyRule, "policy.rules.", shows_applies=False)
    parts.append("### Environment of `toppy-gw`\n")
    parts.append(
        "Each overrides the file. A `TOPPY_GW_` variable that is not listed causes a warning.\n"
    )
    parts.append(_variables({**gateway.ENVIRONMENT, "TOPPY_GW_CONFIG": ""}))
    parts.append("## The client: `config.toml`\n")
    parts.append(
        "Found by `--config`, else `TOPPY_CONFIG`, else `~/.config/toppy/config.toml` "
        "(`$XDG_CONFIG_HOME` is honoured). It has a token: `chmod 600` it.\n"
    )
    parts += _sections(ClientConfig, shows_applies=False)
    parts.append("### `[[policy.allow]]`\n")
    parts.append(
        "A rule needs `ports`, and `cidr` or `host`. A target that is a name is decided by `host` "
        "rules; where there are only `cidr` rules it is resolved here, and every address must be "
        "allowed.\n"
    )
    parts.append(_table(AllowRule, shows_applies=False))
    parts.append(
        "`when` is what it is at the gateway: see `[policy.rules.when]`. `[[policy.deny]]` has the "
        "same keys, and needs none of them.\n"
    )
    parts.append("### Environment of `toppy`\n")
    parts.append(
        _variables(
            {
                **client.ENVIRONMENT,
                "TOPPY_CONFIG": "",
                "TOPPY_TOKEN_PASSPHRASE": "opens the token cache, where a passphrase protects it",
                "TOPPY_DOCTOR_NET": "`pass`, `fail` or `skip` instead of the network checks",
                "TOPPY_DOCTOR_TUN": "`pass`, `fail` or `skip` instead of the TUN check",
                "TOPPY_DOCTOR_TARGET": "`HOST:PORT` that `toppy doctor` asks both policies about",
                "TOPPY_WINTUN_DLL": "Windows: the file of Wintun that `toppy doctor` tries",
                "TOPPY_WINTUN_DIR": "Windows: the folder that has it",
                "TOPPY_WINTUN_ADAPTER": "Windows: its adapter; default: `toppy-doctor`",
            }
        )
    )
    return "\n".join(parts).rstrip() + "\n"


def _sections(model: type[BaseModel], *, shows_applies: bool) -> Iterator[str]:
    yield "### Top level\n"
    yield _table(model, shows_applies=shows_applies)
    yield from _subsections(model, "", shows_applies=shows_applies)


def _subsections(model: type[BaseModel], prefix: str, *, shows_applies: bool) -> Iterator[str]:
    for name, field in model.model_fields.items():
        for section in _models(field.annotation):
            if issubclass(section, PolicyRule):
                continue
            modes = section.model_fields.get("mode")
            title = f"[{prefix}{name}]"
            if get_origin(field.annotation) is tuple:
                title = f"[{title}]"
            if modes is not None:
                title += f" with mode = {get_args(modes.annotation)[0]!r}".replace("'", '"')
            yield f"### `{title}`\n"
            text = re.sub(r"\s+", " ", section.__doc__ or "").strip()
            yield f"{text.replace('``', '`')}\n"
            table = _table(section, shows_applies=shows_applies)
            if table:
                yield table
            yield from _subsections(section, f"{prefix}{name}.", shows_applies=shows_applies)


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models(argument)]


def _table(model: type[BaseModel], *, shows_applies: bool) -> str:
    rows = [
        (name, field)
        for name, field in model.model_fields.items()
        if name != "mode"
        and (not _models(field.annotation) or issubclass(_models(field.annotation)[0], PolicyRule))
    ]
    if not rows:
        return ""
    head = "| key | default | meaning |" + (" applies |" if shows_applies else "")
    lines = [head, "|---" * head.count("|", 1) + "|"]
    for name, field in rows:
        line = f"| `{name}` | {_default(field)} | {_meaning(field)} |"
        if shows_applies:
            extra = field.json_schema_extra
            line += f" {extra.get('applies', '') if isinstance(extra, dict) else ''} |"
        lines.append(line)
    return "\n".join(lines) + "\n"


def _default(field: FieldInfo) -> str:
    if field.default_factory is not None:
        return "none"
    default = field.default
    if default is PydanticUndefined or default is ...:
        return "required"
    if default is None or default in ("", ()):
        return "none"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    if isinstance(default, tuple):
        return "`[" + ", ".join(f'"{item}"' for item in default) + "]`"
    return f'`"{default}"`' if isinstance(default, str) else f"`{default}`"


def _meaning(field: FieldInfo) -> str:
    text = (field.description or "").replace("|", "\\|")
    bounds = {}
    for item in field.metadata:
        for kind in ("ge", "gt", "le"):
            if getattr(item, kind, None) is not None:
                bounds[kind] = getattr(item, kind)
    choices = _choices(field.annotation)
    if not all(f"`{choice}`" in text for choice in choices):
        text += f" One of {', '.join(f'`{choice}`' for choice in choices)}."
    if "le" in bounds:
        low = bounds.get("ge", bounds.get("gt"))
        text += f" {'Above ' if 'gt' in bounds else ''}{low} to {bounds['le']}."
    elif "ge" in bounds:
        text += f" At least {bounds['ge']}."
    if _is_secret(field.annotation):
        text += " Never shown in logs."
    return re.sub(r"\s+", " ", text)


def _choices(annotation: Any) -> tuple[str, ...]:
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return tuple(choice for argument in get_args(annotation) for choice in _choices(argument))


def _is_secret(annotation: Any) -> bool:
    return annotation is SecretStr or SecretStr in get_args(annotation)


def _variables(variables: Mapping[str, str]) -> str:
    lines = ["| variable | stands for |", "|---|---|"]
    for name, key in sorted(variables.items()):
        meaning = (key if " " in key else f"`{key}`") if key else "the configuration file"
        lines.append(f"| `{name}` | {meaning} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(render_reference(), end="")
