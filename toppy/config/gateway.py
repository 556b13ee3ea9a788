"""The gateway's configuration: ``gateway.toml`` and the environment (pure: text in, settings out).

Each field's description, unit and ``applies`` (``hot``, ``reload`` or ``restart``) make the
configuration reference.
"""

from __future__ import annotations

import ipaddress
import posixpath
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SecretStr, field_validator, model_validator

from toppy.config.address import parse_host_port
from toppy.config.audit import AuditSection
from toppy.config.policy import PolicyRule, name_rules
from toppy.config.reading import apply_environment, parse_toml, suggest, validate
from toppy.config.section import (
    CommaList,
    CongestionControl,
    Engine,
    Section,
    check_token,
    setting,
)
from toppy.errors import ConfigError

LogLevel = Literal["debug", "info", "warning", "error"]
JwtAlgorithm = Literal[
    "HS256",
    "HS384",
    "HS512",
    "RS256",
    "RS384",
    "RS512",
    "PS256",
    "PS384",
    "PS512",
    "ES256",
    "ES384",
    "ES512",
    "EdDSA",
]
MAX_WORKERS = 64
MIN_TOKEN_CHARACTERS = 8
MIN_SECRET_BYTES = 16


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


class TlsSection(Section):
    """The gateway's certificate. Without one: self-signed for localhost, made at start."""

    certificate: str = setting("", "PEM file: the certificate, then its chain.", applies="reload")
    private_key: str = setting("", "PEM file: the certificate's key; mode 0600.", applies="reload")

    @model_validator(mode="after")
    def _both_or_neither(self) -> TlsSection:
        if bool(self.certificate) != bool(self.private_key):
            missing = "private_key" if self.certificate else "certificate"
            raise ValueError(f"certificate and private_key go together; {missing} is missing")
        return self


