"""Who this client is, as its own policy sees it: what its token says, which only the gateway
verifies. Whoever could change the token here could change the policy as well.
"""

from __future__ import annotations

import jwt

from toppy.auth.jwt import AuthenticationError, identity_of
from toppy.auth.token_cache import CachedTokens
from toppy.config.client import ClientConfig
from toppy.model.identity import Identity

NOBODY = Identity("", "none")
"""There is no token."""


def identity_of_token(config: ClientConfig) -> Identity:
    """By the configuration's token."""
    if config.token is None:
        return NOBODY
    # what the gateway calls a token that is no JWT
    return _of_jwt(config.token.get_secret_value()) or Identity("token", "static")


def identity_of_login(tokens: CachedTokens) -> Identity:
    """By the access token of a login, or by whom the provider said it is."""
    return _of_jwt(tokens.access_token) or Identity(tokens.subject or "", "oidc")


def _of_jwt(token: str) -> Identity | None:
    try:
        return identity_of(jwt.decode(token, options={"verify_signature": False}))
    except (jwt.PyJWTError, AuthenticationError, ValueError, RecursionError):
        return None
