"""Which socket of a SO_REUSEPORT group gets a packet: a classic BPF program in the kernel.

A packet whose destination connection ID names a live slot goes to that slot's socket. Everything
else, first packets of new connections above all, goes to one of the active slots, chosen by a
hash of the connection ID, so that all packets of one attempt meet. Where the ID is, RFC 8999
section 5 says for every version of QUIC: behind the first byte (short header), or behind version
and length (long header).

The kernel runs the program on the UDP payload. A load beyond the packet's end would end it with
result 0, so every load is preceded by a look at the length.
"""

from __future__ import annotations

import ctypes
import functools
import socket
import struct
import sys
from collections.abc import Sequence
from typing import Final, NamedTuple

from toppy.errors import LocalError
from toppy.wire.connection_id import CONNECTION_ID_BYTES, MARKER, MAX_SLOTS

_SO_ATTACH_REUSEPORT_CBPF = 51
_INSTRUCTION = struct.Struct("=HBBI")  # struct sock_filter
_PROGRAM = struct.Struct("@HP")  # struct sock_fprog
_TWO_WORDS = struct.Struct("!II")

# Operation codes (include/uapi/linux/bpf_common.h). A is the accumulator, X the index register.
LOAD_WORD_AT_X: Final = 0x40  # A = the four bytes at X + k, big endian
LOAD_BYTE_AT_X: Final = 0x50  # A = the byte at X + k
LOAD_BYTE: Final = 0x30  # A = the byte at k
LOAD_LENGTH: Final = 0x80  # A = length of the payload
SET_X: Final = 0x01  # X = k
RECALL_X: Final = 0x61  # X = memory[k]
STORE: Final = 0x02  # memory[k] = A
ADD_X: Final = 0x0C
MULTIPLY: Final = 0x24
SHIFT_RIGHT: Final = 0x74
MODULO: Final = 0x94
JUMP: Final = 0x05
JUMP_IF_EQUAL: Final = 0x15
JUMP_IF_AT_LEAST: Final = 0x35
JUMP_IF_ANY_BIT: Final = 0x45
RETURN: Final = 0x06  # the result is k
RETURN_A: Final = 0x16

HASHED_BYTES: Final = 8
"""How much of the connection ID is hashed: a client's first one has at least so many bytes
(RFC 9000 section 7.2)."""
HASH_MULTIPLIER: Final = 0x9E3779B1
"""2^32 divided by the golden ratio: spreads every input bit into the upper half."""
HASH_SHIFT: Final = 16

_LONG_HEADER = 0x80
_LONG_LENGTH_AT = 5
_LONG_ID_AT = 6
_SHORT_ID_AT = 1


class Instruction(NamedTuple):
    """One ``struct sock_filter``; a conditional jump skips ``if_true`` or ``if_false`` others."""

    code: int
    if_true: int
    if_false: int
    k: int


class _Assembler:
    """Collects instructions; jumps go forward, to labels."""

    def __init__(self) -> None:
        self._instructions: list[Instruction] = []
        self._jumps: list[tuple[int, str]] = []
        self._labels: dict[str, int] = {}

    def do(self, code: int, k: int = 0) -> None:
        self._instructions.append(Instruction(code, 0, 0, k))

    def test(self, code: int, k: int, *, if_true: int = 0, if_false: int = 0) -> None:
        """Skip so many instructions."""
        self._instructions.append(Instruction(code, if_true, if_false, k))

    def unless(self, test: int, k: int, label: str) -> None:
        """Go to ``label`` unless the test holds. A conditional jump reaches 255 instructions only,
        the unconditional one behind it any distance.
        """
        self.test(test, k, if_true=1)
        self.jump(label)

    def jump(self, label: str) -> None:
        self._jumps.append((len(self._instructions), label))
        self.do(JUMP)

    def label(self, name: str) -> None:
        self._labels[name] = len(self._instructions)

    def program(self) -> list[Instruction]:
        for position, label in self._jumps:
            distance = self._labels[label] - position - 1
            self._instructions[position] = Instruction(JUMP, 0, 0, distance)
        return self._instructions


