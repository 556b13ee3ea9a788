"""Why a datagram was not delivered: every refused datagram adds one to one of these."""

from __future__ import annotations

from enum import StrEnum


class DropReason(StrEnum):
    """The ``reason`` label of ``toppy_gw_datagrams_dropped_total``."""

    QUEUE_FULL = "queue_full"
    """A tunnel's or connection's outgoing queue was full; the oldest was dropped."""
    TOO_LARGE = "too_large"
    """Larger than the path's packet size when its turn came (the path MTU shrank)."""
    CAPSULE_QUEUE_FULL = "capsule_queue_full"
    """Too large for a packet, and its stream was already full of DATAGRAM capsules."""
    UNKNOWN_CONTEXT = "unknown_context"
    """A context ID other than 0 (RFC 9298 section 4)."""
    MALFORMED = "malformed"
    """An HTTP Datagram that cannot be parsed (RFC 9297 section 2.1)."""
    UNKNOWN_STREAM = "unknown_stream"
    """For a stream that is no tunnel (any more)."""
    EARLY_QUEUE_FULL = "early_queue_full"
    """Arrived before its tunnel was open, and too many were already held (RFC 9297 section 3.1)."""
    TUNNEL_REFUSED = "tunnel_refused"
    """Was held while its tunnel was being opened, and the tunnel was refused."""
    TARGET_BUFFER_FULL = "target_buffer_full"
    """The target socket's send buffer was full."""
    TARGET_OVERFLOW = "target_overflow"
    """The target sent faster than the worker read: the kernel dropped it, at the target socket."""
    TARGET_UNREACHABLE = "target_unreachable"
    """The target answered with an ICMP error, or the send failed."""
    TOO_LARGE_FOR_TARGET = "too_large_for_target"
    """Larger than a UDP datagram to the target may be (EMSGSIZE)."""
    RATE_LIMITED = "rate_limited"
    """Over a rate of the tunnel, its subject or its rule; at the client, of the local peer."""
    QUOTA_USED_UP = "quota_used_up"
    """The subject has used what its rule allows for the period; its tunnels are about to end."""
    NO_CONNECTION = "no_connection"
    """Client: no connection to the gateway, or on the move to a new one, and the waiting queue was
    full."""
    TOO_MANY_PEERS = "too_many_peers"
    """Client: from a local peer beyond ``TOPPY_UDP_MAX_PEERS``."""
    LOCAL_BUFFER_FULL = "local_buffer_full"
    """Client: the local socket's send buffer was full, or its peer was gone."""
