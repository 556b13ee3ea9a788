"""Talking to a provider: bounds, redirects, trouble."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import httpx
import pytest

from tests.net.oidc_provider import ISSUER, FakeProvider
from toppy.auth.oidc import OidcError, ProviderRefusedError, ProviderUnreachableError
from toppy.net.oidc_http import ProviderConnection


async def ask(transport: httpx.AsyncBaseTransport, timeout_s: float = 5.0) -> bytes:
    connection = ProviderConnection(ISSUER, timeout_s=timeout_s, transport=transport)
    async with connection:
        return await connection.post(f"{ISSUER}/token", {"grant_type": "x", "secret": "sesame"})


def test_discovery_is_fetched_once_and_leads_to_the_keys() -> None:
    fake = FakeProvider()

    async def run() -> str:
        async with fake.connect(ISSUER) as connection:
            await connection.discover()
            return await connection.fetch_keys()

    assert asyncio.run(run()) == fake.jwks
    assert fake.paths() == ["/.well-known/openid-configuration", "/jwks"]


def test_a_provider_that_is_down_is_retryable_and_no_secret_is_told() -> None:
    fake = FakeProvider(is_down=True)

    async def run() -> None:
        async with fake.connect(ISSUER) as connection:
            await connection.post(f"{ISSUER}/token", {"secret": "sesame"})

    with pytest.raises(ProviderUnreachableError, match=r"login\.example.*refused") as error:
        asyncio.run(run())
    assert error.value.retryable
    assert "sesame" not in str(error.value)


def test_refusals_have_their_code() -> None:
    transport = httpx.MockTransport(lambda _: httpx.Response(400, json={"error": "invalid_grant"}))
    with pytest.raises(ProviderRefusedError) as refused:
        asyncio.run(ask(transport))
    assert refused.value.code == "invalid_grant"


def test_redirects_are_not_followed() -> None:
    transport = httpx.MockTransport(
        lambda _: httpx.Response(302, headers={"location": "https://elsewhere.example/"})
    )
    with pytest.raises(OidcError):
        asyncio.run(ask(transport))


def test_an_endless_answer_is_cut() -> None:
    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b"x" * 65536

    transport = httpx.MockTransport(lambda _: httpx.Response(200, content=endless()))
    with pytest.raises(OidcError, match="too large"):
        asyncio.run(ask(transport))


def test_an_answer_that_never_comes_is_given_up() -> None:
    async def silent(request: httpx.Request) -> httpx.Response:
        await asyncio.Event().wait()
        raise AssertionError

    with pytest.raises(ProviderUnreachableError, match="did not answer"):
        asyncio.run(ask(httpx.MockTransport(silent), timeout_s=0.01))
