"""Asking everything at once, in virtual time: what is silent, and how long that may take."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import pytest
from cryptography import x509

from tests.client.gateway import settings_for
from tests.control.virtual_time import run_in_virtual_time
from toppy.auth.oidc import OidcError
from toppy.client.doctor.evidence import Evidence
from toppy.client.doctor.gather import LOGIN_S, LOOKUP_S, TOTAL_S, Gatherer, Network, Questions
from toppy.client.lookup import NameLookupError
from toppy.client.path_probe import AddressFindings, TcpAnswer
from toppy.client.probe import Probe, ProbeError
from toppy.client.session import GatewaySettings
from toppy.client.tokens import LoginRequiredError
from toppy.model.target import Target
from toppy.quic.engine import Address

T = TypeVar("T")
ADDRESS: Address = ("192.0.2.1", 4433)
LAST_WORDS_S = 2.0
"""What a login takes to keep a token that was just renewed."""
SETTINGS = settings_for(ADDRESS, authorization="token")


async def never() -> Any:
    await asyncio.Event().wait()


class SilentProbe:
    """A connection that never comes; ``stage`` is the last thing that works."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.is_closed = False
        self.local_port = 5
        self.largest_payload_bytes = 1300

    async def __aenter__(self) -> SilentProbe:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.is_closed = True

    async def connect(self) -> tuple[Address, float]:
        if self.stage == "nothing":
            await never()
        if self.stage == "refused":
            raise ProbeError("certificate unknown")
        return ADDRESS, 0.01

    async def ping(self) -> str:
        return cast(str, await never())

    async def request_udp(self, template: str, target: Target) -> Any:
        return await never()

    async def request(self, headers: object) -> Any:
        return await never()


@dataclass
class FakeNetwork:
    """Everything is silent unless a test says otherwise."""

    names: Callable[[], Coroutine[Any, Any, list[Address]]] = never
    login: Callable[[], Coroutine[Any, Any, str | None]] = never
    tcp: Callable[[], Coroutine[Any, Any, TcpAnswer]] = never
    stage: str = "nothing"
    asked: list[str] = field(default_factory=list)
    probes: list[SilentProbe] = field(default_factory=list)

    async def look_up(self, host: str, port: int) -> list[Address]:
        return await self.names()

    async def log_in(self) -> str | None:
        self.asked.append("login")
        return await self.login()

    async def probe_path(
        self, addresses: Sequence[Address], sizes: Sequence[int], found: list[AddressFindings]
    ) -> None:
        self.asked.append("path")
        found += [AddressFindings(address) for address in addresses]
        await asyncio.sleep(0.9)

    async def probe_tcp(self, address: Address) -> TcpAnswer:
        self.asked.append("tcp")
        return await self.tcp()

    async def fetch_certificate(
        self, addresses: Sequence[Address], server_name: str
    ) -> tuple[x509.Certificate, ...]:
        self.asked.append("certificate")
        return cast("tuple[x509.Certificate, ...]", await never())

    def open_probe(
        self, settings: GatewaySettings, addresses: Sequence[Address], alpn_protocol: str
    ) -> Probe:
        self.asked.append(f"{alpn_protocol} {settings.authorization}")
        self.probes.append(SilentProbe(self.stage))
        return cast(Probe, self.probes[-1])


def gather(
    network: FakeNetwork, *, has_login: bool = False, asks_gateway: bool = True
) -> tuple[Evidence, float]:
    """The evidence, and how long it took."""
    target = Target("10.0.0.1", 53)
    questions = Questions(SETTINGS, has_login, asks_gateway, target)

    async def scenario() -> tuple[Evidence, float]:
        loop = asyncio.get_running_loop()
        evidence = await Gatherer(cast(Network, network), questions, lambda: 0.0).run()
        assert len(asyncio.all_tasks()) == 1
        return evidence, loop.time()

    return run_in_virtual_time(scenario())


async def one_address() -> list[Address]:
    return [ADDRESS]


def test_name_servers_that_never_answer_are_given_up() -> None:
    evidence, took_s = gather(FakeNetwork())
    assert evidence.lookup_trouble is not None
    assert evidence.lookup_trouble.is_timeout
    assert took_s == pytest.approx(LOOKUP_S)


