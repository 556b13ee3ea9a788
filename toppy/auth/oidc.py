"""OpenID Connect, the messages: what is sent to a provider, and what its answers mean.

Pure: no network, no clock. Every answer is checked before anything in it is used.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar
from urllib.parse import urlencode, urlsplit, urlunsplit

import msgspec

from toppy.auth.bearer import MAX_TOKEN_BYTES
from toppy.auth.jwt import AuthenticationError, JwtVerifier
from toppy.config.section import check_token
from toppy.errors import ConfigError, ToppyError
from toppy.model.identity import Identity

DISCOVERY_PATH = "/.well-known/openid-configuration"
DEVICE_GRANT = "urn:ietf:params:oauth:grant-type:device_code"
MAX_ANSWER_BYTES = 1 << 20
"""Of any answer of a provider; a JWK set with many certificates has some 20 KiB."""
DEFAULT_POLL_INTERVAL_S = 5.0
"""RFC 8628 section 3.2."""
MAX_DEVICE_LIFETIME_S = 3600.0
ID_TOKEN_LEEWAY_S = 60.0
_MAX_SHOWN_CHARACTERS = 200
_MAX_BEARER_BYTES = MAX_TOKEN_BYTES - len("Bearer ")


class OidcError(ToppyError):
    """The provider cannot be used as it should; the text is fit for the user, and has no token."""


class ProviderUnreachableError(OidcError):
    """It did not answer, or has trouble of its own: trying again later may work."""

    retryable = True


class ProviderRefusedError(OidcError):
    """The provider said no. ``code`` is the error of RFC 6749 section 5.2 or RFC 8628 3.5."""

    def __init__(self, code: str, description: str = "") -> None:
        self.code = code
        said = f"{code}: {description}" if description else code
        super().__init__(f"the provider refused ({said})")


@dataclass(frozen=True, slots=True)
class Provider:
    """What a provider's discovery document says (OpenID Connect Discovery 1.0 section 3)."""

    issuer: str
    token_endpoint: str
    jwks_uri: str
    authorization_endpoint: str | None = None
    device_authorization_endpoint: str | None = None
    revocation_endpoint: str | None = None
    names_itself: bool = False
    """It puts ``iss`` into every redirect (RFC 9207)."""


@dataclass(frozen=True, slots=True)
class Client:
    """This program, as it is known to a provider, and what it asks for."""

    client_id: str
    scope: str
    audience: str | None = None
    hints: Mapping[str, str] = field(default_factory=dict)
    """Further parameters of the first request, such as the identity provider behind a broker."""


@dataclass(frozen=True, slots=True)
class DeviceAuthorization:
    """The answer that begins a device login (RFC 8628 section 3.2)."""

    device_code: str = field(repr=False)
    user_code: str
    verification_uri: str
    verification_uri_complete: str | None
    lifetime_s: float
    interval_s: float


@dataclass(frozen=True, slots=True)
class TokenAnswer:
    """The answer of a token endpoint (RFC 6749 section 5.1)."""

    access_token: str = field(repr=False)
    token_type: str
    lifetime_s: float | None
    refresh_token: str | None = field(default=None, repr=False)
    id_token: str | None = field(default=None, repr=False)
    scope: str | None = None


class _Discovery(msgspec.Struct):
    issuer: str
    token_endpoint: str
    jwks_uri: str
    authorization_endpoint: str | None = None
    device_authorization_endpoint: str | None = None
    revocation_endpoint: str | None = None
    authorization_response_iss_parameter_supported: bool = False


class _Device(msgspec.Struct):
    device_code: str
    user_code: str
    expires_in: float
    verification_uri: str | None = None
    verification_url: str | None = None
    verification_uri_complete: str | None = None
    interval: float | None = None


class _Tokens(msgspec.Struct):
    access_token: str
    token_type: str
    expires_in: float | None = None
    refresh_token: str | None = None
    id_token: str | None = None
    scope: str | None = None


class _Refusal(msgspec.Struct):
    error: str
    error_description: str | None = None


# discovery and keys


def discovery_url(issuer: str) -> str:
    """Where a provider describes itself. Raises ``OidcError`` for an issuer that is no URL."""
    check_url(issuer, "issuer")
    return issuer.rstrip("/") + DISCOVERY_PATH


