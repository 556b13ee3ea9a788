"""Messages between control plane and workers: what was sent arrives, nothing else is taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from toppy.model.counters import WorkerCounters
from toppy.model.grant import Denial, Grant
from toppy.model.rate import Budget, DirectionLimits, Rate, TunnelLimits
from toppy.wire.ipc_message import (
    MAX_MESSAGE_BYTES,
    PROTOCOL,
    SETTINGS_LENGTH,
    AdmissionRequest,
    Admitted,
    BudgetUse,
    ClosedTaken,
    ClosedTunnel,
    ClosedTunnels,
    CloseTunnels,
    ConnectionPage,
    Drain,
    Hello,
    IpcError,
    ListConnections,
    ListTunnels,
    LiveConnection,
    LiveTunnel,
    Owners,
    Ready,
    Report,
    SetBudgets,
    SetLimits,
    SetLogLevel,
    Stop,
    TokenAnswer,
    TokenRequest,
    TunnelChange,
    TunnelPage,
    Usage,
    WorkerSettings,
    encode_message,
    encode_settings,
    pages,
    parse_from_worker,
    parse_report,
    parse_settings,
    parse_to_worker,
)

Parser = Callable[[bytes], Any]
PARSERS: list[Parser] = [parse_from_worker, parse_to_worker, parse_report, parse_settings]

FROM_WORKER = [
    Hello(slot=1, generation=2, pid=3, secret="hidden"),
    Ready(engine="native"),
    AdmissionRequest(
        request=1,
        authorization="Bearer hidden",
        host="db.example",
        port=53,
        protocol="udp",
        is_echo=False,
        source="192.0.2.1",
    ),
    TokenRequest(request=2, authorization=None),
    TunnelPage(
        5,
        (
            LiveTunnel(
                connection=1,
                quarter_stream_id=2,
                source="192.0.2.1:5",
                host="db.example",
                port=53,
                protocol="udp",
                address="192.0.2.53",
                subject="alice",
                rule="dns",
                opened_at=1.5,
                datagrams_to_target=3,
                datagrams_to_client=4,
                authorization="Bearer hidden",
            ),
        ),
        True,
    ),
    ConnectionPage(6, (LiveConnection(1, "192.0.2.1:5", "h3", 1, 1.5, 0.02),), False),
    ClosedTunnels(
        7,
        (
            ClosedTunnel(
                connection=1,
                quarter_stream_id=2,
                source="192.0.2.1",
                host="db.example",
                port=53,
                subject="alice",
                rule="dns",
                reason="it was idle",
                duration_s=1.5,
                datagrams_to_target=3,
                bytes_to_target=30,
                datagrams_to_client=4,
                bytes_to_client=40,
                drops=5,
            ),
        ),
        lost=6,
    ),
    Usage(8, (BudgetUse("web\0", 1, 2, 3, 4, 5, 6),)),
]
ONE_WAY = DirectionLimits(Rate(1000, 2000), Rate(5, 5))
BUDGET = Budget("web\0alice", to_client=ONE_WAY, quota_left=-1)
TO_WORKER = [
    Admitted(
        4,
        Grant((), 7, "alice", "web", 1, limits=TunnelLimits(ONE_WAY, (BUDGET,))),
        None,
    ),
    Admitted(1, Grant(("192.0.2.1",), 53, "alice", "rule 1", 1, expires_at=5.5), None),
    Admitted(2, None, Denial(403, "http_request_denied", "no rule allows it", "default")),
    TokenAnswer(request=3, is_valid=True),
    Stop(deadline_s=5.0),
    Owners(active=(2, 3), generations={0: 1, 2: 2, 3: 2}),
    Drain(timeout_s=0.0),
    ListTunnels(request=5, with_authorization=True),
    ListConnections(request=6),
    CloseTunnels(((1, 2), (3, 4)), Denial(403, "http_request_denied", "denied", "rule")),
    SetLogLevel("debug"),
    SetBudgets((BUDGET,)),
    SetLimits((TunnelChange(1, 2, "web", TunnelLimits(ONE_WAY, (BUDGET,))),)),
    ClosedTaken(7),
]
REPORT = Report(
    slot=1, generation=2, secret="hidden", counters=WorkerCounters(drops={"malformed": 2})
)
SETTINGS = WorkerSettings(
    slot=1,
    generation=2,
    secret="hidden",
    control_address="ipc:///run/a",
    report_address="ipc:///run/b",
    runtime_dir="/run",
    sockets=((3, 4),),
    read=(1,),
    is_steered=True,
    names=("localhost",),
    proxy_name="gw",
    engine="aioquic",
    certificate_chain_pem=b"chain",
    private_key_pem=b"hidden",
    reset_key=b"hidden",
    token_key=b"hidden",
    quic={"gso": True},
    limits={"max_connections": 1},
    orphan_timeout_s=600.0,
    log_level="info",
    log_format="json",
)


@pytest.mark.parametrize("message", FROM_WORKER)
def test_what_a_worker_says_arrives(message: Any) -> None:
    assert parse_from_worker(encode_message(message)) == message
    with pytest.raises(IpcError):
        parse_to_worker(encode_message(message))


@pytest.mark.parametrize("message", TO_WORKER)
def test_what_the_control_plane_says_arrives(message: Any) -> None:
    assert parse_to_worker(encode_message(message)) == message
    with pytest.raises(IpcError):
        parse_from_worker(encode_message(message))


def test_a_report_and_settings_arrive() -> None:
    assert parse_report(encode_message(REPORT)) == REPORT
    encoded = encode_settings(SETTINGS)
    (length,) = SETTINGS_LENGTH.unpack(encoded[: SETTINGS_LENGTH.size])
    assert length == len(encoded) - SETTINGS_LENGTH.size
    assert parse_settings(encoded[SETTINGS_LENGTH.size :]) == SETTINGS


@pytest.mark.parametrize("message", [*FROM_WORKER, REPORT, SETTINGS])
def test_no_secret_shows_in_a_repr(message: Any) -> None:
    assert "hidden" not in repr(message)


@pytest.mark.parametrize("parse", PARSERS)
def test_a_frame_beyond_the_bound_is_refused_unread(parse: Parser) -> None:
    with pytest.raises(IpcError, match="too large"):
        parse(bytes(MAX_MESSAGE_BYTES + 1))


@pytest.mark.parametrize("parse", PARSERS)
@given(data=st.binary(max_size=200))
def test_any_frame_is_a_message_or_refused(parse: Parser, data: bytes) -> None:
    with pytest.raises(IpcError):
        parse(data)


@given(st.sampled_from([*FROM_WORKER, *TO_WORKER, REPORT]), st.data())
def test_a_damaged_message_is_a_message_or_refused(message: Any, data: st.DataObject) -> None:
    encoded = bytearray(encode_message(message))
    position = data.draw(st.integers(0, len(encoded) - 1))
    encoded[position] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(encoded)))
    for damaged in (bytes(encoded), bytes(encoded[:cut])):
        for parse in PARSERS:
            try:
                found = parse(damaged)
            except IpcError:
                continue
            assert isinstance(found, msgspec.Struct)


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(IpcError):
        parse_from_worker(b"\x91" * 100_000)


@given(st.lists(st.binary(max_size=40_000), max_size=20))
def test_a_list_travels_in_pages_that_each_fit_a_message(items: list[bytes]) -> None:
    parts = list(pages(items))
    assert [item for page, _ in parts for item in page] == items
    assert [is_last for _, is_last in parts] == [False] * (len(parts) - 1) + [True]
    assert all(sum(map(len, page)) < MAX_MESSAGE_BYTES for page, _ in parts)


def test_an_empty_list_is_one_empty_page() -> None:
    assert list(pages([])) == [((), True)]


def test_a_hello_says_which_protocol_it_speaks() -> None:
    hello = parse_from_worker(encode_message(Hello(slot=0, generation=1, pid=2, secret="s")))
    assert isinstance(hello, Hello)
    assert hello.protocol == PROTOCOL


def test_settings_for_many_sockets_fit_a_message() -> None:
    rows = tuple(tuple(range(row * 256, row * 256 + 256)) for row in range(8))
    settings = msgspec.structs.replace(
        SETTINGS, sockets=rows, certificate_chain_pem=bytes(100_000), names=("n" * 250,) * 100
    )
    assert parse_settings(encode_settings(settings)[SETTINGS_LENGTH.size :]) == settings
