"""Keeps the keys of the OpenID issuer: fetched and renewed here, never by a worker; those that are
known go on serving while the issuer is down.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from collections.abc import Callable
from pathlib import Path

import msgspec

from toppy.auth.issuer import IssuerVerifier
from toppy.auth.oidc import MAX_ANSWER_BYTES, OidcError
from toppy.errors import ConfigError
from toppy.net.oidc_http import ProviderConnection
from toppy.observe.log import get_logger
from toppy.protocol.backoff import Backoff

FETCH_TIMEOUT_S = 10.0
WAIT_FOR_KEYS_S = 4.0
"""How long a tunnel waits for newer keys when its token names one that is not known."""
LEAST_INTERVAL_S = 10.0
"""Between two fetches that tokens with unknown keys cause: anybody can make up such tokens."""
_MOST_RETRY_S = 60.0
_NAME = "issuer-keys.json"

_log = get_logger("oidc")


class _Kept(msgspec.Struct):
    issuer: str
    jwks: str


class IssuerKeys:
    """The keys of the issuer that the configuration names now, if it names one."""

    def __init__(
        self,
        runtime_dir: Path,
        *,
        connect: Callable[[str], ProviderConnection] | None = None,
    ) -> None:
        """``runtime_dir`` keeps the keys for the next control plane."""
        self._path = runtime_dir / _NAME
        self._connect = connect or (lambda issuer: ProviderConnection(issuer, timeout_s=10.0))
        self._verifier: IssuerVerifier | None = None
        self._refresh_s = 0.0
        self._kept: _Kept | None = None
        self._wake = asyncio.Event()
        self._fetched = asyncio.Event()
        """Set, and replaced, after each fetch, however it ended."""
        self._is_fetching = False
        self._began_at = float("-inf")
        self.problem = ""
        """Why the last fetch failed."""

    def follow(self, verifier: IssuerVerifier | None, refresh_s: float) -> None:
        """From now on provide ``verifier`` with keys: the known ones at once."""
        self._verifier, self._refresh_s = verifier, refresh_s
        if verifier is None:
            return
        if self._kept is None or self._kept.issuer != verifier.issuer:
            self._kept = self._read(verifier.issuer)
            self._began_at = float("-inf")
            self._wake.set()
        if self._kept is not None:
            try:
                verifier.use_keys(self._kept.jwks)
            except ConfigError:
                self._kept = None

    def want(self) -> None:
        """A token names a key that is not known: fetch soon, but not too often."""
        if asyncio.get_running_loop().time() - self._began_at >= LEAST_INTERVAL_S:
            self._wake.set()

    async def wait_for_newer(self) -> bool:
        """Fetch if that may be done now, and wait for the end; whether anything can be new."""
        self.want()
        is_under_way = self._wake.is_set() or self._is_fetching
        if self._verifier is None or not is_under_way:
            return False
        try:
            async with asyncio.timeout(WAIT_FOR_KEYS_S):
                await self._fetched.wait()
        except TimeoutError:
            return False
        return not self.problem

    async def run(self) -> None:
        """Fetch at the start, every ``refresh_s``, and when a token calls for it."""
        backoff = Backoff(random.random, first_s=1.0, most_s=_MOST_RETRY_S)
        loop = asyncio.get_running_loop()
        while True:
            verifier = self._verifier
            if verifier is None:
                await self._wake.wait()
                self._wake.clear()
                continue
            self._wake.clear()
            self._began_at = loop.time()
            self._is_fetching = True
            await self._fetch(verifier)
            self._is_fetching = False
            done, self._fetched = self._fetched, asyncio.Event()
            done.set()
            if self.problem:
                delay_s = min(backoff.next_delay_s(), self._refresh_s)
            else:
                backoff.reset()
                delay_s = self._refresh_s
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay_s):
                    await self._wake.wait()

    async def _fetch(self, verifier: IssuerVerifier) -> None:
        try:
            async with asyncio.timeout(FETCH_TIMEOUT_S), self._connect(verifier.issuer) as provider:
                jwks = await provider.fetch_keys()
            verifier.use_keys(jwks)
        except TimeoutError:
            self._tell(f"no answer within {FETCH_TIMEOUT_S:g} s")
        except OidcError as error:
            self._tell(str(error))
        except ConfigError:
            self._tell("the issuer's jwks_uri has no public key for signatures")
        else:
            self._tell("")
            if self._verifier is verifier:
                kept = _Kept(verifier.issuer, jwks)
                if kept != self._kept:
                    self._kept = kept
                    self._write(kept)
            elif self._verifier is not None and self._verifier.issuer == verifier.issuer:
                self._verifier.use_keys(jwks)  # a reload came meanwhile

    def _tell(self, problem: str) -> None:
        if problem and problem != self.problem:
            has_keys = self._verifier is not None and self._verifier.has_keys
            _log.warning("the issuer's keys cannot be fetched", reason=problem, has_keys=has_keys)
        elif self.problem and not problem:
            _log.info("the issuer's keys are fetched again")
        self.problem = problem

    def _read(self, issuer: str) -> _Kept | None:
        try:
            with self._path.open("rb") as file:
                kept = msgspec.json.decode(file.read(2 * MAX_ANSWER_BYTES), type=_Kept)
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return None
        return kept if kept.issuer == issuer else None

    def _write(self, kept: _Kept) -> None:
        unfinished = self._path.with_suffix(".new")
        try:
            unfinished.unlink(missing_ok=True)
            descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(msgspec.json.encode(kept))
            unfinished.rename(self._path)
        except OSError as error:
            _log.warning("the issuer's keys cannot be kept", reason=str(error))
