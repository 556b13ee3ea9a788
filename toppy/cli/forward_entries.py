"""A local port of ``toppy up`` or ``toppy udp`` while it runs: what it serves and records."""

from __future__ import annotations

import socket
from abc import ABC, abstractmethod
from dataclasses import dataclass

from toppy.cli.output import TcpTraffic, Traffic, summarize, summarize_tcp
from toppy.cli.session_shell import Notices
from toppy.client.audit import ClientAudit
from toppy.client.session import GatewaySession
from toppy.client.tcp_forward import FarSide, TcpForward
from toppy.client.tunnel import Refusal
from toppy.client.udp_forward import UdpForward
from toppy.config.client import ClientConfig
from toppy.errors import ConfigError, DeniedError, TargetError, ToppyError
from toppy.model.audit_event import AuditAction
from toppy.model.target import Protocol, Target
from toppy.net.tcp import listen_tcp
from toppy.net.udp_socket import UdpSocket, bind_udp

_FORBIDDEN = 403
_UDP_BUFFER_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Wanted:
    """A local port that somebody asked for."""

    listen: tuple[str, int]
    target: Target
    is_direct: bool = False

    @property
    def protocol(self) -> Protocol:
        """Of port and target."""
        return self.target.protocol


class Entry(ABC):
    """A local port that is bound. ``start`` on the event loop, then ``serve`` until cancelled."""

    def __init__(self, wanted: Wanted, listen: str) -> None:
        self.wanted = wanted
        self.listen = listen
        """The address it has, ``HOST:PORT``."""

    @property
    def target(self) -> str:
        """Where it leads, ``HOST:PORT``."""
        return str(self.wanted.target)

    @property
    @abstractmethod
    def action(self) -> AuditAction:
        """That it was started."""

    @abstractmethod
    async def serve(self, *, is_once: bool) -> bool:
        """Until cancelled, or with ``is_once`` for one connection: whether all went well."""

    @abstractmethod
    def summary(self) -> str:
        """What went through."""

    @abstractmethod
    def record_end(self, audit: ClientAudit, reason: str, duration_s: float) -> None:
        """Into the audit log."""

    @abstractmethod
    def close(self) -> None:
        """Free the port."""


class TcpEntry(Entry):
    """Connections to one target."""

    def __init__(self, wanted: Wanted, local: socket.socket) -> None:
        super().__init__(wanted, str(Target(*local.getsockname()[:2])))
        self._local = local
        self._forward: TcpForward | None = None
        self._far: FarSide | None = None
        self._notices: Notices | None = None

    @property
    def action(self) -> AuditAction:
        """See ``Entry``."""
        return AuditAction.UP

    def start(self, far: FarSide, config: ClientConfig, notices: Notices) -> None:
        """On the event loop; ``far`` is closed at the end."""
        self._far = far
        self._notices = notices
        self._forward = TcpForward(
            self._local,
            far,
            max_connections=config.tcp_max_connections,
            on_refused=self._on_refused,
            on_problem=lambda peer, problem: notices.on_reset(self.target, problem, peer=peer),
        )

    def _on_refused(self, peer: str, error: ToppyError) -> None:
        assert self._notices is not None
        status = error.status if isinstance(error, TargetError) else 0
        if isinstance(error, DeniedError):
            status = _FORBIDDEN
            self._notices.record_once(
                AuditAction.UP_REFUSED, self.target, allowed=False, reason=str(error)
            )
        self._notices.on_refused(
            self.target, str(error), peer=peer, status=0 if self.wanted.is_direct else status
        )

    async def serve(self, *, is_once: bool) -> bool:
        """See ``Entry``."""
        assert self._forward is not None
        assert self._far is not None
        try:
            if is_once:
                return await self._forward.run_once()
            await self._forward.run()
        finally:
            self._far.close()
        return True

    @property
    def traffic(self) -> TcpTraffic:
        """Until now."""
        if self._forward is None:
            return TcpTraffic()
        counters = self._forward.counters
        return TcpTraffic(
            open=self._forward.connections,
            connections=counters.connections,
            failures=counters.failures,
            out_bytes=counters.to_target,
            back_bytes=counters.to_client,
        )

    def summary(self) -> str:
        """See ``Entry``."""
        return summarize_tcp(self.traffic)

    def record_end(self, audit: ClientAudit, reason: str, duration_s: float) -> None:
        """See ``Entry``."""
        traffic = self.traffic
        audit.record(
            AuditAction.UP_CLOSED,
            self.target,
            allowed=True,
            reason=reason,
            duration_s=duration_s,
            connections=traffic.connections,
            failures=traffic.failures,
            bytes_out=traffic.out_bytes,
            bytes_in=traffic.back_bytes,
        )

    def close(self) -> None:
        """See ``Entry``."""
        self._local.close()