def build_program(
    *,
    slot_count: int,
    active_slots: Sequence[int],
    server_id: int = 0,
    live_slots: Sequence[int] | None = None,
) -> list[Instruction]:
    """The program for a group of ``slot_count`` sockets, socket *n* being slot *n*.

    ``active_slots`` take new connections, at least one. ``live_slots`` are those that packets may
    be sent to because their ID names them; None means all. Raises ``LocalError`` for a slot that
    does not exist.
    """
    _check(slot_count, active_slots, server_id, live_slots)
    to = _Assembler()
    to.do(LOAD_LENGTH)
    to.unless(JUMP_IF_AT_LEAST, 1, "first active")
    to.do(LOAD_BYTE, 0)
    to.unless(JUMP_IF_ANY_BIT, _LONG_HEADER, "short header")

    to.do(LOAD_LENGTH)
    to.unless(JUMP_IF_AT_LEAST, _LONG_ID_AT + HASHED_BYTES, "first active")
    to.do(SET_X, _LONG_ID_AT)
    to.do(LOAD_BYTE, _LONG_LENGTH_AT)
    to.unless(JUMP_IF_AT_LEAST, HASHED_BYTES, "first active")
    to.unless(JUMP_IF_EQUAL, CONNECTION_ID_BYTES, "hash")
    to.do(LOAD_LENGTH)
    to.unless(JUMP_IF_AT_LEAST, _LONG_ID_AT + CONNECTION_ID_BYTES, "hash")
    to.jump("ours?")

    to.label("short header")
    to.do(LOAD_LENGTH)
    to.unless(JUMP_IF_AT_LEAST, _SHORT_ID_AT + HASHED_BYTES, "first active")
    to.do(SET_X, _SHORT_ID_AT)
    to.unless(JUMP_IF_AT_LEAST, _SHORT_ID_AT + CONNECTION_ID_BYTES, "hash")

    to.label("ours?")
    to.do(LOAD_BYTE_AT_X, 0)
    to.unless(JUMP_IF_EQUAL, MARKER, "hash")
    to.do(LOAD_BYTE_AT_X, 1)
    to.unless(JUMP_IF_EQUAL, server_id, "hash")
    to.do(LOAD_BYTE_AT_X, 2)
    _return_if_live(to, slot_count, live_slots)

    to.label("hash")
    _return_by_hash(to, active_slots)

    to.label("first active")
    to.do(RETURN, active_slots[0])
    return to.program()


def _return_if_live(to: _Assembler, slot_count: int, live_slots: Sequence[int] | None) -> None:
    live = range(slot_count) if live_slots is None else sorted(set(live_slots))
    if len(live) == slot_count:
        to.test(JUMP_IF_AT_LEAST, slot_count, if_true=1)
        to.do(RETURN_A)
        return
    for slot in live:
        to.test(JUMP_IF_EQUAL, slot, if_false=1)
        to.do(RETURN_A)


def _return_by_hash(to: _Assembler, active_slots: Sequence[int]) -> None:
    if len(active_slots) > 1:
        to.do(LOAD_WORD_AT_X, 0)
        to.do(MULTIPLY, HASH_MULTIPLIER)
        to.do(STORE, 0)
        to.do(LOAD_WORD_AT_X, 4)
        to.do(RECALL_X, 0)
        to.do(ADD_X)
        to.do(MULTIPLY, HASH_MULTIPLIER)
        to.do(SHIFT_RIGHT, HASH_SHIFT)
        to.do(MODULO, len(active_slots))
        for index, slot in enumerate(active_slots[1:], 1):
            to.test(JUMP_IF_EQUAL, index, if_false=1)
            to.do(RETURN, slot)
    to.do(RETURN, active_slots[0])


def choose_active(connection_id: bytes, active_slots: Sequence[int]) -> int:
    """Where the program sends a new connection with this ID, of at least ``HASHED_BYTES``."""
    high, low = _TWO_WORDS.unpack_from(connection_id)
    mixed: int = (low + high * HASH_MULTIPLIER) * HASH_MULTIPLIER & 0xFFFFFFFF
    return active_slots[(mixed >> HASH_SHIFT) % len(active_slots)]


def attach(sock: socket.socket, program: Sequence[Instruction]) -> None:
    """Give the program to the whole group that ``sock`` belongs to, in place of any earlier one.

    From one packet to the next; nothing is lost. Raises ``OSError``.
    """
    code = b"".join(_INSTRUCTION.pack(*instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    # the kernel copies the program before setsockopt returns
    header = _PROGRAM.pack(len(program), ctypes.addressof(buffer))
    # struct sock_fprog ends with the pointer; "@" has put the padding before it
    sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_REUSEPORT_CBPF, header)


@functools.cache
def is_supported() -> bool:
    """Whether this system steers packets (Linux 4.5 and later, where nothing forbids it)."""
    if sys.platform != "linux":
        return False
    program = build_program(slot_count=1, active_slots=(0,))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            attach(probe, program)
        except OSError:
            return False
    return True


def _check(
    slot_count: int,
    active_slots: Sequence[int],
    server_id: int,
    live_slots: Sequence[int] | None,
) -> None:
    if not 1 <= slot_count <= MAX_SLOTS:
        raise LocalError(f"a group has 1 to {MAX_SLOTS} slots, not {slot_count}")
    if not active_slots:
        raise LocalError("new connections need at least one active slot")
    for slot in (*active_slots, *(live_slots or ())):
        if not 0 <= slot < slot_count:
            raise LocalError(f"there is no slot {slot} among {slot_count}")
    if not 0 <= server_id <= 0xFF:
        raise LocalError(f"a server ID is 0 to 255, not {server_id}")
