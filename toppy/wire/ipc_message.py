"""What control plane and workers say to each other: msgpack, one message per ZeroMQ frame.

The public UDP port's bytes never travel here; a tunnel is asked for once, when it is opened.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import msgspec

from toppy.errors import PeerError
from toppy.model.client_certificate import ClientCertificate
from toppy.model.counters import WorkerCounters
from toppy.model.grant import Denial, Grant
from toppy.model.rate import Budget, TunnelLimits

MAX_MESSAGE_BYTES = 256 * 1024
PROTOCOL = 1
"""Raised when these messages change so that another version cannot read them. Workers of the code
before an upgrade live on beside the new control plane."""
PAGE_BYTES = 64 * 1024
"""About so much of a list goes into one message; one item is always far smaller."""

T = TypeVar("T")


class IpcError(PeerError):
    """A frame is not one of our messages."""


class WorkerSettings(msgspec.Struct, frozen=True):
    """What a worker is told at birth, through its standard input: never by argument or
    environment, where ``ps`` would show it.
    """

    slot: int
    generation: int
    secret: str
    control_address: str
    report_address: str
    runtime_dir: str
    """Where workers find each other, and a new control plane finds them."""
    sockets: tuple[tuple[int, ...], ...]
    """Inherited descriptors of all the gateway's UDP sockets, one row per listen address. A worker
    reads its own and holds the others, so that no index in a group ever changes."""
    read: tuple[int, ...]
    """Which of each row this worker reads."""
    is_steered: bool
    """The kernel brings each packet to the slot that its connection ID names."""
    names: tuple[str, ...]
    """Host names and addresses that count as the gateway itself (echo)."""
    proxy_name: str
    engine: str
    certificate_chain_pem: bytes
    private_key_pem: bytes
    reset_key: bytes
    token_key: bytes
    quic: dict[str, Any]
    limits: dict[str, Any]
    orphan_timeout_s: float
    log_level: str
    log_format: str
    refuses_unrecorded: bool = False
    """No new tunnels while the ends of earlier ones wait for the audit log, too many of them."""
    core: int | None = None
    """The only one to run on."""
    client_ca_pem: bytes = b""
    """Whose client certificates are accepted; empty: they are not asked for."""
    requires_client_certificate: bool = False
    cipher_suites: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"WorkerSettings(slot={self.slot}, generation={self.generation}, …)"


class Hello(msgspec.Struct, tag="hello", frozen=True):
    """A worker's first message: proves that the control plane started it."""

    slot: int
    generation: int
    pid: int
    secret: str
    protocol: int = PROTOCOL

    def __repr__(self) -> str:
        return f"Hello(slot={self.slot}, generation={self.generation}, pid={self.pid})"


class Ready(msgspec.Struct, tag="ready", frozen=True):
    """The worker serves its sockets."""

    engine: str
    is_draining: bool = False
    """Said again to a new control plane: it was draining already."""
    has_meters: bool = False
    """Knows ``SetBudgets`` and ``SetLimits``; workers of code from before rates do not."""


class AdmissionRequest(msgspec.Struct, tag="admit", frozen=True):
    """May this client open this tunnel?"""

    request: int
    authorization: str | None
    host: str
    port: int
    protocol: str
    is_echo: bool
    """The built-in echo was asked for, not a target."""
    source: str
    address: str = ""
    """A live tunnel's, that has a newer credential: it stays with this address, and nothing is
    resolved anew."""
    connection: int = 0
    quarter_stream_id: int = 0
    certificate: ClientCertificate | None = None
    """The connection's, verified."""

    def __repr__(self) -> str:
        return f"AdmissionRequest(request={self.request}, host={self.host!r}, port={self.port})"


class TokenRequest(msgspec.Struct, tag="token", frozen=True):
    """Is this credential good (QUIC ping)?"""

    request: int
    authorization: str | None
    source: str = ""
    """The client's address, without the port."""
    certificate: ClientCertificate | None = None

    def __repr__(self) -> str:
        return f"TokenRequest(request={self.request})"


class Admitted(msgspec.Struct, tag="admitted", frozen=True):
    """The answer to ``AdmissionRequest``: exactly one of the two."""

    request: int
    grant: Grant | None
    denial: Denial | None


class TokenAnswer(msgspec.Struct, tag="token_answer", frozen=True):
    """The answer to ``TokenRequest``."""

    request: int
    is_valid: bool


