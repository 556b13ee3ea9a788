"""Slows down who tries credentials: so many refused ones of one source in a minute."""

from __future__ import annotations

import hashlib
import math

from toppy.model.grant import Denial
from toppy.policy.attempts import FailedAttempts
from toppy.quic.gate import source_key
from toppy.wire.ipc_message import AdmissionRequest, TokenRequest

_DIGEST_BYTES = 16


class Guesses:
    """Knows which sources had credentials refused, and which credentials were good, in this worker.

    "One source" is an IPv4 address or an IPv6 /64, as for connections.
    """

    def __init__(self, per_min: int) -> None:
        self._attempts = FailedAttempts(per_min)
        self._is_limited = per_min > 0

    def denial(self, question: AdmissionRequest | TokenRequest, now: float) -> Denial | None:
        """The answer to a source that has tried too many; None: the control plane may be asked."""
        if not self._is_limited or not question.source:
            return None
        wait_s = self._attempts.wait_s(source_key(question.source), now)
        if not wait_s or self._attempts.is_known_good(_credential(question)):
            return None
        return Denial(
            429,
            "http_request_denied",
            "too many refused credentials came from this address",
            retry_after_s=math.ceil(wait_s),
        )

    def failed(self, question: AdmissionRequest | TokenRequest, now: float) -> None:
        """Its credential is not good."""
        if question.source:
            self._attempts.failed(source_key(question.source), now)

    def succeeded(self, question: AdmissionRequest | TokenRequest) -> None:
        """It is."""
        if self._is_limited:
            self._attempts.succeeded(_credential(question))


def _credential(question: AdmissionRequest | TokenRequest) -> tuple[bytes, object]:
    """What stands for it here: nothing that anybody could use."""
    said = (question.authorization or "").encode("utf-8", "surrogatepass")
    return hashlib.blake2b(said, digest_size=_DIGEST_BYTES).digest(), question.certificate
