"""Talks to an OpenID provider: bounded answers, deadlines, no redirects."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping
from types import TracebackType
from urllib.parse import urlsplit

import httpx

from toppy import __version__
from toppy.auth.oidc import (
    MAX_ANSWER_BYTES,
    OidcError,
    Provider,
    ProviderUnreachableError,
    discovery_url,
    is_loopback,
    parse_discovery,
    parse_refusal,
)

REQUEST_TIMEOUT_S = 30.0
"""For a whole request (T-090)."""


class ProviderConnection:
    """One provider. An async context manager.

    Certificates are checked against the system's authorities (``SSL_CERT_FILE`` is honoured).
    """

    def __init__(
        self,
        issuer: str,
        *,
        timeout_s: float = REQUEST_TIMEOUT_S,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """``transport`` stands in the place of the network in tests."""
        self.issuer = issuer
        self._url = discovery_url(issuer)
        self._timeout_s = timeout_s
        self._transport = transport
        self._provider: Provider | None = None

    async def __aenter__(self) -> ProviderConnection:
        # a proxy is no way to this host's own addresses
        is_local = is_loopback(urlsplit(self.issuer).hostname or "")
        self._http = httpx.AsyncClient(
            verify=ssl.create_default_context(),
            timeout=self._timeout_s,
            trust_env=not is_local,
            transport=self._transport,
            headers={"Accept": "application/json", "User-Agent": f"toppy/{__version__}"},
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._http.aclose()

    async def discover(self) -> Provider:
        """The discovery document, fetched once. Raises ``OidcError``."""
        if self._provider is None:
            self._provider = parse_discovery(await self._ask("GET", self._url), self.issuer)
        return self._provider

    async def fetch_keys(self) -> str:
        """The provider's JWK set, as text. Raises ``OidcError``."""
        provider = await self.discover()
        return (await self._ask("GET", provider.jwks_uri)).decode("utf-8", "replace")

    async def post(self, url: str, form: Mapping[str, str]) -> bytes:
        """The body of a 2xx answer; raises what ``parse_refusal`` makes of another one."""
        return await self._ask("POST", url, form)

    async def _ask(self, method: str, url: str, form: Mapping[str, str] | None = None) -> bytes:
        host = urlsplit(url).netloc
        try:
            async with (
                asyncio.timeout(self._timeout_s),
                self._http.stream(method, url, data=form) as answer,
            ):
                body = b""
                async for chunk in answer.aiter_bytes():
                    body += chunk
                    if len(body) > MAX_ANSWER_BYTES:
                        raise OidcError(f"the answer of {host} is too large")
        except (TimeoutError, httpx.TimeoutException):
            raise ProviderUnreachableError(
                f"the provider {host} did not answer within {self._timeout_s:g} s"
            ) from None
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            # its text may be the URL, which has no secret: these are in the form
            why = str(error) or type(error).__name__
            raise ProviderUnreachableError(
                f"the provider {host} cannot be reached: {why}"
            ) from None
        if not answer.is_success:
            raise parse_refusal(answer.status_code, body)
        return body
