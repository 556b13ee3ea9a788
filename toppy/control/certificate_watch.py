"""Tells in time that a certificate ends: in the log, the status, `/healthz` and the metrics."""

from __future__ import annotations

import asyncio
import datetime
import math
import time
from collections.abc import Callable
from typing import Any

from cryptography import x509

from toppy.auth.certificate_chain import fingerprint
from toppy.control.settings import GatewaySettings
from toppy.observe.log import get_logger
from toppy.system.certificate_check import URGENT_DAYS, WARN_DAYS
from toppy.system.certificate_files import parse_certificates, server_names

SERVER, CLIENT_CA = "server", "client_ca"
_LOOK_INTERVAL_S = 60.0
"""A reload may bring another certificate."""
_REMIND_INTERVAL_S = 86_400.0
_DAY_S = 86_400.0

_log = get_logger("control")


class CertificateWatch:
    """Of the certificates that the gateway has now; ``settings`` gives those that hold."""

    def __init__(self, settings: Callable[[], GatewaySettings]) -> None:
        self._settings = settings
        self._read: dict[bytes, list[x509.Certificate]] = {}
        self._told: dict[str, tuple[float, float, bool]] = {}
        """What was said last of which one: its end, when (monotonic), whether it was urgent."""

    async def run(self) -> None:
        """Until cancelled: a warning when a certificate is in its last 30 days and another when it
        is in its last 7, each again once a day.
        """
        while True:
            self.look(time.time(), time.monotonic())
            await asyncio.sleep(_LOOK_INTERVAL_S)

    def look(self, unix_now: float, now: float) -> None:
        """Say what is to be said now."""
        for name, certificate in self._watched():
            ends = certificate.not_valid_after_utc.timestamp()
            left = _days_left(ends, unix_now)
            if left >= WARN_DAYS:
                self._told.pop(name, None)
                continue
            is_urgent = left < URGENT_DAYS
            told = self._told.get(name)
            if (
                told is not None
                and told[0] == ends
                and told[2] == is_urgent
                and now - told[1] < _REMIND_INTERVAL_S
            ):
                continue
            self._told[name] = ends, now, is_urgent
            text = (
                f"the {_WORDS[name]} ends {_when(left)}, on {_date(ends)}: replace it, then reload"
            )
            say = _log.error if is_urgent else _log.warning
            say("certificate ends soon", name=name, warning=text)

    def facts(self) -> dict[str, Any]:
        """For operators: what is served, and until when."""
        now = time.time()
        facts = {}
        for name, certificate in self._watched():
            ends = certificate.not_valid_after_utc.timestamp()
            facts[name] = {
                "ends_at": ends,
                "days_left": _days_left(ends, now),
                "sha256": fingerprint(certificate),
                "names": list(server_names(certificate)) if name == SERVER else [],
            }
        return facts

    def days_left(self) -> dict[str, Any]:
        """The same in short, for `/healthz?verbose`."""
        return {"certificate_days_left": self.facts()[SERVER]["days_left"]}

    def ends(self) -> dict[str, float]:
        """Unix time of each one's end, for the metrics."""
        return {
            name: certificate.not_valid_after_utc.timestamp()
            for name, certificate in self._watched()
        }

    def _watched(self) -> list[tuple[str, x509.Certificate]]:
        """The gateway's own, and the CA of clients that ends first."""
        settings = self._settings()
        watched = [(SERVER, self._parse(settings.certificate_chain_pem)[0])]
        if settings.client_ca_pem:
            authorities = self._parse(settings.client_ca_pem)
            watched.append((CLIENT_CA, min(authorities, key=lambda c: c.not_valid_after_utc)))
        return watched

    def _parse(self, pem: bytes) -> list[x509.Certificate]:
        if pem not in self._read:
            if len(self._read) > 1:  # of one configuration at a time
                self._read.clear()
            self._read[pem] = parse_certificates(pem)
        return self._read[pem]


_WORDS = {SERVER: "gateway's certificate", CLIENT_CA: "CA of client certificates"}


def _days_left(ends: float, now: float) -> int:
    return math.floor((ends - now) / _DAY_S)


def _when(days: int) -> str:
    if days < 0:
        return "now: it has expired"
    return "today" if days == 0 else f"in {days} days"


def _date(ends: float) -> str:
    return f"{datetime.datetime.fromtimestamp(ends, datetime.UTC):%Y-%m-%d}"
