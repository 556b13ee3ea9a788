"""From the configuration file to what the control plane works with: files read, keys made."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from toppy.auth.authenticator import Authenticator, SubjectPrefixes
from toppy.auth.bearer import StaticToken
from toppy.auth.client_certificate import CertificateTrust
from toppy.auth.issuer import IssuerVerifier, RoleMapping
from toppy.auth.jwt import JwtVerifier
from toppy.config.authentication import AuthSection, OidcSection
from toppy.config.changes import without_restart
from toppy.config.gateway import (
    GatewayConfig,
    LoadedConfig,
    parse_gateway_config,
    resolve_path,
)
from toppy.control.audit_settings import AuditSettings, audit_settings
from toppy.control.tls_files import has_inline_secret, read_client_ca, read_server_pair
from toppy.errors import ConfigError
from toppy.system.certificate_authority import issue_self_signed
from toppy.system.certificate_files import end_of, names_of
from toppy.system.files import is_open_to_others, read_file

SYSTEM_CONFIG = "/etc/toppy/gateway.toml"
_MIN_TOKEN_CHARACTERS = 8
_HOT = ("auth", "policy", "rates", "resolver", "insecure_no_auth")
"""Sections and keys whose settings are all hot; of ``log`` only the level is."""

_Read = Callable[..., bytes]


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    """A configuration whose files were found and read."""

    config: GatewayConfig
    warnings: tuple[str, ...]
    source: str
    runtime_dir: Path
    certificate_chain_pem: bytes
    private_key_pem: bytes = field(repr=False)
    """Not encrypted, whatever the file was."""
    names: tuple[str, ...]
    """DNS names and addresses of the certificate, and localhost: the gateway's own names."""
    authenticator: Authenticator = field(repr=False)
    reset_key: bytes = field(repr=False)
    token_key: bytes = field(repr=False)
    audit: AuditSettings = field(default_factory=AuditSettings)
    client_ca_pem: bytes = b""
    """Whose client certificates are accepted; empty: they are not asked for."""

    @property
    def certificate_ends_at(self) -> float:
        """Unix time."""
        return end_of(self.certificate_chain_pem)

    def with_hot(self, other: GatewaySettings) -> GatewaySettings:
        """The same with the ``hot`` settings of ``other``. Raises ``ConfigError`` where the two
        together are not safe.
        """
        hot = {name: getattr(other.config, name) for name in _HOT}
        hot["log"] = self.config.log.model_copy(update={"level": other.config.log.level})
        return replace(
            self,
            config=_safe(self.config.model_copy(update=hot)),
            authenticator=other.authenticator.trusting(self.authenticator.trust),
            warnings=other.warnings,
        )

    def with_running(self, running: GatewaySettings) -> GatewaySettings:
        """The same, but what applies at a restart only stays as it is in ``running``.

        Raises ``ConfigError`` where the two together are not safe.
        """
        return replace(
            self,
            config=_safe(without_restart(running.config, self.config)),
            runtime_dir=running.runtime_dir,
            audit=running.audit,
        )

    def for_trial(self, runtime_dir: Path) -> GatewaySettings:
        """The same with one worker, on a loopback port of its own."""
        config = self.config
        listen = config.listen.model_copy(update={"quic": ("127.0.0.1:0",), "health": ""})
        return replace(
            self,
            config=config.model_copy(update={"listen": listen, "workers": 1}),
            runtime_dir=runtime_dir,
            audit=AuditSettings(),  # the log has one writer
        )


def _safe(mixed: GatewayConfig) -> GatewayConfig:
    """A configuration out of two that were valid each."""
    try:
        mixed.check_client_certificates()
    except ValueError as error:
        raise ConfigError(
            f"{error} (a change of [tls] takes a whole reload)",
            key="auth.client_certificate.accept",
        ) from None
    try:
        mixed.check_authentication()
    except ValueError as error:
        raise ConfigError(
            f"{error} (these are the addresses that it has; others take a restart)",
            key="insecure_no_auth",
        ) from None
    return mixed


def config_path(flag: str | None, environ: Mapping[str, str]) -> Path | None:
    """Which file: the flag, ``TOPPY_GW_CONFIG``, or the system's where there is one."""
    if flag is not None:
        return Path(flag)
    if environ.get("TOPPY_GW_CONFIG"):
        return Path(environ["TOPPY_GW_CONFIG"])
    system = Path(SYSTEM_CONFIG)
    try:
        system.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError:
        pass  # something is there; whoever reads it will say why it cannot be
    return system


def load_config(path: Path | None, environ: Mapping[str, str]) -> LoadedConfig:
    """Parse the file, or the environment alone. Raises ``ConfigError``."""
    text, source = "", "environment"
    if path is None and not any(name.startswith("TOPPY_GW_") for name in environ):
        raise ConfigError(
            f"{SYSTEM_CONFIG} does not exist; write one with `toppy-gw init`, or name another with "
            "--config"
        )
    if path is not None:
        source = str(path)
        text = read_file(path, "configuration").decode("utf-8", "replace")
    return parse_gateway_config(text, source, environ)


