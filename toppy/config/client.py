"""The client's configuration: ``~/.config/toppy/config.toml`` and the environment (pure)."""

from __future__ import annotations

import ipaddress
import posixpath
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, SecretStr, field_validator, model_validator

from toppy.config.address import parse_host_port, parse_listen_address
from toppy.config.audit import check_collector_url
from toppy.config.policy import Networks, PolicyRole, PolicyRule, name_rules
from toppy.config.reading import apply_environment, parse_toml, validate
from toppy.config.section import (
    CommaList,
    CongestionControl,
    Engine,
    Section,
    Table,
    check_token,
    setting,
)
from toppy.errors import ConfigError
from toppy.model.rate import UNLIMITED, Rate
from toppy.wire.connect_udp import RequestError, parse_host, validate_template
from toppy.wire.pac import encode_pac

_CIDR = (
    "Networks, compared with an address that was asked for, or with what a name resolves to here. "
    "Private and other special addresses are networks like all others: only the gateway's rules "
    "treat them apart."
)


class AllowRule(PolicyRule):
    """A rule of the client's policy: what is not allowed is denied."""

    cidr: Networks = Field((), description=_CIDR)

    action: Literal["allow", "deny"] = Field(
        "allow", description="`allow`; a `deny` rule is refused, it goes into `policy.deny`."
    )

    @model_validator(mode="after")
    def _complete(self) -> AllowRule:
        if self.action != "allow":
            raise ValueError("action: rules of policy.allow only allow; use [[policy.deny]]")
        if not self.cidr and not self.host:
            raise ValueError("needs cidr or host")
        if not self.ports:
            raise ValueError("needs ports; only listed ports are allowed")
        if self.limits is not None:
            raise ValueError("limits: for rules of the gateway; here [rate] limits each local peer")
        if self.proxy_protocol is not None:
            raise ValueError("proxy_protocol: for rules of the gateway, which reaches the target")
        return self


class DenyRule(PolicyRule):
    """A rule of the client's policy that wins over every one that allows."""

    cidr: Networks = Field((), description=_CIDR)

    action: Literal["allow", "deny"] = Field(
        "deny", description="`deny`; an `allow` rule is refused, it goes into `policy.allow`."
    )

    @model_validator(mode="after")
    def _denies(self) -> DenyRule:
        if self.action != "deny":
            raise ValueError("action: rules of policy.deny only deny; use [[policy.allow]]")
        return self


def _places(rules: tuple[PolicyRule, ...], table: str) -> list[str]:
    return [f"[[policy.{table}]] {number}" for number in range(1, len(rules) + 1)]


class ClientPolicy(Section):
    """What this client may ask for. Without it everything is denied."""

    allow: tuple[AllowRule, ...] = setting((), "Rules; any that matches allows.")
    deny: tuple[DenyRule, ...] = setting((), "Rules; any that matches denies, whatever allows.")
    roles: tuple[PolicyRole, ...] = setting((), "Roles that rules here may name.")

    @field_validator("allow")
    @classmethod
    def _named(cls, value: tuple[AllowRule, ...]) -> tuple[AllowRule, ...]:
        return name_rules(value, places=_places(value, "allow"))

    @field_validator("deny")
    @classmethod
    def _named_deny(cls, value: tuple[DenyRule, ...]) -> tuple[DenyRule, ...]:
        return name_rules(value, "deny")

    @model_validator(mode="after")
    def _named_apart(self) -> ClientPolicy:
        _ = self.rules  # two of the same name are refused
        return self

    @property
    def rules(self) -> tuple[PolicyRule, ...]:
        """All of them."""
        places = _places(self.allow, "allow") + _places(self.deny, "deny")
        return name_rules((*self.allow, *self.deny), places=places)


class TokenAuth(Table):
    """A token that the operator handed out."""

    mode: Literal["token"]
    token: SecretStr = setting(..., "The bearer token.")

    @field_validator("token")
    @classmethod
    def _sendable(cls, value: SecretStr) -> SecretStr:
        check_token(value.get_secret_value())
        return value


TokenProtection = Literal["auto", "device", "keyring", "passphrase"]


def _protection() -> Any:
    return setting(
        "auto",
        "What encrypts the kept tokens: `device` (a key in a file of this machine's), `keyring` "
        "(a key in the desktop's), `passphrase` (asked for, or `TOPPY_TOKEN_PASSPHRASE`); `auto`: "
        "the keyring where there is one, else `device`.",
    )