class LiveTunnel(msgspec.Struct, frozen=True):
    """An open tunnel, as operators see it and as a changed policy is applied to it."""

    connection: int
    quarter_stream_id: int
    source: str
    host: str
    port: int
    protocol: str
    address: str
    """The one of the grant's that is used; empty for echo."""
    subject: str
    rule: str
    opened_at: float
    """Unix time."""
    datagrams_to_target: int
    datagrams_to_client: int
    authorization: str | None = None
    """Only where a changed policy is to be applied to it; likewise ``certificate``."""
    certificate: ClientCertificate | None = None
    bytes_to_target: int = 0
    """Payload bytes, without any header; likewise ``bytes_to_client``."""
    bytes_to_client: int = 0
    candidates: tuple[str, ...] = ()
    """While the target is being reached: every address that is tried."""

    def __repr__(self) -> str:
        return f"LiveTunnel({self.connection}, {self.quarter_stream_id}, {self.host!r})"


class LiveConnection(msgspec.Struct, frozen=True):
    """An open connection, as operators see it."""

    connection: int
    source: str
    alpn: str
    tunnels: int
    opened_at: float
    """Unix time."""
    round_trip_s: float


class ClosedTunnel(msgspec.Struct, frozen=True):
    """A tunnel that has ended, for the audit log."""

    connection: int
    quarter_stream_id: int
    source: str
    """The client's address, without the port."""
    host: str
    port: int
    subject: str
    rule: str
    reason: str
    """Why it ended, a sentence."""
    duration_s: float
    datagrams_to_target: int
    bytes_to_target: int
    """Payload bytes, without any header; likewise ``bytes_to_client``."""
    datagrams_to_client: int
    bytes_to_client: int
    drops: int
    """Datagrams of this tunnel that its worker could not hand on."""
    rate_limited: int = 0
    """Those among them that were over a rate or a quota."""
    protocol: str = "udp"


class BudgetUse(msgspec.Struct, frozen=True):
    """What a worker's tunnels of one budget wanted and got, since it last said so."""

    name: str
    tunnels: int
    """Now; 0: the last word about this budget."""
    used_bytes: int
    """Both directions together."""
    to_target_bytes: int
    """What was wanted, whether it went or not; likewise the next three."""
    to_client_bytes: int
    to_target_datagrams: int
    to_client_datagrams: int


class Usage(msgspec.Struct, tag="usage", frozen=True):
    """Budgets with something new, of one worker."""

    grants: int
    """How many grants had reached the worker, whatever became of them, since this control plane
    was there: those are among ``tunnels``."""
    budgets: tuple[BudgetUse, ...]


class ClosedTunnels(msgspec.Struct, tag="closed_tunnels", frozen=True):
    """Tunnels that have ended, in order; said again until it is acknowledged."""

    first: int
    """The number of the first one; a worker counts them from 1."""
    tunnels: tuple[ClosedTunnel, ...]
    lost: int = 0
    """How many the worker had no room for, since its start."""


class RefusedRequests(msgspec.Struct, frozen=True):
    """Requests that a worker refused alike, without asking the control plane."""

    source: str
    """The client's address, without the port; empty: several."""
    status: int
    reason: str
    target: str
    """What the last one asked for, where it could be read."""
    count: int


class Refusals(msgspec.Struct, tag="refusals", frozen=True):
    """Requests that a worker has refused since it last said so, for the audit log."""

    refused: tuple[RefusedRequests, ...]


class ClosedTaken(msgspec.Struct, tag="closed_taken", frozen=True):
    """Every ``ClosedTunnel`` up to this number is in the audit log."""

    number: int


class ListTunnels(msgspec.Struct, tag="list_tunnels", frozen=True):
    """Asks for every open tunnel."""

    request: int
    with_authorization: bool = False


class ListConnections(msgspec.Struct, tag="list_connections", frozen=True):
    """Asks for every open connection."""

    request: int


class TunnelPage(msgspec.Struct, tag="tunnels", frozen=True):
    """A part of the answer to ``ListTunnels``."""

    request: int
    tunnels: tuple[LiveTunnel, ...]
    is_last: bool


class ConnectionPage(msgspec.Struct, tag="connections", frozen=True):
    """A part of the answer to ``ListConnections``."""

    request: int
    connections: tuple[LiveConnection, ...]
    is_last: bool