def load_settings(
    path: Path | None,
    environ: Mapping[str, str],
    *,
    self_signed: tuple[bytes, bytes] | None = None,
) -> GatewaySettings:
    """Configuration and every file that it names. Raises ``ConfigError``.

    ``self_signed`` is a certificate and its key that this gateway made for itself before; without
    ``tls.certificate`` it is used again.
    """
    loaded = load_config(path, environ)
    config = loaded.config
    if config.workers == "auto":
        config = config.model_copy(update={"workers": os.cpu_count() or 1})
    base = _base_directory(path)
    warnings = list(loaded.warnings)

    def read(value: str, key: str, *, is_secret: bool = False) -> bytes:
        where = Path(resolve_path(base, value))
        try:
            data = read_file(where, key)
        except ConfigError as error:
            if not _is_missing(where):
                raise
            raise ConfigError(
                f"{error}; a first certificate and token come from: toppy-gw init {base}", key=key
            ) from None
        if is_secret and _is_open(where):
            warnings.append(f"{key}: {where} can be read by others; run: chmod 600 {where}")
        return data

    if path is not None and has_inline_secret(config, loaded.variables) and _is_open(path):
        warnings.append(f"{path} has a secret and can be read by others; run: chmod 600 {path}")
    if config.tls.certificate:
        chain, key = read_server_pair(config.tls, base, read)
        names = _names(chain)
    else:
        if self_signed is None:
            made = issue_self_signed(("localhost", "127.0.0.1", "::1"))
            self_signed = made.certificate_pem, made.key_pem
        chain, key = self_signed
        names = _names(chain)
        warnings.append(
            "no tls.certificate: using a self-signed one for localhost, made at this start"
        )
    client_ca_pem, trust = read_client_ca(config.tls, read, warnings)
    authenticator = _authenticator(config.auth, read, trust, is_open=config.insecure_no_auth)
    return GatewaySettings(
        config=config,
        warnings=tuple(warnings),
        source=str(path or "environment"),
        runtime_dir=Path(resolve_path(base, config.runtime_dir)),
        certificate_chain_pem=chain,
        private_key_pem=key,
        names=names,
        authenticator=authenticator,
        reset_key=secrets.token_bytes(64),
        token_key=secrets.token_bytes(64),
        audit=audit_settings(
            config.audit, base, environ, lambda value, key: _read_text(read, value, key)
        ),
        client_ca_pem=client_ca_pem,
    )


def runtime_directory(path: Path | None, environ: Mapping[str, str]) -> Path:
    """Where the gateway of this configuration has its sockets. Raises ``ConfigError``."""
    config = load_config(path, environ).config
    return Path(resolve_path(_base_directory(path), config.runtime_dir))


def _base_directory(path: Path | None) -> str:
    return str(path.absolute().parent if path is not None else Path.cwd())


def _is_open(path: Path) -> bool:
    """Whether others than its owner may read a file."""
    return is_open_to_others(path, stat.S_IRGRP | stat.S_IROTH)


def _is_missing(path: Path) -> bool:
    try:
        path.stat()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return False


def _read_text(read: _Read, value: str, key: str) -> str:
    try:
        text: str = read(value, key, is_secret=True).decode().strip()
    except UnicodeDecodeError:
        raise ConfigError(f"{key}: {value} is no UTF-8 text", key=key) from None
    return text


def _names(chain_pem: bytes) -> tuple[str, ...]:
    try:
        return tuple(dict.fromkeys(("localhost", *names_of(chain_pem))))
    except (ValueError, IndexError):
        raise ConfigError(
            "tls.certificate: the file has no PEM certificate", key="tls.certificate"
        ) from None


def _authenticator(
    auth: AuthSection, read: _Read, trust: CertificateTrust, *, is_open: bool
) -> Authenticator:
    token = auth.token.get_secret_value() if auth.token is not None else ""
    if auth.token_file:
        token = _read_text(read, auth.token_file, "auth.token_file")
        if len(token) < _MIN_TOKEN_CHARACTERS:
            raise ConfigError(
                f"auth.token_file: the token is too short: at least {_MIN_TOKEN_CHARACTERS} "
                "characters",
                key="auth.token_file",
            )
    jwt = auth.jwt
    verifier = None
    if jwt.is_configured:
        secret = jwt.secret.get_secret_value() if jwt.secret is not None else None
        if jwt.secret_file:
            secret = _read_text(read, jwt.secret_file, "auth.jwt.secret_file")
        verifier = JwtVerifier(
            secret=secret,
            public_key_pem=(
                read(jwt.public_key_file, "auth.jwt.public_key_file")
                if jwt.public_key_file
                else None
            ),
            jwks=(
                read(jwt.jwks_file, "auth.jwt.jwks_file").decode("utf-8", "replace")
                if jwt.jwks_file
                else None
            ),
            algorithms=jwt.algorithms,
            issuer=jwt.issuer or None,
            audience=jwt.audience or None,
            leeway_s=jwt.leeway_s,
        )
    return Authenticator(
        static_token=StaticToken(token) if token else None,
        jwt=verifier,
        oidc=_issuer_verifier(auth.oidc) if auth.oidc.is_configured else None,
        is_open=is_open,
        prefixes=SubjectPrefixes(auth.jwt.subject_prefix, auth.oidc.subject_prefix),
        trust=trust,
        certificate_name=(
            auth.client_certificate.name_from if auth.client_certificate.accept else None
        ),
    )


def _issuer_verifier(oidc: OidcSection) -> IssuerVerifier:
    roles = (RoleMapping(each.role, each.claim, each.values) for each in oidc.roles)
    return IssuerVerifier(oidc.issuer, oidc.audience, leeway_s=oidc.leeway_s, roles=roles)