class OidcDeviceCodeAuth(Table):
    """OIDC device authorization (RFC 8628): `toppy login` shows a code and an address."""

    mode: Literal["oidc_device_code"]
    issuer: str = setting(..., "The provider's issuer URL.", min_length=1)
    client_id: str = setting(..., "This client's ID there.", min_length=1)
    audience: str | None = setting(None, "Asked for in the token.", min_length=1)
    scope: str = setting("openid offline_access", "Scopes, separated by spaces.", min_length=1)
    token_cache_path: str | None = setting(None, "Where tokens are kept.", min_length=1)
    token_protection: TokenProtection = _protection()


class OidcAuthCodePkceAuth(Table):
    """OIDC authorization code with PKCE: `toppy login` opens the browser."""

    mode: Literal["oidc_auth_code_pkce"]
    issuer: str = setting(..., "The provider's issuer URL.", min_length=1)
    client_id: str = setting(..., "This client's ID there.", min_length=1)
    audience: str | None = setting(None, "Asked for in the token.", min_length=1)
    scope: str = setting("openid offline_access", "Scopes, separated by spaces.", min_length=1)
    redirect_uri: str = setting(
        "http://127.0.0.1:8080/callback",
        "Where the browser is sent back to: a loopback address; port 0 takes any free one, for "
        "providers that allow it (RFC 8252).",
        min_length=1,
    )
    token_cache_path: str | None = setting(None, "Where tokens are kept.", min_length=1)
    token_protection: TokenProtection = _protection()


class SamlAuth(Table):
    """SAML through an OIDC broker: `toppy login` does the device login there."""

    mode: Literal["saml"]
    idp_entity_id: str = setting(..., "The identity provider.", min_length=1)
    sp_entity_id: str | None = setting(
        None,
        "The service provider: what the identity provider calls the broker. A broker knows that "
        "itself, and Keycloak and Dex take it from nobody; it is sent to one that asks for it, in "
        "`broker_sp_parameter`.",
        min_length=1,
    )
    broker_sp_parameter: str | None = setting(
        None,
        "The parameter in which the broker takes `sp_entity_id`. None: it is not sent.",
        pattern=r"^[A-Za-z0-9_.-]+$",
    )
    broker_hint_parameter: str = setting(
        "aarc_idp_hint",
        "The parameter that tells the broker which identity provider to use (AARC-G061); with "
        "Keycloak `kc_idp_hint`, and its alias as `idp_entity_id`.",
        pattern=r"^[A-Za-z0-9_.-]+$",
    )
    broker_issuer: str = setting(..., "The broker's issuer URL.", min_length=1)
    broker_client_id: str = setting(..., "This client's ID there.", min_length=1)
    broker_audience: str | None = setting(None, "Asked for in the token.", min_length=1)
    broker_scope: str = setting("openid offline_access", "Scopes.", min_length=1)
    token_cache_path: str | None = setting(None, "Where tokens are kept.", min_length=1)
    token_protection: TokenProtection = _protection()

    @model_validator(mode="after")
    def _parameters(self) -> SamlAuth:
        if self.broker_sp_parameter is None:
            return self
        if self.sp_entity_id is None:
            raise ValueError("broker_sp_parameter needs sp_entity_id: it carries nothing else")
        if self.broker_sp_parameter == self.broker_hint_parameter:
            raise ValueError("broker_sp_parameter and broker_hint_parameter must differ")
        return self


Auth = TokenAuth | OidcDeviceCodeAuth | OidcAuthCodePkceAuth | SamlAuth


class RateSection(Section):
    """Token bucket per connection and direction; both zero: off. `toppy up` always has it; the
    other commands where this table is written. TCP is slowed to it; of UDP, per local peer, what is
    over it is dropped.
    """

    bytes_per_sec: int = setting(10 << 20, "Bytes per second.", ge=0)
    burst_bytes: int | None = setting(None, "Bucket size; default: bytes_per_sec.", ge=0)

    @model_validator(mode="after")
    def _both_or_neither(self) -> RateSection:
        burst = self.bytes_per_sec if self.burst_bytes is None else self.burst_bytes
        if bool(self.bytes_per_sec) != bool(burst):
            raise ValueError("bytes_per_sec and burst_bytes: set both to zero, or neither")
        return self