class CloseTunnels(msgspec.Struct, tag="close_tunnels", frozen=True):
    """End these tunnels, ``(connection, quarter stream ID)``, and tell their clients why."""

    tunnels: tuple[tuple[int, int], ...]
    denial: Denial


class SetBudgets(msgspec.Struct, tag="budgets", frozen=True):
    """Other amounts for budgets that are in use; others are to be ignored."""

    budgets: tuple[Budget, ...]


class TunnelChange(msgspec.Struct, frozen=True):
    """What a live tunnel is held to from now on."""

    connection: int
    quarter_stream_id: int
    rule: str
    """By which it would be granted now."""
    limits: TunnelLimits


class SetLimits(msgspec.Struct, tag="limits", frozen=True):
    """The limits have changed: these tunnels live on under others."""

    tunnels: tuple[TunnelChange, ...]


class SetLogLevel(msgspec.Struct, tag="log_level", frozen=True):
    """Log from this level on."""

    level: str


class Owners(msgspec.Struct, tag="owners", frozen=True):
    """Who serves what, from now on; said to every worker at each change."""

    active: tuple[int, ...]
    """Slots that take new connections."""
    generations: dict[int, int]
    """Of every live worker, by slot."""


class Drain(msgspec.Struct, tag="drain", frozen=True):
    """Take nothing new, go on with what there is, and exit when it has ended."""

    timeout_s: float
    """Then close what is left; 0: never."""


class Stop(msgspec.Struct, tag="stop", frozen=True):
    """Close all connections and exit within ``deadline_s``."""

    deadline_s: float


class Report(msgspec.Struct, frozen=True):
    """A worker's counters since its start; also its heartbeat."""

    slot: int
    generation: int
    secret: str
    counters: WorkerCounters

    def __repr__(self) -> str:
        return f"Report(slot={self.slot}, generation={self.generation})"


FromWorker = (
    Hello
    | Ready
    | AdmissionRequest
    | TokenRequest
    | TunnelPage
    | ConnectionPage
    | ClosedTunnels
    | Refusals
    | Usage
)
ToWorker = (
    Admitted
    | TokenAnswer
    | Owners
    | Drain
    | ListTunnels
    | ListConnections
    | CloseTunnels
    | SetBudgets
    | SetLimits
    | SetLogLevel
    | ClosedTaken
    | Stop
)

_encoder = msgspec.msgpack.Encoder()
_from_worker: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker)
_to_worker: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)
_report = msgspec.msgpack.Decoder(Report)
_settings = msgspec.msgpack.Decoder(WorkerSettings)


def encode_message(message: FromWorker | ToWorker | Report) -> bytes:
    """A message as one ZeroMQ frame."""
    return _encoder.encode(message)


def parse_from_worker(data: bytes) -> FromWorker:
    """Raises ``IpcError`` for anything else."""
    return _parse(_from_worker, data)


def parse_to_worker(data: bytes) -> ToWorker:
    """Raises ``IpcError`` for anything else."""
    return _parse(_to_worker, data)


def parse_report(data: bytes) -> Report:
    """Raises ``IpcError`` for anything else."""
    return _parse(_report, data)


def pages(items: Iterable[T]) -> Iterator[tuple[tuple[T, ...], bool]]:
    """A list in parts that fit one message each, and whether a part is the last one."""
    page: list[T] = []
    size = 0
    for item in items:
        item_bytes = len(_encoder.encode(item))
        if page and size + item_bytes > PAGE_BYTES:
            yield tuple(page), False
            page, size = [], 0
        page.append(item)
        size += item_bytes
    yield tuple(page), True


SETTINGS_LENGTH = struct.Struct("!I")


def encode_settings(settings: WorkerSettings) -> bytes:
    """Settings as a worker reads them from its standard input: a length, then the message."""
    encoded = _encoder.encode(settings)
    return SETTINGS_LENGTH.pack(len(encoded)) + encoded


def parse_settings(data: bytes) -> WorkerSettings:
    """The message without its length; raises ``IpcError`` for anything else."""
    return _parse(_settings, data)


def _parse(decoder: msgspec.msgpack.Decoder[T], data: bytes) -> T:
    if len(data) > MAX_MESSAGE_BYTES:
        raise IpcError(f"an IPC message of {len(data)} bytes is too large")
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise IpcError(f"not an IPC message: {error}") from None