def test_a_network_that_drops_everything_is_given_up_in_time() -> None:
    network = FakeNetwork(names=one_address)
    evidence, took_s = gather(network)
    assert took_s < TOTAL_S
    assert evidence.ping.trouble is not None
    assert evidence.ping.trouble.is_timeout
    assert evidence.tunnel.trouble is not None
    assert evidence.tunnel.trouble.is_timeout
    assert evidence.tcp is TcpAnswer.SILENT
    assert not evidence.answers_udp
    assert all(probe.is_closed for probe in network.probes)


@pytest.mark.parametrize("stage", ["nothing", "connected"])
@pytest.mark.parametrize("has_login", [False, True])
@pytest.mark.parametrize("lookup_s", [0.0, LOOKUP_S - 0.01])
@pytest.mark.parametrize("last_words_s", [0.0, LAST_WORDS_S])
def test_however_silent_everything_is_the_run_takes_less_than_its_bound(
    stage: str, has_login: bool, lookup_s: float, last_words_s: float
) -> None:
    async def slow_names() -> list[Address]:
        await asyncio.sleep(lookup_s)
        return [ADDRESS]

    async def slow_login() -> str | None:
        try:
            return cast(str, await never())
        finally:
            await asyncio.sleep(last_words_s)

    network = FakeNetwork(names=slow_names, login=slow_login, stage=stage)
    _, took_s = gather(network, has_login=has_login)
    assert took_s <= TOTAL_S


def test_a_silent_provider_stops_only_what_needs_its_token() -> None:
    network = FakeNetwork(names=one_address)
    evidence, took_s = gather(network, has_login=True)
    assert evidence.login_trouble is not None
    assert evidence.login_trouble.is_timeout
    assert {"path", "certificate"} <= set(network.asked)
    assert not network.probes
    assert took_s < TOTAL_S


def test_a_renewal_that_is_cut_off_may_still_keep_its_token() -> None:
    kept: list[str] = []

    async def login() -> str | None:
        try:
            return cast(str, await never())
        finally:
            await asyncio.sleep(LAST_WORDS_S)
            kept.append("token")

    gather(FakeNetwork(names=one_address, login=login), has_login=True)
    assert kept == ["token"]


@pytest.mark.parametrize(
    "error", [LoginRequiredError("nobody is logged in"), OidcError("it is broken")]
)
def test_a_login_that_fails_is_no_reason_to_wait(error: Exception) -> None:
    async def login() -> str | None:
        raise error

    network = FakeNetwork(names=one_address, login=login)
    evidence, took_s = gather(network, has_login=True)
    assert evidence.login_trouble is not None
    assert str(error) == evidence.login_trouble.text
    assert not network.probes
    assert took_s < LOGIN_S + 0.9


def test_the_logins_token_is_what_the_gateway_is_shown() -> None:
    async def login() -> str | None:
        return "fresh"

    network = FakeNetwork(names=one_address, login=login)
    evidence, _ = gather(network, has_login=True)
    assert evidence.is_logged_in
    assert {"toppy-ping fresh", "h3 fresh"} <= set(network.asked)


def test_tcp_is_asked_only_where_udp_is_silent() -> None:
    network = FakeNetwork(names=one_address, stage="connected")
    evidence, _ = gather(network)
    assert evidence.answers_udp
    assert "tcp" not in network.asked


def test_what_a_gateway_refuses_is_written_down() -> None:
    evidence, _ = gather(FakeNetwork(names=one_address, stage="refused"))
    assert evidence.ping.trouble is not None
    assert evidence.ping.trouble.text == "certificate unknown"
    assert not evidence.ping.trouble.is_timeout


def test_a_name_without_addresses_ends_the_questions() -> None:
    async def names() -> list[Address]:
        raise NameLookupError("no such name")

    network = FakeNetwork(names=names)
    evidence, took_s = gather(network)
    assert evidence.lookup_trouble is not None
    assert evidence.lookup_trouble.text == "no such name"
    assert took_s == 0.0
    assert network.asked == []


def test_another_proxy_is_asked_no_more_than_its_path() -> None:
    network = FakeNetwork(names=one_address)
    gather(network, asks_gateway=False)
    assert set(network.asked) == {"path", "certificate", "tcp"}
