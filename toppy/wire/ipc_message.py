"""What control plane and workers say to each other: msgpack, one message per ZeroMQ frame.

The public UDP port's bytes never travel here; a tunnel is asked for once, when it is opened.
"""

from __future__ import annotations

import struct
from typing import Any, TypeVar

import msgspec

from toppy.errors import PeerError
from toppy.model.counters import WorkerCounters
from toppy.model.grant import Denial, Grant

MAX_MESSAGE_BYTES = 256 * 1024

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
    sockets: tuple[int, ...]
    """Inherited descriptors: the UDP sockets that this worker reads."""
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
    log_level: str
    log_format: str

    def __repr__(self) -> str:
        return f"WorkerSettings(slot={self.slot}, generation={self.generation}, …)"


class Hello(msgspec.Struct, tag="hello", frozen=True):
    """A worker's first message: proves that the control plane started it."""

    slot: int
    generation: int
    pid: int
    secret: str

    def __repr__(self) -> str:
        return f"Hello(slot={self.slot}, generation={self.generation}, pid={self.pid})"


class Ready(msgspec.Struct, tag="ready", frozen=True):
    """The worker serves its sockets."""

    engine: str


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

    def __repr__(self) -> str:
        return f"AdmissionRequest(request={self.request}, host={self.host!r}, port={self.port})"


class TokenRequest(msgspec.Struct, tag="token", frozen=True):
    """Is this credential good (QUIC ping)?"""

    request: int
    authorization: str | None

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


FromWorker = Hello | Ready | AdmissionRequest | TokenRequest
ToWorker = Admitted | TokenAnswer | Stop

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
