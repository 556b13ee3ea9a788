"""Asks the network everything at once, each question with a deadline, and writes down the answers.

The whole takes ``TOTAL_S`` at most, however silent the network is: what has come by then counts.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
import typing
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cryptography import x509

from toppy.auth.oidc import OidcError
from toppy.auth.token_cache import TokenCacheError
from toppy.client.doctor.evidence import (
    Evidence,
    PingEvidence,
    TargetEvidence,
    Trouble,
    TunnelEvidence,
)
from toppy.client.lookup import NameLookupError
from toppy.client.path_probe import PROBE_SIZES, AddressFindings, TcpAnswer
from toppy.client.probe import ECHO_TARGET, Probe, ProbeError, ProbeRefusedError, ProbeTunnel
from toppy.client.session import GatewaySettings
from toppy.client.tokens import LoginRequiredError
from toppy.errors import ConfigError
from toppy.model.target import Protocol, Target
from toppy.quic.endpoint import H3_ALPN, PING_ALPN
from toppy.quic.engine import Address
from toppy.wire import connect_tcp
from toppy.wire.connect_udp import DEFAULT_TEMPLATE_PATH, expand_template

TOTAL_S = 4.0
"""With the start of the program the run stays under 5 s."""
LOOKUP_S = 1.5
LOGIN_S = 1.5
PING_TIMEOUT_S = 0.8
"""With CONNECT_UDP_TIMEOUT_S of T-085; each has the handshake in it, so a path with a round trip
of more than 200 ms fails although `toppy udp` would work on it."""
CONNECT_UDP_TIMEOUT_S = 1.2
ECHO_TIMEOUT_S = 1.2
TARGET_TIMEOUT_S = 1.2
CERTIFICATE_TIMEOUT_S = 1.5
TCP_TIMEOUT_S = 0.6
ECHOES = 40
ECHO_INTERVAL_S = 0.012
LAST_ECHO_S = 0.4
"""What the last one may take."""
PAYLOAD_SIZES = (1150, 1200, 1232, 1252, 1280, 1300, 1320, 1350, 1380, 1400, 1420)
"""That the gateway is asked to return: 1,200 is what an inner QUIC Initial has."""
SIZES_TIMEOUT_S = 0.7
_AGAIN_TIMEOUT_S = 0.4
"""For the second look at what the gateway says of this client."""
_SIZES_AGAIN_S = 0.2
_SIZE_INTERVAL_S = 0.015
"""Payloads that come together are returned together, padded to the size of the largest."""
_SIZE_MARK = b"toppy-doctor-size"
_ECHO_MARK = b"toppy-doctor-echo"
_SILENT_PROVIDER = Trouble("the provider does not answer in time", is_timeout=True)


class Network(typing.Protocol):
    """The world outside, as far as the doctor looks into it."""

    async def look_up(self, host: str, port: int) -> list[Address]:
        """Raises ``NameLookupError``."""
        ...

    async def log_in(self) -> str | None:
        """The login's token, renewed where it is too old. Raises ``LoginRequiredError``,
        ``TokenCacheError``, ``OidcError``.
        """
        ...

    async def probe_path(
        self, addresses: Sequence[Address], sizes: Sequence[int], found: list[AddressFindings]
    ) -> None:
        """See ``path_probe``."""
        ...

    async def probe_tcp(self, address: Address) -> TcpAnswer:
        """See ``path_probe``."""
        ...

    async def fetch_certificate(
        self, addresses: Sequence[Address], server_name: str
    ) -> tuple[x509.Certificate, ...]:
        """Raises ``ProbeError``."""
        ...

    def open_probe(
        self, settings: GatewaySettings, addresses: Sequence[Address], alpn_protocol: str
    ) -> Probe:
        """Raises ``ConfigError``."""
        ...


@dataclass(frozen=True, slots=True)
class Questions:
    """What is asked about."""

    settings: GatewaySettings
    has_login: bool
    asks_gateway: bool
    """False for another proxy, which has no ping and no echo."""
    target: Target | None = None
    protocols: tuple[Protocol, ...] = ("udp", "tcp")
    """Of the tunnels to ``target`` that the gateway is asked for."""


class Gatherer:
    """One run."""

    def __init__(
        self, network: Network, questions: Questions, unix_clock: Callable[[], float]
    ) -> None:
        self._network = network
        self._questions = questions
        self._unix_clock = unix_clock
        self.evidence = Evidence()

    async def run(self) -> Evidence:
        """Ask everything; what has come after ``TOTAL_S``."""
        loop = asyncio.get_running_loop()
        login = loop.create_task(self._log_in())
        login_ends_at = loop.time() + LOGIN_S
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TOTAL_S):
                    if await self._look_up():
                        await self._ask_everything(login, login_ends_at)
        finally:
            # it has a deadline of its own, and then a moment to keep a token that was renewed
            await asyncio.wait({login})
        return self.evidence

    async def _ask_everything(self, login: asyncio.Task[None], login_ends_at: float) -> None:
        async with asyncio.TaskGroup() as together:
            together.create_task(self._probe_path())
            together.create_task(self._fetch_certificate())
            if self._questions.asks_gateway and await self._has_token(login, login_ends_at):
                together.create_task(self._ping())
                together.create_task(self._use_tunnel())

    # who and where

    async def _has_token(self, login: asyncio.Task[None], login_ends_at: float) -> bool:
        left_s = max(0.0, login_ends_at - asyncio.get_running_loop().time())
        await asyncio.wait({login}, timeout=left_s)
        if not login.done():  # it ends beside the other questions
            self.evidence.login_trouble = _SILENT_PROVIDER
        return self.evidence.login_trouble is None

    async def _log_in(self) -> None:
        evidence = self.evidence
        evidence.token = self._questions.settings.authorization
        if not self._questions.has_login:
            return
        try:
            async with asyncio.timeout(LOGIN_S):
                evidence.token = await self._network.log_in()
        except TimeoutError:
            evidence.login_trouble = _SILENT_PROVIDER
        except (LoginRequiredError, OidcError, TokenCacheError) as error:
            evidence.login_trouble = Trouble(str(error))
        else:
            evidence.is_logged_in = True

    async def _look_up(self) -> bool:
        settings, evidence = self._questions.settings, self.evidence
        try:
            async with asyncio.timeout(LOOKUP_S):
                evidence.addresses = await self._network.look_up(settings.host, settings.port)
        except TimeoutError:
            evidence.lookup_trouble = Trouble("no answer in time", is_timeout=True)
        except NameLookupError as error:
            evidence.lookup_trouble = Trouble(str(error))
        return bool(evidence.addresses)

    @property
    def _settings(self) -> GatewaySettings:
        return replace(self._questions.settings, authorization=self.evidence.token)

    # below QUIC

    async def _probe_path(self) -> None:
        evidence = self.evidence
        own = self._questions.settings.initial_packet_bytes
        sizes = sorted({*PROBE_SIZES, own})
        await self._network.probe_path(evidence.addresses, sizes, evidence.path)
        evidence.has_probed_path = True
        silent = [
            each.address
            for each in evidence.path
            if not (each.round_trips_s or each.is_refused or each.error)
        ]
        if silent and not evidence.answers_udp:
            try:
                async with asyncio.timeout(TCP_TIMEOUT_S):
                    evidence.tcp = await self._network.probe_tcp(silent[0])
            except TimeoutError:
                evidence.tcp = TcpAnswer.SILENT

    async def _fetch_certificate(self) -> None:
        evidence = self.evidence
        name = self._questions.settings.server_name
        with contextlib.suppress(TimeoutError, ProbeError):  # seen by the others, too
            async with asyncio.timeout(CERTIFICATE_TIMEOUT_S):
                evidence.chain = await self._network.fetch_certificate(evidence.addresses, name)

    # the gateway

    @contextlib.asynccontextmanager
    async def _probe(self, alpn_protocol: str) -> AsyncIterator[Probe]:
        addresses = self.evidence.addresses
        async with self._network.open_probe(self._settings, addresses, alpn_protocol) as probe:
            yield probe

    async def _ping(self) -> None:
        ping: PingEvidence = self.evidence.ping

        async def ask() -> None:
            async with self._probe(PING_ALPN) as probe:
                ping.address, ping.handshake_s = await probe.connect()
                ping.answer = await probe.ping()

        ping.trouble = await _within(PING_TIMEOUT_S, ask())

    async def _use_tunnel(self) -> None:
        seen: TunnelEvidence = self.evidence.tunnel
        settings = self._questions.settings
        template = f"https://{Target(settings.host, settings.port)}{DEFAULT_TEMPLATE_PATH}"
        seen.has_begun = True
        try:
            probe = self._network.open_probe(self._settings, self.evidence.addresses, H3_ALPN)
        except ConfigError as error:
            seen.trouble = Trouble(str(error), is_refusal=True)
            return
        async with probe:
            tunnels: list[ProbeTunnel] = []

            async def open_tunnel() -> None:
                await probe.connect()
                tunnel = await probe.request_udp(template, ECHO_TARGET)
                seen.facts, seen.facts_at = tunnel.facts, self._unix_clock()
                seen.status, seen.is_open = tunnel.status, tunnel.is_open
                seen.local_port = probe.local_port
                if not tunnel.is_open:
                    raise ProbeRefusedError(f"refused with {tunnel.explanation}")
                tunnels.append(tunnel)

            seen.trouble = await _within(CONNECT_UDP_TIMEOUT_S, open_tunnel())
            if not tunnels:
                return
            async with asyncio.TaskGroup() as together:
                if self._questions.target is not None:
                    together.create_task(self._ask_for_target(probe, self._questions.target))
                together.create_task(self._use_echo(probe, tunnels[0]))
            with contextlib.suppress(ProbeError, TimeoutError):
                async with asyncio.timeout(_AGAIN_TIMEOUT_S):
                    again = await probe.request_udp(template, ECHO_TARGET)
                    seen.facts_later = again.facts

    async def _use_echo(self, probe: Probe, tunnel: ProbeTunnel) -> None:
        seen = self.evidence.tunnel

        async def echo() -> None:
            seen.echo_s = await probe.echo(tunnel)

        seen.echo_trouble = await _within(ECHO_TIMEOUT_S, echo())
        if seen.echo_trouble is not None:
            return
        await self._measure_loss(tunnel)
        await self._measure_sizes(tunnel)
        seen.largest_up_bytes = probe.largest_payload_bytes

    async def _measure_loss(self, tunnel: ProbeTunnel) -> None:
        seen = self.evidence.tunnel
        clock = asyncio.get_running_loop().time
        sent_at: dict[int, float] = {}

        async def receive() -> None:
            while len(seen.round_trips_s) < ECHOES:
                payload, _ = await tunnel.receive()
                if len(payload) == len(_ECHO_MARK) + 4 and payload.startswith(_ECHO_MARK):
                    (number,) = struct.unpack(">I", payload[-4:])
                    if number in sent_at:
                        seen.round_trips_s.append(clock() - sent_at.pop(number))

        receiving = asyncio.ensure_future(receive())
        try:
            for number in range(ECHOES):
                sent_at[number] = clock()
                tunnel.send(_ECHO_MARK + struct.pack(">I", number))
                seen.echoes_sent += 1
                await asyncio.sleep(ECHO_INTERVAL_S)
            await asyncio.wait({receiving}, timeout=LAST_ECHO_S)
            seen.has_measured_loss = True
        finally:
            receiving.cancel()

    async def _measure_sizes(self, tunnel: ProbeTunnel) -> None:
        """Send payloads in capsules, which pass whatever the path carries to the gateway: how they
        come back tells what it carries from there.
        """
        seen = self.evidence.tunnel
        seen.sizes_sent = PAYLOAD_SIZES

        async def receive() -> None:
            while len(seen.came_back) < len(PAYLOAD_SIZES):
                payload, in_capsule = await tunnel.receive()
                if payload.startswith(_SIZE_MARK) and len(payload) in PAYLOAD_SIZES:
                    # one packet on any of the tries shows that the path carries it
                    seen.came_back[len(payload)] = (
                        seen.came_back.get(len(payload), False) or not in_capsule
                    )

        async def ask() -> None:
            while True:
                for size in PAYLOAD_SIZES:
                    if size not in seen.came_back:
                        tunnel.send_in_capsule(_SIZE_MARK.ljust(size, b"\0"))
                        await asyncio.sleep(_SIZE_INTERVAL_S)
                await asyncio.sleep(_SIZES_AGAIN_S)

        asking = asyncio.ensure_future(ask())
        receiving = asyncio.ensure_future(receive())
        try:
            await asyncio.wait({receiving}, timeout=SIZES_TIMEOUT_S)
            seen.has_measured_sizes = True
        finally:
            asking.cancel()
            receiving.cancel()

    async def _ask_for_target(self, probe: Probe, target: Target) -> None:
        settings = self._settings
        where = expand_template(settings.tcp_template, replace(target, protocol="tcp"))
        tcp_headers = connect_tcp.request_headers(*where, settings.authorization)

        def ask_by(protocol: str) -> Coroutine[Any, Any, ProbeTunnel]:
            if protocol == "tcp":
                return probe.request(tcp_headers)
            return probe.request_udp(settings.template, target)

        found = [TargetEvidence(protocol) for protocol in self._questions.protocols]
        self.evidence.tunnel.targets += found

        async def ask(each: TargetEvidence) -> None:
            async def request() -> None:
                tunnel = await ask_by(each.protocol)
                each.status, each.explanation = tunnel.status, tunnel.explanation
                each.rule = tunnel.proxy_status.rule if tunnel.proxy_status is not None else ""
                if tunnel.is_open:
                    probe.end(tunnel)

            each.trouble = await _within(TARGET_TIMEOUT_S, request())

        await asyncio.gather(*(ask(each) for each in found))


async def _within(deadline_s: float, question: Coroutine[Any, Any, None]) -> Trouble | None:
    """What went wrong, if anything did."""
    try:
        async with asyncio.timeout(deadline_s):
            await question
    except TimeoutError:
        return Trouble("no answer in time", is_timeout=True)
    except ProbeRefusedError as error:
        return Trouble(str(error), is_refusal=True)
    except ProbeError as error:
        return Trouble(str(error))
    except ConfigError as error:
        return Trouble(str(error), is_refusal=True)
    return None
