"""Kinds of keys that toppy makes."""

from __future__ import annotations

from enum import StrEnum

MAX_DAYS = 36_500
"""How long a certificate may be good."""


class KeyType(StrEnum):
    """Keys that every engine takes."""

    ECDSA_P256 = "ecdsa-p256"
    ECDSA_P384 = "ecdsa-p384"
    RSA_3072 = "rsa-3072"
    RSA_4096 = "rsa-4096"