def parse_discovery(data: bytes, issuer: str) -> Provider:
    """A discovery document of ``issuer``, to the letter (Discovery section 4.3).

    Raises ``OidcError``.
    """
    found = _decode(_Discovery, data, "the discovery document")
    if found.issuer != issuer:
        raise OidcError(
            f"the provider calls itself {show(found.issuer)!r}, not {issuer!r}: set issuer to "
            "exactly that, or find out who answers there"
        )
    for name in (
        "token_endpoint",
        "jwks_uri",
        "authorization_endpoint",
        "device_authorization_endpoint",
        "revocation_endpoint",
    ):
        value = getattr(found, name)
        if value is not None:
            check_url(value, name)
    return Provider(
        issuer=found.issuer,
        token_endpoint=found.token_endpoint,
        jwks_uri=found.jwks_uri,
        authorization_endpoint=found.authorization_endpoint,
        device_authorization_endpoint=found.device_authorization_endpoint,
        revocation_endpoint=found.revocation_endpoint,
        names_itself=found.authorization_response_iss_parameter_supported,
    )


def check_url(url: str, what: str) -> None:
    """Raise ``OidcError`` unless ``url`` is https, or http on this host's loopback."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise OidcError(f"{what} is no URL: {show(url)!r}") from None
    is_plain = url.isascii() and url.isprintable() and " " not in url
    if not is_plain or not host or port == 0 or parts.username is not None or parts.fragment:
        raise OidcError(f"{what} is no URL that can be used: {show(url)!r}")
    if parts.scheme != "https" and not (parts.scheme == "http" and is_loopback(host)):
        raise OidcError(f"{what} must begin with https:// (http:// is for loopback): {show(url)!r}")


def is_loopback(host: str) -> bool:
    """Whether a host of a URL is this machine, by address or as ``localhost``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


# device authorization (RFC 8628)


def device_request(client: Client) -> dict[str, str]:
    """The form that begins a device login."""
    return {"client_id": client.client_id, "scope": client.scope, **asked_parameters(client)}


def parse_device_authorization(data: bytes, client: Client) -> DeviceAuthorization:
    """Raises ``OidcError``."""
    found = _decode(_Device, data, "the answer of the device authorization endpoint")
    uri = found.verification_uri or found.verification_url  # the name before RFC 8628
    if uri is None or not found.device_code or not found.user_code:
        raise OidcError("the provider's answer has no device code, user code or address")
    complete = found.verification_uri_complete
    for each in (uri, complete):
        if each is not None:
            check_url(each, "verification_uri")
    if not found.user_code.isprintable() or len(found.user_code) > 64:
        raise OidcError("the provider's user code cannot be shown")
    if not 0 < found.expires_in < float("inf"):
        raise OidcError("the provider's device code has no time to live")
    interval = found.interval if found.interval is not None else DEFAULT_POLL_INTERVAL_S
    return DeviceAuthorization(
        device_code=found.device_code,
        user_code=found.user_code,
        verification_uri=with_parameters(uri, client.hints),
        verification_uri_complete=(
            with_parameters(complete, client.hints) if complete is not None else None
        ),
        lifetime_s=min(found.expires_in, MAX_DEVICE_LIFETIME_S),
        interval_s=min(max(interval, 1.0), 60.0),
    )


def device_token_request(client: Client, device_code: str) -> dict[str, str]:
    """The form with which the token endpoint is polled."""
    return {
        "grant_type": DEVICE_GRANT,
        "device_code": device_code,
        "client_id": client.client_id,
        **token_parameters(client),
    }


# tokens


def refresh_request(client: Client, refresh_token: str) -> dict[str, str]:
    """The form that renews tokens (RFC 6749 section 6)."""
    return {
        "grant_type": "refresh_token",
        "refresh_token": refresh_token,
        "client_id": client.client_id,
        **token_parameters(client),
    }


def revocation_request(client: Client, token: str, kind: str) -> dict[str, str]:
    """The form that ends a token (RFC 7009); ``kind`` is ``refresh_token`` or ``access_token``."""
    return {"token": token, "token_type_hint": kind, "client_id": client.client_id}