class JwtSection(Section):
    """JSON Web Tokens that the gateway accepts. `exp` is required in them."""

    secret: SecretStr | None = setting(
        None, "HMAC secret (HS256), at least 16 bytes.", applies="hot"
    )
    secret_file: str = setting("", "File with the HMAC secret; mode 0600.", applies="hot")
    public_key_file: str = setting("", "PEM public key: RSA, EC or Ed25519.", applies="hot")
    jwks_file: str = setting("", "JWK set with public keys, chosen by `kid`.", applies="hot")
    algorithms: tuple[JwtAlgorithm, ...] = setting(
        (),
        "Narrows what the keys allow, for example `['ES256']`. Empty: what fits the key.",
        applies="hot",
    )
    issuer: str = setting("", "Required `iss`; empty: any.", applies="hot")
    audience: str = setting("", "Required in `aud`; empty: any.", applies="hot")
    leeway_s: float = setting(
        60.0, "Clock difference allowed, in seconds.", ge=0, le=600, applies="hot"
    )

    @property
    def is_configured(self) -> bool:
        """Whether there is any key."""
        return bool(self.secret or self.secret_file or self.public_key_file or self.jwks_file)

    @field_validator("secret")
    @classmethod
    def _long_enough(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and len(value.get_secret_value().encode()) < MIN_SECRET_BYTES:
            raise ValueError(f"is too short: at least {MIN_SECRET_BYTES} bytes")
        return value

    @model_validator(mode="after")
    def _has_key(self) -> JwtSection:
        if self.secret is not None and self.secret_file:
            raise ValueError("give secret or secret_file, not both")
        if self.model_fields_set and not self.is_configured:
            raise ValueError("needs one of secret, secret_file, public_key_file, jwks_file")
        return self


class RoleSection(Section):
    """A claim of the issuer's tokens, and the role that it gives; rules name roles."""

    role: str = setting(..., "What rules call it (`roles`).", min_length=1, applies="hot")
    claim: str = setting(
        ...,
        "Of the token; `realm_access.roles` is `roles` in the table `realm_access`.",
        min_length=1,
        applies="hot",
    )
    values: CommaList = setting(
        ..., "The claim is, or has in its list, any of these.", min_length=1, applies="hot"
    )


class OidcSection(Section):
    """Access tokens (JWT) of an OpenID issuer. While it is down, the keys that are known serve."""

    issuer: str = setting(
        "", "Issuer URL, exactly as the provider writes it; https.", applies="hot"
    )
    audience: str = setting(
        "", "Required in `aud`: what the provider calls this gateway.", applies="hot"
    )
    leeway_s: float = setting(
        60.0, "Clock difference allowed, in seconds.", ge=0, le=600, applies="hot"
    )
    refresh_s: float = setting(
        300.0, "Keys are fetched so often, in seconds.", ge=10, le=86_400, applies="hot"
    )
    roles: tuple[RoleSection, ...] = setting((), "See below.", applies="hot")

    @property
    def is_configured(self) -> bool:
        """Whether there is an issuer."""
        return bool(self.issuer)

    @model_validator(mode="after")
    def _complete(self) -> OidcSection:
        if bool(self.issuer) != bool(self.audience):
            missing = "audience" if self.issuer else "issuer"
            raise ValueError(
                f"issuer and audience go together; {missing} is missing (without an audience, "
                "tokens that the issuer made for others would be taken)"
            )
        if not self.issuer and self.model_fields_set:
            raise ValueError("needs issuer and audience")
        if self.issuer and not re.fullmatch(
            r"https://[!-~]+|http://(localhost|127\.0\.0\.1|\[::1\])([:/][!-~]*)?", self.issuer
        ):
            raise ValueError("issuer: must begin with https:// (http:// only on loopback)")
        return self


class AuthSection(Section):
    """Who may use the gateway. Every method that is configured is accepted."""

    token: SecretStr | None = setting(None, "A shared token, at least 8 characters.", applies="hot")
    token_file: str = setting("", "File with the shared token; mode 0600.", applies="hot")
    jwt: JwtSection = Field(default_factory=JwtSection)
    oidc: OidcSection = Field(default_factory=OidcSection)

    @field_validator("token")
    @classmethod
    def _sendable(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            check_token(value.get_secret_value(), min_characters=MIN_TOKEN_CHARACTERS)
        return value

    @model_validator(mode="after")
    def _one_token(self) -> AuthSection:
        if self.token is not None and self.token_file:
            raise ValueError("give token or token_file, not both")
        return self

    @property
    def is_configured(self) -> bool:
        """Whether anybody must prove anything."""
        return bool(
            self.token or self.token_file or self.jwt.is_configured or self.oidc.is_configured
        )


class PolicySection(Section):
    """Ordered rules; the first that matches decides; what no rule allows is denied."""

    rules: tuple[PolicyRule, ...] = setting((), "See below.", applies="hot")

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
        self.check_authentication()
        return self

    def check_authentication(self) -> None:
        """Who comes from elsewhere must prove who they are. Raises ``ValueError``."""
        if not self.insecure_no_auth:
            if self.auth.is_configured:
                return
            raise ValueError(
                "no authentication is configured: set auth.token_file, [auth.jwt] or "
                "[auth.oidc] "
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
    "TOPPY_GW_TOKEN": "auth.token",
    "TOPPY_GW_JWT_SECRET": "auth.jwt.secret",
    "TOPPY_GW_JWT_ISS": "auth.jwt.issuer",
    "TOPPY_GW_JWT_AUD": "auth.jwt.audience",
    "TOPPY_GW_LOG_LEVEL": "log.level",
    "TOPPY_GW_RUNTIME_DIR": "runtime_dir",
    "TOPPY_GW_AUDIT_LOG": "audit.path",
    "TOPPY_GW_AUDIT_SIGNING_KEY": "audit.signing_key",
    "TOPPY_GW_AUDIT_SHIP_URL": "audit.ship_url",
    "TOPPY_GW_AUDIT_SHIP_TOKEN": "audit.ship_token",
    "TOPPY_QUIC_ENGINE": "quic.engine",
}
"""Which key each variable overrides."""
_OTHER_VARIABLES = ("TOPPY_GW_CONFIG",)


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """A configuration, and what should be said about it."""

    config: GatewayConfig
    warnings: tuple[str, ...]


def parse_gateway_config(text: str, source: str, environ: Mapping[str, str]) -> LoadedConfig:
    """Validate a ``gateway.toml`` (may be empty) under the environment. Raises ``ConfigError``."""
    data = parse_toml(text, source)
    if bool(environ.get("TOPPY_GW_CERT")) != bool(environ.get("TOPPY_GW_KEY")):
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
    return LoadedConfig(config, tuple(warnings))


def _replace_files(data: dict[str, Any], environ: Mapping[str, str]) -> None:
    """A secret in the environment stands in the place of the file's, however that was given."""
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
