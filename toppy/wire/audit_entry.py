"""Audit entries: one JSON object per line, chained by their hashes (T-101 to T-104).

Entry ``n`` has the hash of entry ``n - 1``, so a signature of one entry covers all before it. What
a chain cannot show is that its end was cut off: checkpoints, kept apart, can.
"""

from __future__ import annotations

import hashlib
import hmac
import string
from dataclasses import dataclass, field
from typing import Protocol

import msgspec
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from toppy.errors import ToppyError
from toppy.model.audit_event import AuditEvent

VERSION = 1
MAX_LINE_BYTES = 1 << 20
"""Of an entry with its newline; ours are far smaller."""
MAX_TEXT_CHARACTERS = 4096
"""Of each text of an event; what is longer is cut."""
ANCHOR_ENTRIES = 128
"""An Ed25519 signature takes longer to check than a hundred hashes, and covers all entries before
it: one of so many is checked, and the last."""

_ED25519 = "ed25519:"
_CHECKPOINT = "toppy-audit-checkpoint:"
"""Signed before a checkpoint's hash: no signature of an entry is one of a checkpoint."""
_CUT = "…"


class AuditError(ToppyError):
    """An audit log is not what its writer wrote, or must not be written."""


class AuditEntry(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """One line of the log, in the order in which it is written."""

    version: int
    seq: int
    """From 1, without a gap."""
    unix_ms: int
    event: AuditEvent
    prev_hash: str | None = None
    """The entry before; None for the first one ever."""
    hash: str
    signature: str | None = None


class Checkpoint(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """At ``unix_ms`` the log had ``count`` entries, and the last one's hash was ``head``."""

    version: int
    count: int
    head: str
    unix_ms: int
    signature: str | None = None


class _Hashed(msgspec.Struct, frozen=True, omit_defaults=True):
    version: int
    seq: int
    unix_ms: int
    event: AuditEvent
    prev_hash: str | None = None


class Verifier(Protocol):
    """Checks signatures."""

    @property
    def is_slow(self) -> bool:
        """Checking takes longer than hashing by far."""
        ...

    def check(self, text: str, signature: str) -> bool: ...


class Signer(Verifier, Protocol):
    """Makes signatures, and checks its own."""

    def sign(self, text: str) -> str: ...


@dataclass(frozen=True, slots=True)
class HmacKey:
    """Hex HMAC-SHA256 of a text (T-102). Who can check can sign."""

    key: bytes = field(repr=False)
    is_slow: bool = False

    def sign(self, text: str) -> str:
        """64 hex digits."""
        return hmac.digest(self.key, text.encode(), "sha256").hex()

    def check(self, text: str, signature: str) -> bool:
        """In constant time."""
        return hmac.compare_digest(self.sign(text).encode(), signature.encode())


@dataclass(frozen=True, slots=True)
class Ed25519Verifier:
    """``ed25519:`` and the hex signature of a text; checking needs no secret."""

    public_key: Ed25519PublicKey
    is_slow: bool = True

    def check(self, text: str, signature: str) -> bool:
        """False for every other kind of signature, too."""
        if not signature.startswith(_ED25519):
            return False
        try:
            self.public_key.verify(bytes.fromhex(signature[len(_ED25519) :]), text.encode())
        except (InvalidSignature, ValueError):
            return False
        return True

    def pem(self) -> str:
        """What to give to those who verify."""
        encoded = self.public_key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        return encoded.decode()


@dataclass(frozen=True, slots=True)
class Ed25519Signer:
    """Signs for ``Ed25519Verifier``."""

    private_key: Ed25519PrivateKey = field(repr=False)
    is_slow: bool = True

    @property
    def verifier(self) -> Ed25519Verifier:
        """The other half."""
        return Ed25519Verifier(self.private_key.public_key())

    def sign(self, text: str) -> str:
        """``ed25519:`` and 128 hex digits."""
        return _ED25519 + self.private_key.sign(text.encode()).hex()

    def check(self, text: str, signature: str) -> bool:
        """See ``Ed25519Verifier``."""
        return self.verifier.check(text, signature)


def parse_signing_key(text: str) -> Signer:
    """A PEM private key is Ed25519's; every other text is an HMAC secret. Raises ``AuditError``."""
    if "-----BEGIN" not in text:
        if not text:
            raise AuditError("the signing key is empty")
        return HmacKey(text.encode())
    try:
        key = load_pem_private_key(text.encode(), None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise AuditError(
            "the signing key is no Ed25519 private key in PEM without a passphrase; make one with: "
            "openssl genpkey -algorithm ed25519"
        )
    return Ed25519Signer(key)


def parse_public_key(pem: str) -> Ed25519Verifier:
    """Raises ``AuditError``."""
    try:
        key = load_pem_public_key(pem.encode())
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise AuditError(
            "this is no Ed25519 public key in PEM; get it from the private one with: "
            "openssl pkey -pubout"
        )
    return Ed25519Verifier(key)


_encoder = msgspec.json.Encoder()
_entries = msgspec.json.Decoder(AuditEntry)
_checkpoints = msgspec.json.Decoder(Checkpoint)
_HEX = frozenset(string.hexdigits.lower())


def make_entry(
    event: AuditEvent, *, seq: int, unix_ms: int, prev_hash: str | None, signer: Signer | None
) -> AuditEntry:
    """The next entry of a chain. Texts become what JSON and a terminal can take."""
    event = _clean(event)
    digest = _hash(VERSION, seq, unix_ms, event, prev_hash)
    return AuditEntry(
        version=VERSION,
        seq=seq,
        unix_ms=unix_ms,
        event=event,
        prev_hash=prev_hash,
        hash=digest,
        signature=signer.sign(digest) if signer is not None else None,
    )


def entry_hash(entry: AuditEntry) -> str:
    """What ``entry.hash`` must be."""
    return _hash(entry.version, entry.seq, entry.unix_ms, entry.event, entry.prev_hash)


def _hash(version: int, seq: int, unix_ms: int, event: AuditEvent, prev_hash: str | None) -> str:
    hashed = _Hashed(version, seq, unix_ms, event, prev_hash)
    return hashlib.sha256(_encoder.encode(hashed)).hexdigest()


def _clean(event: AuditEvent) -> AuditEvent:
    def text(value: str) -> str:
        if len(value) > MAX_TEXT_CHARACTERS:
            value = value[: MAX_TEXT_CHARACTERS - 1] + _CUT
        return value.encode("utf-8", "replace").decode()

    return AuditEvent(
        actor=text(event.actor),
        action=text(event.action),
        target=text(event.target),
        allowed=event.allowed,
        auth_subject=text(event.auth_subject) if event.auth_subject is not None else None,
        reason=text(event.reason) if event.reason is not None else None,
    )


def encode_entry(entry: AuditEntry) -> bytes:
    """One line, without its newline."""
    return _encoder.encode(entry)


def parse_entry(line: bytes) -> AuditEntry:
    """Any JSON with the fields of an entry; raises ``AuditError`` that says what is wrong."""
    try:
        return _entries.decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise AuditError(f"not an audit entry: {error}") from None


def make_checkpoint(count: int, head: str, unix_ms: int, signer: Signer | None) -> Checkpoint:
    """Signed where there is a key."""
    plain = Checkpoint(version=VERSION, count=count, head=head, unix_ms=unix_ms)
    if signer is None:
        return plain
    return msgspec.structs.replace(plain, signature=signer.sign(_checkpoint_text(plain)))


def _checkpoint_text(checkpoint: Checkpoint) -> str:
    plain = msgspec.structs.replace(checkpoint, signature=None)
    return _CHECKPOINT + hashlib.sha256(_encoder.encode(plain)).hexdigest()


def encode_checkpoint(checkpoint: Checkpoint) -> bytes:
    """One line, without its newline."""
    return _encoder.encode(checkpoint)


def parse_checkpoint(line: bytes) -> Checkpoint:
    """Raises ``AuditError``."""
    try:
        return _checkpoints.decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise AuditError(f"not a checkpoint: {error}") from None


def check_checkpoint(checkpoint: Checkpoint, verifier: Verifier | None, *, unsigned: bool) -> None:
    """Raise ``AuditError`` unless it is signed as it must be.

    Without a verifier its signature is of no use, and its contents are. ``unsigned``: it may be
    without one.
    """
    if verifier is None:
        return
    if checkpoint.signature is None:
        if not unsigned:
            raise AuditError("signature missing")
    elif not verifier.check(_checkpoint_text(checkpoint), checkpoint.signature):
        raise AuditError("signature mismatch: another key, or not what was signed")


class Chain:
    """Follows a log entry by entry; the errors are those of T-103.

    ``count`` and ``head`` are where to begin. ``unsigned``: with a verifier, entries may be without
    a signature. ``every_signature``: also those of a slow verifier that a later one covers.
    """

    def __init__(
        self,
        verifier: Verifier | None = None,
        *,
        count: int = 0,
        head: str | None = None,
        unsigned: bool = False,
        every_signature: bool = False,
    ) -> None:
        self.count = count
        """Entries so far; the last one's ``seq``."""
        self.head = head
        """The last entry's hash."""
        self._verifier = verifier
        self._unsigned = unsigned
        self._anchored = verifier is not None and verifier.is_slow and not every_signature
        self._unchecked: list[tuple[int, str, str]] = []
        """Sequence number, hash and signature of entries since the last one that was checked."""

    def add(self, line: bytes) -> AuditEntry:
        """The next line, without its newline. Raises ``AuditError``; then the chain is broken."""
        entry = parse_entry(line)
        if entry.version != VERSION:
            raise AuditError(f"version {entry.version} is not known here, only {VERSION}")
        if entry.seq != self.count + 1:
            raise AuditError(f"seq mismatch: {entry.seq} instead of {self.count + 1}")
        if entry.prev_hash != self.head:
            raise AuditError(
                f"prev_hash mismatch: {_short(entry.prev_hash)} instead of {_short(self.head)}"
            )
        digest = entry_hash(entry)
        if entry.hash != digest:
            raise AuditError(f"hash mismatch: {_short(entry.hash)} instead of {_short(digest)}")
        self._check_signature(entry)
        if _encoder.encode(entry) != line:
            raise AuditError(
                "format mismatch: the line has more than its hash covers, or is written otherwise"
            )
        self.count, self.head = entry.seq, digest
        return entry

    def finish(self) -> None:
        """There are no more lines. Raises ``AuditError`` that names the entry."""
        self._check_anchor()

    def _check_signature(self, entry: AuditEntry) -> None:
        signature, verifier = entry.signature, self._verifier
        if signature is None:
            if verifier is not None and not self._unsigned:
                raise AuditError("signature missing: this entry is not signed")
            return
        if verifier is None:
            raise AuditError("signature present but no key was given to check it")
        if self._anchored:
            self._unchecked.append((entry.seq, entry.hash, signature))
            if len(self._unchecked) >= ANCHOR_ENTRIES:
                self._check_anchor()
        elif not verifier.check(entry.hash, signature):
            raise AuditError("signature mismatch: another key, or not what was signed")

    def _check_anchor(self) -> None:
        unchecked, self._unchecked = self._unchecked, []
        if not unchecked or self._verifier is None:
            return
        _, digest, signature = unchecked[-1]
        if self._verifier.check(digest, signature):
            return
        for seq, digest, signature in unchecked:
            if not self._verifier.check(digest, signature):
                raise SignatureMismatchError(seq)


class SignatureMismatchError(AuditError):
    """An entry before the last line that was read has a wrong signature. ``seq`` says which."""

    def __init__(self, seq: int) -> None:
        super().__init__("signature mismatch: another key, or not what was signed")
        self.seq = seq


def _short(digest: str | None) -> str:
    if digest is None:
        return "none"
    return digest if len(digest) <= 16 else f"{digest[:16]}{_CUT}"
