"""Classic BPF as the kernel runs it, and what the steering program is meant to do."""

from __future__ import annotations

from collections.abc import Sequence

from toppy.net import steering
from toppy.net.steering import Instruction
from toppy.wire.connection_id import CONNECTION_ID_BYTES, MARKER

_MASK = 0xFFFFFFFF


class IllegalProgramError(Exception):
    """The kernel would refuse the program."""


def run_program(program: Sequence[Instruction], packet: bytes) -> int:
    """The program's result; 0 after a load beyond the packet, as in the kernel."""
    a = x = at = 0
    memory: dict[int, int] = {}
    while True:
        if at >= len(program):
            raise IllegalProgramError("ran off the end")
        code, if_true, if_false, k = program[at]
        at += 1
        match code:
            case steering.RETURN:
                return k
            case steering.RETURN_A:
                return a
            case steering.JUMP:
                at += k
            case steering.JUMP_IF_EQUAL:
                at += if_true if a == k else if_false
            case steering.JUMP_IF_AT_LEAST:
                at += if_true if a >= k else if_false
            case steering.JUMP_IF_ANY_BIT:
                at += if_true if a & k else if_false
            case steering.LOAD_LENGTH:
                a = len(packet)
            case steering.LOAD_BYTE | steering.LOAD_BYTE_AT_X | steering.LOAD_WORD_AT_X:
                start = k if code == steering.LOAD_BYTE else x + k
                size = 4 if code == steering.LOAD_WORD_AT_X else 1
                if start + size > len(packet):
                    return 0
                a = int.from_bytes(packet[start : start + size], "big")
            case steering.SET_X:
                x = k
            case steering.RECALL_X:
                x = memory[k]
            case steering.STORE:
                memory[k] = a
            case steering.ADD_X:
                a = (a + x) & _MASK
            case steering.MULTIPLY:
                a = (a * k) & _MASK
            case steering.SHIFT_RIGHT:
                a >>= k
            case steering.MODULO:
                a %= k
            case _:
                raise IllegalProgramError(f"operation {code:#x}")


def check_program(program: Sequence[Instruction]) -> None:
    """Raise for what the kernel's checker refuses: length, jumps out of it, an open end."""
    if not 1 <= len(program) <= 4096:
        raise IllegalProgramError(f"{len(program)} instructions")
    for position, (code, if_true, if_false, k) in enumerate(program):
        if not (0 <= if_true <= 255 and 0 <= if_false <= 255 and 0 <= k <= _MASK):
            raise IllegalProgramError(f"operand out of range at {position}")
        reach = k if code == steering.JUMP else max(if_true, if_false)
        if position + 1 + reach > len(program):
            raise IllegalProgramError(f"jump out of the program at {position}")
    if program[-1].code not in {steering.RETURN, steering.RETURN_A}:
        raise IllegalProgramError("no return at the end")


def steer(
    packet: bytes,
    *,
    slot_count: int,
    active_slots: Sequence[int],
    server_id: int = 0,
    live_slots: Sequence[int] | None = None,
) -> int:
    """Where a packet belongs, in plain Python."""
    if not packet:
        return active_slots[0]
    if packet[0] & 0x80:
        if len(packet) < 14 or packet[5] < 8:
            return active_slots[0]
        connection_id = packet[6 : 6 + packet[5]]
        is_ours = len(connection_id) == CONNECTION_ID_BYTES == packet[5]
    else:
        if len(packet) < 9:
            return active_slots[0]
        connection_id = packet[1 : 1 + CONNECTION_ID_BYTES]
        is_ours = len(connection_id) == CONNECTION_ID_BYTES
    live = range(slot_count) if live_slots is None else live_slots
    names_us = is_ours and connection_id[0] == MARKER and connection_id[1] == server_id
    if names_us and connection_id[2] in live:
        return connection_id[2]
    first = int.from_bytes(connection_id[:4], "big")
    second = int.from_bytes(connection_id[4:8], "big")
    mixed = first * steering.HASH_MULTIPLIER + second
    spread = (mixed * steering.HASH_MULTIPLIER) & _MASK
    return active_slots[(spread >> steering.HASH_SHIFT) % len(active_slots)]
