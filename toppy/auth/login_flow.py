"""Ways to log in as state machines: device authorization, and authorization code with PKCE.

No network and no clock: the shell asks what to send and when, and tells what came.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from dataclasses import dataclass
from enum import Enum
from urllib.parse import parse_qs, urlsplit

from toppy.auth.oidc import (
    Client,
    DeviceAuthorization,
    OidcError,
    Provider,
    ProviderRefusedError,
    asked_parameters,
    is_loopback,
    show,
    token_parameters,
    with_parameters,
)
from toppy.errors import ConfigError, LocalError

SLOW_DOWN_S = 5.0
"""Added to the interval by each ``slow_down`` (RFC 8628 section 3.5)."""
MAX_INTERVAL_S = 120.0
VERIFIER_BYTES = 32
STATE_BYTES = 16
NONCE_BYTES = 16


class DeviceState(Enum):
    WAITING = "waiting"
    APPROVED = "approved"
    DENIED = "denied"
    EXPIRED = "expired"
    FAILED = "failed"


_AFTER_REFUSAL = {
    "authorization_pending": DeviceState.WAITING,
    "slow_down": DeviceState.WAITING,
    "access_denied": DeviceState.DENIED,
    "expired_token": DeviceState.EXPIRED,
}
"""RFC 8628 section 3.5; any other code ends the login."""
_ENDED = {
    DeviceState.DENIED: "the login was denied at the provider",
    DeviceState.EXPIRED: "the code was not used in time; run toppy login again",
}


class DeviceFlow:
    """Polls until the user has decided elsewhere (RFC 8628 section 3.4)."""

    def __init__(self, authorization: DeviceAuthorization, now: float) -> None:
        """``now`` is the reading of a clock that never jumps, in seconds, as everywhere here."""
        self.state = DeviceState.WAITING
        self.problem = ""
        """Why the login ended without tokens."""
        self._expires_at = now + authorization.lifetime_s
        self._interval_s = authorization.interval_s
        self._poll_at = now + self._interval_s

    @property
    def interval_s(self) -> float:
        """From one answer to the next question."""
        return self._interval_s

    def next_timeout(self) -> float | None:
        """When ``handle_timeout`` is to be called; None: the login has ended."""
        if self.state is not DeviceState.WAITING:
            return None
        return min(self._poll_at, self._expires_at)

    def handle_timeout(self, now: float) -> bool:
        """Whether to ask the token endpoint now."""
        if self.state is DeviceState.WAITING and now >= self._expires_at:
            self._end(DeviceState.EXPIRED)
        return self.state is DeviceState.WAITING and now >= self._poll_at

    def receive_tokens(self) -> None:
        """The user said yes."""
        self._check_waiting()
        self.state = DeviceState.APPROVED

    def receive_refusal(self, refusal: ProviderRefusedError, now: float) -> None:
        """The provider said not yet, or no."""
        self._check_waiting()
        state = _AFTER_REFUSAL.get(refusal.code, DeviceState.FAILED)
        if state is not DeviceState.WAITING:
            self._end(state, str(refusal))
            return
        if refusal.code == "slow_down":
            self._interval_s = min(self._interval_s + SLOW_DOWN_S, MAX_INTERVAL_S)
        self._poll_at = now + self._interval_s

    def receive_silence(self, now: float) -> None:
        """The provider did not answer: ask less often (RFC 8628 section 3.5)."""
        self._check_waiting()
        self._interval_s = min(self._interval_s * 2, MAX_INTERVAL_S)
        self._poll_at = now + self._interval_s

    def _end(self, state: DeviceState, problem: str = "") -> None:
        self.state = state
        self.problem = _ENDED.get(state, problem)

    def _check_waiting(self) -> None:
        if self.state is not DeviceState.WAITING:
            raise LocalError(f"an answer to a device login that is {self.state.value}")


class CodeState(Enum):
    WAITING = "waiting"
    RECEIVED = "received"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Reply:
    """What the browser is told, as an HTTP status and one sentence."""

    status: int
    text: str


@dataclass(frozen=True, slots=True)
class Redirect:
    """A loopback redirect URI, cut up (RFC 8252 section 7.3)."""

    host: str
    port: int
    path: str


def parse_redirect_uri(uri: str) -> Redirect:
    """Raises ``ConfigError`` for one that this host cannot listen on. Port 0: any free one."""
    try:
        parts = urlsplit(uri)
        host, port = parts.hostname or "", 80 if parts.port is None else parts.port
    except ValueError:
        host, port = "", 0
    if not host or parts.scheme != "http" or not is_loopback(host) or parts.query or parts.fragment:
        raise ConfigError(
            f"auth.redirect_uri = {show(uri)!r}: must be a loopback address without a query, such "
            "as http://127.0.0.1:8080/callback",
            key="auth.redirect_uri",
        )
    return Redirect(host, port, parts.path or "/")


class AuthorizationCodeFlow:
    """One login by browser: the address to open, and what comes back (RFC 7636, RFC 8252)."""

    def __init__(
        self,
        provider: Provider,
        client: Client,
        redirect_uri: str,
        *,
        verifier: bytes,
        state: bytes,
        nonce: bytes,
    ) -> None:
        """``verifier``, ``state`` and ``nonce`` are fresh random bytes, 32, 16 and 16 of them.

        Raises ``OidcError`` where the provider has no such login.
        """
        if len(verifier) < VERIFIER_BYTES or min(len(state), len(nonce)) < STATE_BYTES:
            raise LocalError("too little randomness for a login")
        if provider.authorization_endpoint is None:
            raise OidcError("the provider has no authorization_endpoint: use mode oidc_device_code")
        self.state = CodeState.WAITING
        self.problem = ""
        self.nonce = _base64url(nonce)
        self._provider = provider
        self._client = client
        self._redirect_uri = redirect_uri
        self._path = parse_redirect_uri(redirect_uri).path
        self._verifier = _base64url(verifier)
        self._state = _base64url(state)
        self._code = ""
        self.authorization_url = with_parameters(
            provider.authorization_endpoint,
            {
                "response_type": "code",
                "client_id": client.client_id,
                "redirect_uri": redirect_uri,
                "scope": client.scope,
                "state": self._state,
                "nonce": self.nonce,
                "code_challenge": challenge_of(self._verifier),
                "code_challenge_method": "S256",
                **_consent(client.scope),
                **asked_parameters(client),
            },
        )

    def __repr__(self) -> str:
        return f"AuthorizationCodeFlow({self.state.value})"

    def receive_request(self, method: str, target: str) -> Reply:
        """A request that came to the redirect's address; ``target`` is its path and query."""
        path, _, query = target.partition("?")
        if path != self._path:
            return Reply(404, "There is nothing here.")
        if method != "GET":
            return Reply(405, "Only GET is answered here.")
        if self.state is not CodeState.WAITING:
            return Reply(410, "This login is over.")
        try:
            found = parse_qs(query, keep_blank_values=True, max_num_fields=32)
        except ValueError:
            found = {}
        if any(len(values) > 1 for values in found.values()):
            return self._fail("the provider's answer has a parameter twice")
        parameters = {name: values[0] for name, values in found.items()}
        said = parameters.get("state", "").encode("utf-8", "replace")
        if not hmac.compare_digest(said, self._state.encode()):
            return self._fail("the answer belongs to another login (state); run toppy login again")
        issuer = parameters.get("iss")
        is_named = issuer is not None or self._provider.names_itself
        if is_named and issuer != self._provider.issuer:
            return self._fail("the answer is of another provider (iss)")
        if "error" in parameters:
            code = show(parameters["error"])
            refusal = ProviderRefusedError(code, show(parameters.get("error_description", "")))
            return self._fail(str(refusal))
        if not parameters.get("code"):
            return self._fail("the provider's answer has no code")
        self.state = CodeState.RECEIVED
        self._code = parameters["code"]
        return Reply(200, "You are logged in. You may close this window.")

    def token_request(self) -> dict[str, str]:
        """The form that turns the code into tokens (RFC 6749 section 4.1.3)."""
        if self.state is not CodeState.RECEIVED:
            raise LocalError("there is no code yet")
        return {
            "grant_type": "authorization_code",
            "code": self._code,
            "redirect_uri": self._redirect_uri,
            "client_id": self._client.client_id,
            "code_verifier": self._verifier,
            **token_parameters(self._client),
        }

    def _fail(self, problem: str) -> Reply:
        self.state = CodeState.FAILED
        self.problem = problem
        return Reply(400, f"The login failed: {problem}.")


def challenge_of(verifier: str) -> str:
    """S256 of RFC 7636 section 4.2."""
    return _base64url(hashlib.sha256(verifier.encode("ascii")).digest())


def _consent(scope: str) -> dict[str, str]:
    # a refresh token is given only where the user is asked (OpenID Connect Core section 11)
    return {"prompt": "consent"} if "offline_access" in scope.split() else {}


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")