class ForwardEntry(Section):
    """A local port that leads to a target: `toppy up` starts all of them together, `toppy udp`
    those of UDP.
    """

    protocol: Literal["udp", "tcp"] = setting("tcp", "`tcp` or `udp`.")
    listen: str = setting(
        ..., "Local address, `HOST:PORT`; whoever reaches it uses this client's access."
    )
    target: str = setting(..., "Where it leads, `HOST:PORT`; `policy` must allow it.")
    direct: bool = setting(False, "Connect from here, without the gateway; TCP only.")

    @field_validator("listen")
    @classmethod
    def _listen(cls, value: str) -> str:
        parse_listen_address(value)
        return value

    @field_validator("target")
    @classmethod
    def _target(cls, value: str) -> str:
        host, _ = parse_host_port(value, may_be_zero=False)
        try:
            parse_host(host)
        except RequestError as error:
            raise ValueError(str(error)) from None
        return value

    @model_validator(mode="after")
    def _direct_is_tcp(self) -> ForwardEntry:
        if self.direct and self.protocol == "udp":
            raise ValueError("direct: for TCP only; UDP goes through the gateway")
        return self


class ProxySection(Section):
    """`toppy proxy`: SOCKS5, SOCKS4a and HTTP on one local port. `toppy exec` uses the bounds."""

    listen: str = setting(
        "127.0.0.1:1080",
        "Where it listens; an address that others can reach needs `user` and a password.",
    )
    user: str | None = setting(
        None, "Who may use it, together with the password. Default: everybody here.", min_length=1
    )
    password: SecretStr | None = setting(None, "The password.")
    password_file: str | None = setting(
        None, "File with the password; mode 0600. Instead of `password`.", min_length=1
    )
    max_connections: int = setting(
        1024, "At once; further ones wait to be accepted.", ge=1, le=65535
    )
    handshake_timeout_s: float = setting(10.0, "For a program to say what it wants.", gt=0, le=300)
    pac_through: CommaList = setting(
        (),
        "Names, `*.names`, addresses and IPv4 networks that the PAC file sends here. Default: all.",
    )
    pac_direct: CommaList = setting((), "The same, for what it does not send here.")

    @field_validator("listen")
    @classmethod
    def _listen(cls, value: str) -> str:
        parse_listen_address(value)
        return value

    @model_validator(mode="after")
    def _credentials(self) -> ProxySection:
        if self.password is not None and self.password_file is not None:
            raise ValueError("password and password_file: set one of them")
        if (self.user is None) != (self.password is None and self.password_file is None):
            raise ValueError("user and a password (password_file) go together")
        return self

    @model_validator(mode="after")
    def _patterns(self) -> ProxySection:
        try:
            encode_pac("127.0.0.1:1080", through=self.pac_through, direct=self.pac_direct)
        except ConfigError as error:
            raise ValueError(f"pac_through, pac_direct: {error}") from None
        return self


class ClientQuicSection(Section):
    """The QUIC engine."""

    engine: Engine = setting("auto", "`native`, `aioquic`, or `auto`: the best there is.")
    congestion_control: CongestionControl = setting("bbr", "How sending adapts to the path.")