class UdpEntry(Entry):
    """Datagrams to one target."""

    def __init__(self, wanted: Wanted, local: UdpSocket) -> None:
        super().__init__(wanted, str(Target(*local.local_address)))
        self._local = local
        self._forward: UdpForward | None = None
        self._session: GatewaySession | None = None
        self._notices: Notices | None = None

    @property
    def action(self) -> AuditAction:
        """See ``Entry``."""
        return AuditAction.UDP

    def start(
        self,
        session: GatewaySession,
        config: ClientConfig,
        notices: Notices,
        *,
        counts_session: bool,
    ) -> None:
        """On the event loop. ``counts_session``: no other entry sends datagrams, so that what the
        session drops is this one's.
        """
        self._notices = notices
        self._session = session if counts_session else None
        self._forward = UdpForward(
            session,
            self._local,
            self.wanted.target,
            max_peers=config.udp_max_peers,
            idle_timeout_s=config.udp_idle_s,
            rate=config.udp_rate,
            on_refused=self._on_refused,
        )

    def _on_refused(self, refusal: Refusal) -> None:
        assert self._notices is not None
        self._notices.record_once(
            AuditAction.UDP_REFUSED,
            self.target,
            allowed=False,
            reason=refusal.explanation,
            status=refusal.status,
        )
        self._notices.on_refused(
            self.target, f"refused: {refusal.explanation}", status=refusal.status
        )

    async def serve(self, *, is_once: bool) -> bool:
        """See ``Entry``."""
        del is_once
        assert self._forward is not None
        await self._forward.run()
        return True

    @property
    def traffic(self) -> Traffic:
        """Until now."""
        forward = self._forward
        if forward is None:
            return Traffic()
        counters = forward.counters
        drops: dict[str, int] = {}
        for source in (forward.drops, self._session.drops if self._session is not None else {}):
            for reason, count in source.items():
                drops[reason.value] = drops.get(reason.value, 0) + count
        return Traffic(
            peers=forward.peers,
            peers_total=counters.peers_total,
            out=counters.from_peers,
            out_bytes=counters.from_peers_bytes,
            back=counters.to_peers,
            back_bytes=counters.to_peers_bytes,
            drops=drops,
        )

    def summary(self) -> str:
        """See ``Entry``."""
        return summarize(self.traffic)

    def record_end(self, audit: ClientAudit, reason: str, duration_s: float) -> None:
        """See ``Entry``."""
        traffic = self.traffic
        audit.record(
            AuditAction.UDP_CLOSED,
            self.target,
            allowed=True,
            reason=reason,
            duration_s=duration_s,
            peers=traffic.peers_total,
            datagrams_out=traffic.out,
            bytes_out=traffic.out_bytes,
            datagrams_in=traffic.back,
            bytes_in=traffic.back_bytes,
            drops=traffic.dropped,
        )

    def close(self) -> None:
        """See ``Entry``."""
        self._local.close()


def bind(wanted: Wanted) -> TcpEntry | UdpEntry:
    """Take a local port. Raises ``ConfigError``."""
    host, port = wanted.listen
    try:
        if wanted.protocol == "tcp":
            return TcpEntry(wanted, listen_tcp(host, port))
        local = bind_udp(host, port, buffer_bytes=_UDP_BUFFER_BYTES, may_fragment=True)
        return UdpEntry(wanted, UdpSocket(local))
    except OSError as error:
        raise ConfigError(
            f"--listen: cannot listen on {Target(host, port)}: {error.strerror or error}; choose "
            "an address of this host and a free port"
        ) from None
