"""The gateway's configuration: ``gateway.toml`` and the environment (pure: text in, settings out).

Each field's description, unit and ``applies`` (``hot``, ``reload`` or ``restart``) make the
configuration reference.
"""

from __future__ import annotations

import ipaddress
import posixpath
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from toppy.config.address import parse_host_port
from toppy.config.audit import AuditSection
from toppy.config.authentication import AuthSection
from toppy.config.policy import PolicyRole, PolicyRule, name_rules
from toppy.config.rates import RatesSection
from toppy.config.reading import apply_environment, parse_toml, suggest, validate
from toppy.config.section import (
    CommaList,
    CongestionControl,
    Engine,
    Section,
    setting,
)
from toppy.config.tls import TlsSection
from toppy.errors import ConfigError

LogLevel = Literal["debug", "info", "warning", "error"]
MAX_WORKERS = 64


class ListenSection(Section):
    """Where the gateway listens."""

    quic: CommaList = setting(
        ("0.0.0.0:4433", "[::]:4433"),
        "UDP addresses of the QUIC port. One SO_REUSEPORT group each.",
    )
    health: str = setting("0.0.0.0:8080", "TCP address of `/healthz` and `/metrics`; empty: none.")
    steering: bool = setting(
        True,
        "Let the kernel bring packets to their worker (classic BPF). Off, or where the system "
        "cannot: workers hand them on, which costs time.",
    )
    socket_buffer_bytes: int = setting(
        8 << 20,
        "Asked for as receive and send buffer of each UDP socket; the kernel may give less "
        "(`net.core.rmem_max`).",
        ge=65536,
        le=1 << 30,
    )

    @field_validator("quic")
    @classmethod
    def _quic(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("at least one HOST:PORT is needed")
        for text in value:
            _check_numeric(text)
        addresses = [parse_host_port(text) for text in value]
        for text, (host, port) in zip(value, addresses, strict=True):
            # a second group on one address would join the first and take its packets
            same = [a for a in addresses if port and a[1] == port and _is_same(a[0], host)]
            if len(same) > 1:
                raise ValueError(f"{text!r} is there twice")
        return value

    @field_validator("health")
    @classmethod
    def _health(cls, value: str) -> str:
        if value:
            _check_numeric(value)
        return value


def _check_numeric(text: str) -> None:
    host, _ = parse_host_port(text)
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        raise ValueError(f"{text!r}: write an address, not a name, such as 0.0.0.0:4433") from None


def _is_same(host: str, other: str) -> bool:
    return ipaddress.ip_address(host) == ipaddress.ip_address(other)


class PolicySection(Section):
    """A `deny` rule that matches wins; else the first `allow` rule that does; else it is denied."""

    rules: tuple[PolicyRule, ...] = setting((), "See below.", applies="hot")
    roles: tuple[PolicyRole, ...] = setting((), "See below.", applies="hot")

    @field_validator("rules")
    @classmethod
    def _named(cls, value: tuple[PolicyRule, ...]) -> tuple[PolicyRule, ...]:
        return name_rules(value)


class QuicSection(Section):
    """The QUIC engine and its path."""

    engine: Engine = setting(
        "auto",
        "`native` (fast, where it was built), `aioquic` (portable), `auto`: the best.",
        applies="reload",
    )
    congestion_control: CongestionControl = setting(
        "bbr",
        "How sending adapts to the path; aioquic has no `bbr` and uses `cubic` for it.",
        applies="reload",
    )
    idle_timeout_s: float = setting(
        30.0, "A connection that is silent for so long is closed.", ge=1, le=3600, applies="reload"
    )
    initial_packet_bytes: int = setting(
        1350,
        "UDP payload of the first packets, which every path must carry: 1,232 where IPv6 has an "
        "MTU of 1,280. Below 1,280 an inner QUIC handshake does not fit.",
        ge=1200,
        le=9000,
        applies="reload",
    )
    max_packet_bytes: int = setting(
        1452,
        "Upper bound of path MTU discovery (native engine).",
        ge=1200,
        le=65527,
        applies="reload",
    )
    gso: bool = setting(
        True, "Send in batches (UDP_SEGMENT); switches itself off where refused.", applies="reload"
    )
    gro: bool = setting(True, "Receive in batches (UDP_GRO).", applies="reload")
    session_resumption: bool = setting(
        True,
        "A client that comes back within six hours skips the certificate, at every worker (native "
        "engine). Never 0-RTT.",
        applies="reload",
    )

    @model_validator(mode="after")
    def _ordered(self) -> QuicSection:
        if self.max_packet_bytes < self.initial_packet_bytes:
            raise ValueError("max_packet_bytes must not be below initial_packet_bytes")
        return self


class LimitsSection(Section):
    """Bounds of each worker. Over a limit: an answer that says so, and a counter."""

    max_connections: int = setting(
        10_000, "Connections of one worker.", ge=1, le=1_000_000, applies="reload"
    )
    max_connections_per_source: int = setting(
        1_000,
        "Of one IPv4 address or one IPv6 /64, in one worker.",
        ge=1,
        le=1_000_000,
        applies="reload",
    )
    max_tunnels_per_connection: int = setting(
        1_000, "Beyond it: 429.", ge=1, le=100_000, applies="reload"
    )
    max_streams_per_connection: int = setting(
        1_024, "Request streams that a client may have open.", ge=1, le=100_000, applies="reload"
    )
    max_header_bytes: int = setting(
        16_384,
        "A request's header section, as RFC 9114 section 4.2.2 counts.",
        ge=1024,
        le=1 << 20,
        applies="reload",
    )
    tcp_idle_timeout_s: float = setting(
        7_200.0,
        "A TCP tunnel that carries nothing for so long is ended. A target that is gone is found by "
        "keep-alive after two minutes.",
        ge=1,
        le=604_800,
        applies="reload",
    )
    tcp_connect_timeout_s: float = setting(
        10.0,
        "How long a TCP target may take to answer, all its addresses together.",
        ge=0.1,
        le=120,
        applies="reload",
    )
    tcp_max_connecting: int = setting(
        2_000,
        "TCP targets that one worker waits for at once. Beyond it: 429. Each may take a descriptor "
        "for each of its addresses.",
        ge=1,
        le=100_000,
        applies="reload",
    )
    tcp_max_connecting_per_connection: int = setting(
        1_000,
        "The same for one client's connection, so that nobody takes all of them.",
        ge=1,
        le=100_000,
        applies="reload",
    )
    tunnel_idle_timeout_s: float = setting(
        120.0,
        "A tunnel without a datagram in either direction for so long is closed (RFC 9298 "
        "section 3.1 asks for two minutes at least).",
        ge=1,
        le=86_400,
        applies="reload",
    )
    handshake_timeout_s: float = setting(
        10.0, "From the first packet to the end of the handshake.", ge=0.5, le=60, applies="reload"
    )
    retry_threshold: int = setting(
        200,
        "Handshakes under way in a worker above which clients must prove their address (Retry).",
        ge=0,
        le=1_000_000,
        applies="reload",
    )
    admission_timeout_s: float = setting(
        10.0,
        "For authentication, policy and name resolution; beyond it: 504.",
        ge=1,
        le=60,
        applies="reload",
    )
    max_pending_admissions: int = setting(
        1_024,
        "Tunnels being opened in a worker; beyond it: 429.",
        ge=1,
        le=100_000,
        applies="reload",
    )
    max_failed_auth_per_connection: int = setting(
        10,
        "Refused credentials after which the connection is closed.",
        ge=1,
        le=10_000,
        applies="reload",
    )
    max_connection_attempts_per_source_per_s: int = setting(
        1_000,
        "New connections of one source in a second, in one worker; as many at once as "
        "`max_connections_per_source`, or as this, if that is more. Beyond it the source must "
        "prove its address (Retry), and may then open as many again; then it is refused. 0: no "
        "limit.",
        ge=0,
        le=1_000_000,
        applies="reload",
    )
    max_failed_auth_per_source_per_min: int = setting(
        60,
        "Refused credentials of one source in a minute, in one worker, and as many at once. "
        "Beyond it: 429 for it, except for credentials that the worker has just seen to be good. "
        "0: no limit.",
        ge=0,
        le=1_000_000,
        applies="reload",
    )
    max_tunnels_per_subject_per_s: int = setting(
        5_000,
        "Tunnels that one subject may open in a second, and twice as many at once, at all workers "
        "together. Beyond it: 429. 0: no limit.",
        ge=0,
        le=1_000_000,
        applies="reload",
    )
    early_datagrams_per_tunnel: int = setting(
        64, "Datagrams held while their tunnel is being opened.", ge=0, le=10_000, applies="reload"
    )
    early_bytes_per_tunnel: int = setting(
        131_072, "The same in bytes.", ge=0, le=1 << 24, applies="reload"
    )
    tunnel_queue_bytes: int = setting(
        1 << 20,
        "Datagrams waiting to be sent to the client, per tunnel.",
        ge=65_536,
        le=1 << 28,
        applies="reload",
    )
    connection_queue_bytes: int = setting(
        8 << 20, "The same per connection.", ge=65_536, le=1 << 30, applies="reload"
    )

    @model_validator(mode="after")
    def _ordered(self) -> LimitsSection:
        if self.connection_queue_bytes < self.tunnel_queue_bytes:
            raise ValueError("connection_queue_bytes must not be below tunnel_queue_bytes")
        return self


class ReloadSection(Section):
    """How one generation of workers follows another; see `docs/reload.md`."""

    drain_timeout_s: float = setting(
        3600.0,
        "How long an earlier generation goes on for tunnels that do not move by themselves; then "
        "they are closed. 0: for as long as they want.",
        ge=0,
        le=30 * 86_400,
        applies="reload",
    )
    when_full: Literal["fail", "wait"] = setting(
        "fail",
        "A reload while earlier generations still hold every slot: refuse it, or wait for one to "
        "end, ten minutes at most.",
        applies="reload",
    )
    generations: int = setting(
        4, "Generations that may run at once, the serving one included.", ge=2, le=16
    )
    orphan_timeout_s: float = setting(
        600.0,
        "How long workers go on when the control plane is gone and none takes over. 0: for ever.",
        ge=0,
        le=30 * 86_400,
        applies="reload",
    )


class ResolverSection(Section):
    """Name resolution of targets, at the gateway."""

    nameservers: CommaList = setting(
        (), "`IP` or `IP:PORT`; empty: the system's (`/etc/resolv.conf`).", applies="hot"
    )
    timeout_s: float = setting(
        3.0, "For one name, all servers together.", gt=0, le=30, applies="hot"
    )

    @field_validator("nameservers")
    @classmethod
    def _addresses(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            try:
                ipaddress.ip_address(text)
            except ValueError:
                _check_numeric(text)
        return value


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


class LogSection(Section):
    """Logs on standard error."""

    level: Annotated[LogLevel, BeforeValidator(_lower)] = setting(
        "info", "What is worth a line.", applies="hot"
    )
    format: Literal["auto", "console", "json"] = setting(
        "auto", "`auto`: for people on a terminal, JSON otherwise.", applies="reload"
    )


def _parse_workers(value: Any) -> Any:
    text = str(value)
    if text == "auto":
        return value
    if not re.fullmatch("[0-9]{1,3}", text) or not 1 <= int(text) <= MAX_WORKERS:
        raise ValueError(f"must be 'auto' or a number from 1 to {MAX_WORKERS}")
    return int(text)


class GatewayConfig(Section):
    """``gateway.toml``."""

    workers: Annotated[int | Literal["auto"], BeforeValidator(_parse_workers)] = setting(
        "auto", "Data-plane processes, 1 to 64; `auto`: one per core.", applies="reload"
    )
    pin_workers: bool = setting(
        False,
        "Keep each worker on one core, in turn, of those that the gateway may use. Helps where "
        "they are not shared with much else.",
        applies="reload",
    )
    runtime_dir: str = setting(
        "/run/toppy-gw", "Unix sockets and the lock; mode 0700. Relative to this file."
    )
    name: str = setting(
        "toppy-gw", "How answers (Proxy-Status) call this gateway.", applies="reload"
    )
    insecure_no_auth: bool = setting(
        False, "Serve without authentication; only on loopback addresses.", applies="hot"
    )
    listen: ListenSection = Field(default_factory=ListenSection)
    tls: TlsSection = Field(default_factory=TlsSection)
    auth: AuthSection = Field(default_factory=AuthSection)
    policy: PolicySection = Field(default_factory=PolicySection)
    quic: QuicSection = Field(default_factory=QuicSection)
    limits: LimitsSection = Field(default_factory=LimitsSection)
    rates: RatesSection = Field(default_factory=RatesSection)
    reload: ReloadSection = Field(default_factory=ReloadSection)
    resolver: ResolverSection = Field(default_factory=ResolverSection)
    log: LogSection = Field(default_factory=LogSection)
    audit: AuditSection = Field(default_factory=AuditSection)

    @property
    def worker_count(self) -> int:
        """Data-plane processes, once ``auto`` has become a number."""
        return self.workers if isinstance(self.workers, int) else 1

    @field_validator("name")
    @classmethod
    def _token(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z*][A-Za-z0-9:/!#$%&'*+.^_`|~-]{0,62}", value):
            raise ValueError("must be a token of RFC 8941: letters, digits, - . _")
        return value

    @field_validator("runtime_dir")
    @classmethod
    def _not_empty(cls, value: str) -> str:
        if not value:
            raise ValueError("must name a directory")
        return value

    @model_validator(mode="after")
    def _safe(self) -> GatewayConfig:
        self.check_client_certificates()
        self.check_authentication()
        self._check_certificate_subjects()
        return self

    def _check_certificate_subjects(self) -> None:
        """A deny rule for a name that nobody has would deny nobody. Raises ``ValueError``."""
        if self.auth.client_certificate.name_from != "san":
            return
        subjects = [subject for rule in self.policy.rules for subject in rule.subjects]
        subjects += [subject for role in self.policy.roles for subject in role.subjects]
        for subject in subjects:
            is_host_name = "@" not in subject and subject.count(":") == 1
            if subject.startswith("cert:") and is_host_name and subject != subject.lower():
                raise ValueError(
                    f"policy: subjects = {subject!r} matches nobody, for host names in "
                    f"certificates are read in lower case; write {subject.lower()!r}"
                )

    def check_client_certificates(self) -> None:
        """What is a credential must be asked for. Raises ``ValueError``."""
        if self.auth.client_certificate.accept and self.tls.wanted_client_certificates == "none":
            raise ValueError(
                "auth.client_certificate.accept = true, but no client is asked for a certificate: "
                "set tls.client_ca"
            )

    def check_authentication(self) -> None:
        """Who comes from elsewhere must prove who they are. Raises ``ValueError``."""
        if not self.insecure_no_auth:
            if self.auth.is_configured:
                return
            raise ValueError(
                "no authentication is configured: set auth.token_file, [auth.jwt], "
                "[auth.oidc] or [auth.client_certificate] "
                "(or TOPPY_GW_TOKEN), or insecure_no_auth = true on loopback addresses"
            )
        for text in self.listen.quic:
            host, _ = parse_host_port(text)
            if not ipaddress.ip_address(host.partition("%")[0]).is_loopback:
                raise ValueError(
                    f"insecure_no_auth = true is refused on {text}: without authentication the "
                    "gateway listens on loopback addresses only"
                )


ENVIRONMENT: Mapping[str, str] = {
    "TOPPY_GW_LISTEN": "listen.health",
    "TOPPY_GW_QUIC_LISTEN": "listen.quic",
    "TOPPY_GW_CERT": "tls.certificate",
    "TOPPY_GW_KEY": "tls.private_key",
    "TOPPY_GW_TLS_ENABLED": "tls.enabled",
    "TOPPY_GW_TLS_CERT_PATH": "tls.certificate",
    "TOPPY_GW_TLS_KEY_PATH": "tls.private_key",
    "TOPPY_GW_TLS_PASSPHRASE": "tls.private_key_passphrase",
    "TOPPY_GW_TLS_KEY_PASSPHRASE_FILE": "tls.private_key_passphrase_file",
    "TOPPY_GW_TLS_ALLOW_OPEN_KEY": "tls.allow_open_private_key",
    "TOPPY_GW_TLS_CA_PATH": "tls.client_ca",
    "TOPPY_GW_TLS_CLIENT_CERTIFICATES": "tls.client_certificates",
    "TOPPY_GW_TLS_MIN_VERSION": "tls.min_version",
    "TOPPY_GW_TLS_CIPHER_SUITES": "tls.cipher_suites",
    "TOPPY_GW_TOKEN": "auth.token",
    "TOPPY_GW_JWT_SECRET": "auth.jwt.secret",
    "TOPPY_GW_JWT_ISS": "auth.jwt.issuer",
    "TOPPY_GW_JWT_AUD": "auth.jwt.audience",
    "TOPPY_GW_LOG_LEVEL": "log.level",
    "TOPPY_GW_RUNTIME_DIR": "runtime_dir",
    "TOPPY_GW_UDP_BYTES_PER_SEC": "rates.udp_bytes_per_sec",
    "TOPPY_GW_UDP_BURST_BYTES": "rates.udp_burst_bytes",
    "TOPPY_GW_AUDIT_LOG": "audit.path",
    "TOPPY_GW_AUDIT_SIGNING_KEY": "audit.signing_key",
    "TOPPY_GW_AUDIT_SHIP_URL": "audit.ship_url",
    "TOPPY_GW_AUDIT_SHIP_TOKEN": "audit.ship_token",
    "TOPPY_QUIC_ENGINE": "quic.engine",
}
"""Which key each variable overrides."""
_OTHER_VARIABLES = ("TOPPY_GW_CONFIG",)
_CERTIFICATE = ("TOPPY_GW_CERT", "TOPPY_GW_TLS_CERT_PATH")
_PRIVATE_KEY = ("TOPPY_GW_KEY", "TOPPY_GW_TLS_KEY_PATH")
"""Two names for the same."""
_PASSPHRASES = ("TOPPY_GW_TLS_PASSPHRASE", "TOPPY_GW_TLS_KEY_PASSPHRASE_FILE")


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """A configuration, and what should be said about it."""

    config: GatewayConfig
    warnings: tuple[str, ...]
    variables: Mapping[str, str] = field(default_factory=dict)
    """By key, the environment variables that set a value."""


def parse_gateway_config(text: str, source: str, environ: Mapping[str, str]) -> LoadedConfig:
    """Validate a ``gateway.toml`` (may be empty) under the environment. Raises ``ConfigError``."""
    data = parse_toml(text, source)
    is_given = [_one_of(environ, names) for names in (_CERTIFICATE, _PRIVATE_KEY)]
    if is_given[0] != is_given[1]:
        raise ConfigError(
            "TOPPY_GW_CERT and TOPPY_GW_KEY go together: set both or neither",
            key="tls.certificate",
        )
    _replace_files(data, environ)
    variables = apply_environment(data, environ, ENVIRONMENT)
    config = validate(GatewayConfig, data, text, source, variables)
    known = [*ENVIRONMENT, *_OTHER_VARIABLES]
    warnings = [
        f"environment variable {name} is not known{suggest(name, known)}"
        for name in sorted(environ)
        if name.startswith("TOPPY_GW_") and name not in known
    ]
    if config.insecure_no_auth and config.auth.is_configured:
        warnings.append("insecure_no_auth has no effect: authentication is configured")
    return LoadedConfig(config, tuple(warnings), variables)


def _one_of(environ: Mapping[str, str], names: tuple[str, ...]) -> bool:
    """Whether one of the names for a value is set. Raises ``ConfigError`` for several values."""
    values = {environ[name] for name in names if environ.get(name)}
    if len(values) > 1:
        raise ConfigError(
            f"{' and '.join(names)} have different values: set one of them",
            key=ENVIRONMENT[names[0]],
        )
    return bool(values)


def _replace_files(data: dict[str, Any], environ: Mapping[str, str]) -> None:
    """A secret in the environment stands in the place of the file's, however that was given."""
    tls = data.get("tls")
    if isinstance(tls, dict):
        # a key of another place has a passphrase of its own, or none
        names = (*_PRIVATE_KEY, *_PASSPHRASES)
        if any(environ.get(name) for name in names):
            tls.pop("private_key_passphrase", None)
            tls.pop("private_key_passphrase_file", None)
    audit = data.get("audit")
    if isinstance(audit, dict):
        for name in ("signing_key", "ship_token"):
            if environ.get(f"TOPPY_GW_AUDIT_{name.upper()}"):
                audit.pop(f"{name}_file", None)
    auth = data.get("auth")
    if not isinstance(auth, dict):
        return
    if environ.get("TOPPY_GW_TOKEN"):
        auth.pop("token_file", None)
    jwt = auth.get("jwt")
    if environ.get("TOPPY_GW_JWT_SECRET") and isinstance(jwt, dict):
        jwt.pop("secret_file", None)


def resolve_path(base_dir: str, value: str) -> str:
    """A path from the configuration: relative ones begin at the configuration file's folder."""
    return value if posixpath.isabs(value) else posixpath.join(base_dir, value)