def parse_tokens(data: bytes) -> TokenAnswer:
    """Raises ``OidcError``; its text has no part of a token."""
    found = _decode(_Tokens, data, "the token endpoint's answer")
    if found.token_type.lower() != "bearer":
        raise OidcError(f"the provider gave a token of type {show(found.token_type)!r}, not Bearer")
    try:
        check_token(found.access_token)
    except ValueError as error:
        raise OidcError(f"the provider's access token {error}") from None
    if len(found.access_token) > _MAX_BEARER_BYTES:
        raise OidcError("the provider's access token is longer than 8 KiB: ask for less in scope")
    lifetime = found.expires_in
    if lifetime is not None and not 0 < lifetime < float("inf"):
        lifetime = None
    return TokenAnswer(
        access_token=found.access_token,
        token_type="Bearer",  # noqa: S106  # a scheme, no secret
        lifetime_s=lifetime,
        refresh_token=found.refresh_token or None,
        id_token=found.id_token or None,
        scope=found.scope,
    )


def parse_refusal(status: int, data: bytes) -> OidcError:
    """What an answer that is not 2xx means: a refusal by name, or trouble that may pass."""
    try:
        found = msgspec.json.decode(data, type=_Refusal)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        found = None
    if status == 429 or status >= 500 or found is None:
        if 400 <= status < 500 and status != 429:
            return OidcError(f"the provider answered {status}, and did not say why")
        return ProviderUnreachableError(f"the provider answered {status}: try again later")
    return ProviderRefusedError(show(found.error), show(found.error_description or ""))


def check_id_token(
    id_token: str, jwks: str, provider: Provider, client: Client, now: float, *, nonce: str | None
) -> Identity:
    """Who logged in (OpenID Connect Core 1.0 section 3.1.3.7). ``now`` is Unix time.

    ``nonce`` is the one of the request; None where the flow has none. Raises ``OidcError``.
    """
    try:
        identity, _ = JwtVerifier(
            jwks=jwks,
            issuer=provider.issuer,
            audience=client.client_id,
            leeway_s=ID_TOKEN_LEEWAY_S,
        ).verify(id_token, now)
    except ConfigError:
        raise OidcError("the provider's jwks_uri has no public key for signatures") from None
    except AuthenticationError as error:
        raise OidcError(f"the provider's ID token is not good: {error}") from None
    claims = identity.claims
    if claims.get("azp", client.client_id) != client.client_id:
        raise OidcError("the provider's ID token was made for another client (azp)")
    if nonce is not None and claims.get("nonce") != nonce:
        raise OidcError("the provider's ID token belongs to another login (nonce)")
    return identity


# small parts


def with_parameters(url: str, parameters: Mapping[str, str]) -> str:
    """``url`` with more parameters in its query."""
    if not parameters:
        return url
    parts = urlsplit(url)
    query = "&".join(part for part in (parts.query, urlencode(parameters)) if part)
    return urlunsplit(parts._replace(query=query))


def show(text: str) -> str:
    """What a stranger wrote, fit for a terminal and a log: printable, and not long."""
    shown = "".join(c if c.isprintable() else "?" for c in text[: _MAX_SHOWN_CHARACTERS + 1])
    return shown if len(shown) <= _MAX_SHOWN_CHARACTERS else shown[:_MAX_SHOWN_CHARACTERS] + "…"


def token_parameters(client: Client) -> dict[str, str]:
    """For whom the token shall be. Providers know ``audience`` or ``resource`` (RFC 8707), which
    must be an absolute URI; each passes over the other (RFC 6749 section 3.2).
    """
    if client.audience is None:
        return {}
    wishes = {"audience": client.audience}
    if ":" in client.audience and "#" not in client.audience:
        wishes["resource"] = client.audience
    return wishes


def asked_parameters(client: Client) -> dict[str, str]:
    """For whom the token shall be, and hints: parameters of a login's first request."""
    return {**token_parameters(client), **client.hints}


T = TypeVar("T")


def _decode(kind: type[T], data: bytes, what: str) -> T:
    try:
        return msgspec.json.decode(data, type=kind, strict=False)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        # a validation error names fields and types, never a value
        why = error if isinstance(error, msgspec.ValidationError) else "no JSON"
        raise OidcError(f"{what} cannot be used: {why}") from None
