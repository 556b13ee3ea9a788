"""docs/configuration.md says what the settings are."""

from __future__ import annotations

from pathlib import Path

from toppy.config.client import ClientConfig
from toppy.config.gateway import ENVIRONMENT, GatewayConfig
from toppy.config.reference import render_reference

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_the_page_is_current() -> None:
    assert PAGE.read_text() == render_reference(), "run: make docs"


def test_every_key_and_variable_is_on_the_page() -> None:
    page = render_reference()
    for model in (GatewayConfig, ClientConfig):
        for name in model.model_fields:
            assert f"`{name}`" in page or f"[{name}" in page or f"{name}]" in page, name
    for variable in ENVIRONMENT:
        assert f"`{variable}`" in page
