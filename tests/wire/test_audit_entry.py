"""Audit entries: the exact format, the chain, the signatures, and every way to be wrong."""

from __future__ import annotations

import hashlib
import hmac
import json
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hypothesis import given
from hypothesis import strategies as st

from toppy.model.audit_event import AuditEvent
from toppy.wire.audit_entry import (
    ANCHOR_ENTRIES,
    MAX_TEXT_CHARACTERS,
    AuditEntry,
    AuditError,
    Chain,
    Checkpoint,
    Ed25519Signer,
    HmacKey,
    SignatureMismatchError,
    Signer,
    check_checkpoint,
    encode_checkpoint,
    encode_entry,
    entry_hash,
    make_checkpoint,
    make_entry,
    parse_checkpoint,
    parse_entry,
    parse_public_key,
    parse_signing_key,
)

KEY = HmacKey(b"k")
ED25519 = Ed25519Signer(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
EVENT = AuditEvent("alice", "up", "127.0.0.1:22", True)
TEXTS = st.text(max_size=20)
EVENTS = st.builds(
    AuditEvent, TEXTS, TEXTS, TEXTS, st.booleans(), st.none() | TEXTS, st.none() | TEXTS
)


def chain_of(count: int, signer: Signer | None = None) -> list[bytes]:
    lines: list[bytes] = []
    head = None
    for seq in range(1, count + 1):
        event = AuditEvent("alice", "udp", f"192.0.2.1:{seq}", seq % 2 == 0)
        entry = make_entry(event, seq=seq, unix_ms=seq, prev_hash=head, signer=signer)
        head = entry.hash
        lines.append(encode_entry(entry))
    return lines


def follow(lines: list[bytes], verifier: Any = None, **options: Any) -> Chain:
    chain = Chain(verifier, **options)
    for line in lines:
        chain.add(line)
    chain.finish()
    return chain


def changed(line: bytes, **fields: Any) -> bytes:
    """The line with other fields; None removes one."""
    found = json.loads(line)
    for name, value in fields.items():
        if value is None:
            found.pop(name, None)
        else:
            found[name] = value
    return json.dumps(found, separators=(",", ":"), ensure_ascii=False).encode()


def rehashed(line: bytes, signer: Signer | None = None) -> bytes:
    entry = parse_entry(line)
    digest = entry_hash(entry)
    signature = signer.sign(digest) if signer is not None else entry.signature
    return changed(line, hash=digest, signature=signature)


def test_the_vector_of_the_format() -> None:
    entry = make_entry(EVENT, seq=1, unix_ms=1_700_000_000_000, prev_hash=None, signer=KEY)
    assert entry.hash == "1edc15a95cf9dd0ed97e79aad01d033b73f382253ebef5309cd4804494defe02"
    assert entry.signature == "92bf2bfe572f943fe9c9c58687a10792af036c2385e02b0e913a0310f2f105dd"
    assert encode_entry(entry) == (
        b'{"version":1,"seq":1,"unix_ms":1700000000000,"event":{"actor":"alice","action":"up",'
        b'"target":"127.0.0.1:22","allowed":true},'
        b'"hash":"1edc15a95cf9dd0ed97e79aad01d033b73f382253ebef5309cd4804494defe02",'
        b'"signature":"92bf2bfe572f943fe9c9c58687a10792af036c2385e02b0e913a0310f2f105dd"}'
    )


def test_the_keys_stand_in_the_order_of_the_format() -> None:
    event = AuditEvent("a", "b", "c", False, "s", "r")
    entry = make_entry(event, seq=2, unix_ms=3, prev_hash="0" * 64, signer=KEY)
    found = json.loads(encode_entry(entry))
    assert list(found) == [
        *("version", "seq", "unix_ms", "event", "prev_hash", "hash", "signature")
    ]
    assert list(found["event"]) == [
        *("actor", "action", "target", "allowed", "auth_subject", "reason")
    ]


@given(EVENTS, st.integers(1, 2**40), st.integers(0, 2**45), st.none() | st.just("ab" * 32))
def test_the_hash_is_that_of_compact_json(
    event: AuditEvent, seq: int, unix_ms: int, prev_hash: str | None
) -> None:
    entry = make_entry(event, seq=seq, unix_ms=unix_ms, prev_hash=prev_hash, signer=KEY)
    found = json.loads(encode_entry(entry))
    signature, digest = found.pop("signature"), found.pop("hash")
    plain = json.dumps(found, separators=(",", ":"), ensure_ascii=False).encode()
    assert digest == hashlib.sha256(plain).hexdigest()
    assert signature == hmac.new(b"k", digest.encode(), "sha256").hexdigest()
    assert parse_entry(encode_entry(entry)) == entry


def test_texts_become_what_json_can_carry() -> None:
    event = AuditEvent("\udcff", "x" * 10_000, "t", True)
    entry = make_entry(event, seq=1, unix_ms=0, prev_hash=None, signer=None)
    assert entry.event.actor == "?"
    assert len(entry.event.action) == MAX_TEXT_CHARACTERS
    assert follow([encode_entry(entry)]).count == 1


@pytest.mark.parametrize("signer", [None, KEY, ED25519])
def test_a_chain_that_was_written_is_verified(signer: Signer | None) -> None:
    lines = chain_of(5, signer)
    chain = follow(lines, signer)
    assert (chain.count, chain.head) == (5, parse_entry(lines[-1]).hash)


def test_an_entry_out_of_turn_is_a_seq_mismatch() -> None:
    lines = chain_of(4)
    with pytest.raises(AuditError, match="seq mismatch: 3 instead of 2"):
        follow([lines[0], *lines[2:]])


def test_another_entry_before_is_a_prev_hash_mismatch() -> None:
    lines = chain_of(3)
    lines[0] = rehashed(changed(lines[0], unix_ms=99))
    with pytest.raises(AuditError, match="prev_hash mismatch"):
        follow(lines)


@pytest.mark.parametrize(
    ("name", "value"),
    [("unix_ms", 9), ("event", {**json.loads(chain_of(1)[0])["event"], "actor": "eve"})],
)
def test_what_was_changed_is_a_hash_mismatch(name: str, value: Any) -> None:
    lines = chain_of(2)
    lines[1] = changed(lines[1], **{name: value})
    with pytest.raises(AuditError, match="hash mismatch"):
        follow(lines)


def test_a_signature_without_a_key_is_an_error() -> None:
    with pytest.raises(AuditError, match="signature present but no key"):
        follow(chain_of(1, KEY))


@pytest.mark.parametrize("signer", [KEY, ED25519])
def test_a_wrong_signature_is_a_mismatch(signer: Signer) -> None:
    other = HmacKey(b"other")
    with pytest.raises(AuditError, match="signature mismatch"):
        follow(chain_of(2, other), signer)
    line = changed(chain_of(1, signer)[0], signature="")
    with pytest.raises(AuditError, match="signature mismatch"):
        follow([line], signer)


@pytest.mark.parametrize("signer", [KEY, ED25519])
def test_with_a_key_an_entry_must_be_signed_unless_it_may_be_without(signer: Signer) -> None:
    lines = chain_of(2)
    with pytest.raises(AuditError, match="signature missing"):
        follow(lines, signer)
    assert follow(lines, signer, unsigned=True).count == 2


def test_a_rehashed_chain_does_not_pass_the_signature() -> None:
    line = rehashed(changed(chain_of(1, KEY)[0], unix_ms=5))
    with pytest.raises(AuditError, match="signature mismatch"):
        follow([line], KEY)


def test_what_no_hash_covers_is_a_format_mismatch() -> None:
    line = chain_of(1)[0]
    for other in (
        line.replace(b'"hash"', b'"note":"x","hash"'),
        line.replace(b",", b", ", 1),
        line.replace(b'{"version"', b'{"seq":7,"version"'),
    ):
        with pytest.raises(AuditError, match="format mismatch"):
            follow([other])


def test_another_version_is_not_known() -> None:
    with pytest.raises(AuditError, match="version 2"):
        follow([changed(chain_of(1)[0], version=2)])


@given(st.binary(max_size=200))
def test_any_line_is_an_entry_or_refused(line: bytes) -> None:
    for parse in (parse_entry, parse_checkpoint):
        with pytest.raises(AuditError):
            parse(line)


@given(st.data())
def test_any_change_of_a_byte_is_found(data: st.DataObject) -> None:
    lines = chain_of(2, KEY)
    damaged = bytearray(lines[1])
    position = data.draw(st.integers(0, len(damaged) - 1))
    damaged[position] ^= data.draw(st.integers(1, 255))
    with pytest.raises(AuditError):
        follow([lines[0], bytes(damaged)], KEY)


def test_one_of_many_slow_signatures_is_checked_and_the_last() -> None:
    count = 2 * ANCHOR_ENTRIES + 3
    lines = chain_of(count, ED25519)

    class Counting:
        is_slow = True
        checked = 0

        def check(self, text: str, signature: str) -> bool:
            self.checked += 1
            return ED25519.check(text, signature)

    verifier = Counting()
    assert follow(lines, verifier).count == count
    assert verifier.checked == 3
    follow(lines, verifier, every_signature=True)
    assert verifier.checked == 3 + count


def test_a_wrong_slow_signature_that_nothing_covers_is_found_with_its_entry() -> None:
    lines = chain_of(ANCHOR_ENTRIES + 10, ED25519)
    forged = chain_of(ANCHOR_ENTRIES + 10, Ed25519Signer(Ed25519PrivateKey.generate()))
    with pytest.raises(SignatureMismatchError) as found:
        follow(lines[:130] + forged[130:], ED25519)
    assert found.value.seq == 131


def test_an_hmac_log_is_no_ed25519_log() -> None:
    with pytest.raises(AuditError, match="signature mismatch"):
        follow(chain_of(1, KEY), ED25519.verifier)


# keys


def pem_of(key: Ed25519PrivateKey | X25519PrivateKey) -> str:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


def test_a_pem_is_an_ed25519_key_and_any_other_text_an_hmac_secret() -> None:
    assert parse_signing_key("k") == KEY
    signer = parse_signing_key(pem_of(ED25519.private_key))
    assert isinstance(signer, Ed25519Signer)
    verifier = parse_public_key(signer.verifier.pem())
    assert follow(chain_of(3, signer), verifier).count == 3


_OTHER_KEY = pem_of(X25519PrivateKey.from_private_bytes(bytes(range(32))))


@pytest.mark.parametrize(
    "text",
    ["", "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", _OTHER_KEY],
    ids=["empty", "broken", "other"],
)
def test_a_key_that_is_no_use_is_refused(text: str) -> None:
    with pytest.raises(AuditError, match="key"):
        parse_signing_key(text)
    with pytest.raises(AuditError, match="public key"):
        parse_public_key(text)


def test_no_key_shows_in_a_repr() -> None:
    assert "k'" not in repr(KEY)
    assert "Ed25519PrivateKey" not in repr(ED25519)


# checkpoints


@pytest.mark.parametrize("signer", [KEY, ED25519])
def test_a_checkpoint_is_signed_and_found_again(signer: Signer) -> None:
    mark = make_checkpoint(7, "ab" * 32, 5, signer)
    assert parse_checkpoint(encode_checkpoint(mark)) == mark
    check_checkpoint(mark, signer, unsigned=False)
    check_checkpoint(mark, None, unsigned=False)
    for forged in (
        Checkpoint(version=1, count=6, head=mark.head, unix_ms=5, signature=mark.signature),
        Checkpoint(version=1, count=7, head=mark.head, unix_ms=6, signature=mark.signature),
    ):
        with pytest.raises(AuditError, match="signature mismatch"):
            check_checkpoint(forged, signer, unsigned=True)


def test_an_unsigned_checkpoint_proves_nothing_to_one_who_has_a_key() -> None:
    mark = make_checkpoint(7, "ab" * 32, 5, None)
    check_checkpoint(mark, None, unsigned=False)
    check_checkpoint(mark, KEY, unsigned=True)
    with pytest.raises(AuditError, match="signature missing"):
        check_checkpoint(mark, KEY, unsigned=False)


def test_the_signature_of_an_entry_is_none_of_a_checkpoint() -> None:
    mark = make_checkpoint(1, "ab" * 32, 5, None)
    digest = hashlib.sha256(encode_checkpoint(mark)).hexdigest()
    forged = Checkpoint(version=1, count=1, head=mark.head, unix_ms=5, signature=KEY.sign(digest))
    with pytest.raises(AuditError, match="signature mismatch"):
        check_checkpoint(forged, KEY, unsigned=False)


def test_an_entry_has_no_field_that_its_hash_or_signature_leaves_out() -> None:
    covered = {"version", "seq", "unix_ms", "event", "prev_hash"}
    assert set(AuditEntry.__struct_fields__) == covered | {"hash", "signature"}