class ClientConfig(Section):
    """The client's ``config.toml``."""

    gateway: str = setting(..., "Host name or address of the gateway.", min_length=1)
    port: int = setting(4433, "Its UDP port.", ge=1, le=65535)
    server_name: str | None = setting(
        None, "Name that its certificate must have. Default: `gateway`.", min_length=1
    )
    gateway_template: str | None = setting(
        None,
        "URI template of another RFC 9298 proxy, with `{target_host}` and `{target_port}`. "
        "Default: toppy's own.",
    )
    gateway_tcp_template: str | None = setting(
        None,
        "The same for TCP, of another connect-tcp proxy. Default: toppy's own.",
    )
    ca_cert_path: str | None = setting(
        None, "PEM file with the CA to trust. Default: the system's.", min_length=1
    )
    client_certificate: str | None = setting(
        None,
        "PEM file: the certificate that this client shows to a gateway that asks for one, then "
        "its chain.",
        min_length=1,
    )
    client_key: str | None = setting(
        None, "PEM file: that certificate's key; mode 0600.", min_length=1
    )
    client_key_passphrase_file: str | None = setting(
        None, "File with the passphrase of an encrypted `client_key`; mode 0600.", min_length=1
    )
    auth_token: SecretStr | None = setting(None, "The bearer token, where there is no `[auth]`.")
    mtu: int | None = setting(
        None, "UDP payload of the first packets, in bytes; 1350 is recommended.", ge=1, le=65507
    )
    policy: ClientPolicy | None = None
    auth: Auth | None = Field(None, discriminator="mode")
    rate: RateSection = Field(default_factory=RateSection)
    forward: tuple[ForwardEntry, ...] = setting((), "Local ports for `toppy up` without arguments.")
    proxy: ProxySection = Field(default_factory=ProxySection)
    quic: ClientQuicSection = Field(default_factory=ClientQuicSection)
    udp_idle_s: float = setting(
        60.0, "A local peer that is silent for so long is forgotten.", ge=1, le=86_400
    )
    udp_max_peers: int = setting(
        128, "Local peers at once; further ones are dropped.", ge=1, le=65535
    )
    tcp_max_connections: int = setting(
        1024, "Of `toppy up` at once; further ones wait to be accepted.", ge=1, le=65535
    )
    tcp_connect_timeout_s: float = setting(
        10.0, "For reaching the target of `toppy up --direct`.", gt=0, le=300
    )
    audit_log_path: str | None = setting(
        None,
        "The audit log. Default: `$XDG_DATA_HOME/toppy/audit.jsonl`, else "
        "`~/.local/share/toppy/audit.jsonl`.",
        min_length=1,
    )
    audit_signing_key: SecretStr | None = setting(
        None, "Signs its entries: an HMAC secret, or an Ed25519 private key in PEM."
    )
    audit_ship_url: str | None = setting(
        None, "Entries are sent there too, by HTTP POST.", min_length=1
    )
    audit_ship_token: SecretStr | None = setting(None, "Bearer token for it.")
    audit_ship_timeout_secs: float = setting(3.0, "For one request.", gt=0, le=300)
    audit_ship_retries: int = setting(
        2, "Of `toppy audit ship`, after a first attempt.", ge=0, le=20
    )
    audit_ship_backoff_ms: int = setting(
        250, "Before the first retry; doubles from then on.", ge=1, le=60_000
    )
    audit_ship_batch_size: int = setting(
        100,
        "Entries of one request of `toppy audit ship`, as a JSON array; 1: one, as an object.",
        ge=1,
        le=10_000,
    )
    audit_verify_url: str | None = setting(
        None, "Where `toppy audit remote-verify` sends the log.", min_length=1
    )
    audit_verify_token: SecretStr | None = setting(None, "Bearer token for it.")
    audit_verify_timeout_secs: float = setting(5.0, "For one request.", gt=0, le=300)
    audit_verify_retries: int = setting(2, "After a first attempt.", ge=0, le=20)
    audit_verify_backoff_ms: int = setting(
        250, "Before the first retry; doubles from then on.", ge=1, le=60_000
    )

    @model_validator(mode="after")
    def _certificate_and_key(self) -> ClientConfig:
        if bool(self.client_certificate) != bool(self.client_key):
            missing = "client_key" if self.client_certificate else "client_certificate"
            raise ValueError(f"client_certificate and client_key go together; {missing} is missing")
        if self.client_key_passphrase_file and not self.client_key:
            raise ValueError("client_key_passphrase_file: there is no client_key to open")
        return self

    @field_validator("forward")
    @classmethod
    def _ports_once(cls, value: tuple[ForwardEntry, ...]) -> tuple[ForwardEntry, ...]:
        seen = set()
        for entry in value:
            host, port = parse_host_port(entry.listen)
            if port and (entry.protocol, host, port) in seen:
                raise ValueError(f"listen = {entry.listen!r} stands twice for {entry.protocol}")
            seen.add((entry.protocol, host, port))
        return value

    @field_validator("audit_ship_url", "audit_verify_url")
    @classmethod
    def _collector(cls, value: str | None) -> str | None:
        if value is not None:
            check_collector_url(value)
        return value

    @field_validator("auth_token", "audit_ship_token", "audit_verify_token")
    @classmethod
    def _sendable(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            check_token(value.get_secret_value())
        return value

    @field_validator("audit_signing_key")
    @classmethod
    def _not_empty(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not value.get_secret_value():
            raise ValueError("must not be empty")
        return value

    @field_validator("gateway", "server_name")
    @classmethod
    def _host(cls, value: str | None) -> str | None:
        if value is None:
            return None
        host = value.removeprefix("[").removesuffix("]")
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            pass
        else:
            if "%" in host:  # no certificate has one
                raise ValueError("must be without a zone; give the gateway a name in /etc/hosts")
            return str(address)
        try:
            parse_host(host)
        except RequestError:
            raise ValueError(
                "must be a host name or an address, without a port or a scheme"
            ) from None
        return host

    @field_validator("gateway_template", "gateway_tcp_template")
    @classmethod
    def _template(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                validate_template(value)
            except ConfigError as error:
                raise ValueError(str(error).removeprefix("gateway_template ")) from None
        return value

    @property
    def udp_rate(self) -> Rate:
        """Of each local peer of `toppy udp` and direction: only where ``[rate]`` is written, for
        what is over it is lost, not delayed (T-051). The same of each connection of the commands
        for which no default rate was asked.
        """
        rate = self.rate
        if "rate" not in self.model_fields_set or not rate.bytes_per_sec:
            return UNLIMITED
        burst = rate.bytes_per_sec if rate.burst_bytes is None else rate.burst_bytes
        return Rate(rate.bytes_per_sec, burst)

    @property
    def token(self) -> SecretStr | None:
        """The bearer token that the file has, if it has one (T-033)."""
        if self.auth is None:
            return self.auth_token
        return self.auth.token if isinstance(self.auth, TokenAuth) else None


ENVIRONMENT: Mapping[str, str] = {
    "TOPPY_QUIC_ENGINE": "quic.engine",
    "TOPPY_UDP_IDLE_SECS": "udp_idle_s",
    "TOPPY_UDP_MAX_PEERS": "udp_max_peers",
    "TOPPY_TCP_MAX_CONNECTIONS": "tcp_max_connections",
    "TOPPY_TCP_CONNECT_TIMEOUT_SECS": "tcp_connect_timeout_s",
    "TOPPY_PROXY_LISTEN": "proxy.listen",
    "TOPPY_PROXY_USER": "proxy.user",
    "TOPPY_PROXY_PASSWORD": "proxy.password",
    "TOPPY_AUDIT_LOG": "audit_log_path",
    "TOPPY_AUDIT_SIGNING_KEY": "audit_signing_key",
    "TOPPY_AUDIT_SHIP_URL": "audit_ship_url",
    "TOPPY_AUDIT_SHIP_TOKEN": "audit_ship_token",
    "TOPPY_AUDIT_SHIP_TIMEOUT": "audit_ship_timeout_secs",
    "TOPPY_AUDIT_SHIP_RETRIES": "audit_ship_retries",
    "TOPPY_AUDIT_SHIP_BACKOFF_MS": "audit_ship_backoff_ms",
    "TOPPY_AUDIT_SHIP_BATCH_SIZE": "audit_ship_batch_size",
    "TOPPY_AUDIT_VERIFY_URL": "audit_verify_url",
    "TOPPY_AUDIT_VERIFY_TOKEN": "audit_verify_token",
    "TOPPY_AUDIT_VERIFY_TIMEOUT": "audit_verify_timeout_secs",
    "TOPPY_AUDIT_VERIFY_RETRIES": "audit_verify_retries",
    "TOPPY_AUDIT_VERIFY_BACKOFF_MS": "audit_verify_backoff_ms",
}
"""Which key each variable overrides."""


def parse_client_config(text: str, source: str, environ: Mapping[str, str]) -> ClientConfig:
    """Validate a client's file under the environment. Raises ``ConfigError``."""
    data = parse_toml(text, source)
    variables = apply_environment(data, environ, ENVIRONMENT)
    return validate(ClientConfig, data, text, source, variables)


def client_config_path(flag: str | None, environ: Mapping[str, str], home: str) -> str:
    """Which file: ``--config``, ``TOPPY_CONFIG``, or the one in the home directory (T-030)."""
    if flag:
        return flag
    if environ.get("TOPPY_CONFIG"):
        return environ["TOPPY_CONFIG"]
    base = environ.get("XDG_CONFIG_HOME") or posixpath.join(home, ".config")
    return posixpath.join(base, "toppy", "config.toml")
