"""What one worker counts, in plain integers: cheap to add to, easy to send and to sum."""

from __future__ import annotations

from dataclasses import dataclass, field

from toppy.model.drop_reason import DropReason

GRANTED = "granted"
"""The outcome of an admission that opened a tunnel; a refusal's outcome is its HTTP status."""


@dataclass(slots=True)
class WorkerCounters:
    """Counts since the worker's start; the ``…_open`` fields are how many there are now.

    Mutable, because the hot path adds to it. A snapshot is a copy: ``WorkerCounters() + counters``.
    """

    connections_open: int = 0
    connections_total: int = 0
    """Connection attempts that passed the gate."""
    handshakes_completed: int = 0
    handshakes_failed: int = 0
    handshakes_retried: int = 0
    """Attempts answered with a Retry packet."""
    handshakes_refused: int = 0
    """Attempts beyond a limit, refused or ignored."""
    tunnels_open: int = 0
    tunnels_total: int = 0
    tunnels_cut: int = 0
    """Live tunnels ended by the gateway: the policy changed, an operator said so, or a drain or a
    stop had no more time."""
    datagrams_to_target: int = 0
    bytes_to_target: int = 0
    """Payload bytes, without any header; likewise ``bytes_to_client``."""
    datagrams_to_client: int = 0
    bytes_to_client: int = 0
    tcp_tunnels_open: int = 0
    """Those among ``tunnels_open``; likewise the next one."""
    tcp_tunnels_total: int = 0
    tcp_bytes_to_target: int = 0
    """Payload bytes of TCP tunnels, which are not among the bytes of datagrams."""
    tcp_bytes_to_client: int = 0
    protocol_errors: int = 0
    """Tunnels that ended because their client broke the protocol on the stream."""
    capsules_skipped: int = 0
    """Capsules of unknown types on TCP tunnels."""
    capsules_received: int = 0
    """Payloads that came in DATAGRAM capsules; they are among the datagrams too."""
    capsules_sent: int = 0
    pings: int = 0
    socket_overflow: int = 0
    """Packets that the kernel dropped because a slot socket's receive buffer was full."""
    strays: int = 0
    """Packets handed over to the worker that they belong to."""
    strays_lost: int = 0
    """Packets for a worker whose queue was full, or that was gone."""
    send_errors: int = 0
    """QUIC packets that the kernel refused to send, in batches."""
    drops: dict[str, int] = field(default_factory=dict)
    """Datagrams that were not delivered, by ``DropReason``."""
    admissions: dict[str, int] = field(default_factory=dict)
    """Requests by outcome: ``granted`` or the HTTP status of the refusal."""

    def count_drop(self, reason: DropReason, count: int = 1) -> None:
        """``count`` datagrams were not delivered."""
        key = reason.value
        self.drops[key] = self.drops.get(key, 0) + count

    def count_admission(self, outcome: str) -> None:
        """A request was answered; see ``admissions``."""
        self.admissions[outcome] = self.admissions.get(outcome, 0) + 1

    def __add__(self, other: WorkerCounters) -> WorkerCounters:
        """Field by field; neither operand changes."""
        total = WorkerCounters(drops=dict(self.drops), admissions=dict(self.admissions))
        for name in _PLAIN_FIELDS:
            setattr(total, name, getattr(self, name) + getattr(other, name))
        for mine, theirs in ((total.drops, other.drops), (total.admissions, other.admissions)):
            for key, count in theirs.items():
                mine[key] = mine.get(key, 0) + count
        return total


_PLAIN_FIELDS = tuple(
    name for name in WorkerCounters.__dataclass_fields__ if name not in ("drops", "admissions")
)


def counted(number: int, what: str) -> str:
    """For people: ``1 tunnel``, ``2 tunnels``."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
