"""From the client's file to how it reaches its gateway."""

from __future__ import annotations

import contextlib
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509

from toppy.client.policy import policy_warnings
from toppy.client.session import GatewaySettings
from toppy.config.client import ClientConfig, client_config_path, parse_client_config
from toppy.errors import ConfigError
from toppy.model.target import Target
from toppy.system.certificate_files import check_pair, is_encrypted, plain_key_pem
from toppy.system.files import is_open_to_others, read_file
from toppy.wire.connect_tcp import TCP_TEMPLATE_PATH
from toppy.wire.connect_udp import FORWARD_TEMPLATE_PATH

DEFAULT_MTU = 1350


@dataclass(frozen=True, slots=True)
class LoadedClientConfig:
    """A client's configuration and the file it came from."""

    config: ClientConfig
    path: Path
    warnings: tuple[str, ...]


def load_client_config(flag: str | None, environ: Mapping[str, str]) -> LoadedClientConfig:
    """Find, read and validate the client's file. Raises ``ConfigError``."""
    path = Path(client_config_path(flag, environ, environ.get("HOME", "")))
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(
            f"there is no configuration at {path}; write one (`toppy-gw init` makes an example, "
            "client.toml), or name one with --config or TOPPY_CONFIG"
        ) from None
    except OSError as error:
        raise ConfigError(f"configuration: cannot read {path}: {error.strerror}") from None
    text = read_file(path, "configuration").decode("utf-8", "replace")
    config = parse_client_config(text, str(path), environ)
    warnings = []
    if _has_secret(config) and mode & (stat.S_IRGRP | stat.S_IROTH):
        warnings.append(f"{path} has a secret and can be read by others; run: chmod 600 {path}")
    warnings += policy_warnings(config)
    for key, value in _secret_files(config):
        where = path.absolute().parent / value
        with contextlib.suppress(OSError):  # whoever needs it says that it cannot be read
            if is_open_to_others(where, stat.S_IRGRP | stat.S_IROTH):
                warnings.append(f"{key}: {where} can be read by others; run: chmod 600 {where}")
    return LoadedClientConfig(config, path, tuple(warnings))


def _secret_files(config: ClientConfig) -> list[tuple[str, str]]:
    named = (
        ("client_key", config.client_key),
        ("client_key_passphrase_file", config.client_key_passphrase_file),
        ("proxy.password_file", config.proxy.password_file),
    )
    return [(key, value) for key, value in named if value is not None]


def _has_secret(config: ClientConfig) -> bool:
    secrets = (
        config.token,
        config.auth_token,
        config.audit_signing_key,
        config.audit_ship_token,
        config.proxy.password,
    )
    return any(secret is not None for secret in secrets)


def gateway_settings(
    loaded: LoadedClientConfig, authorization: str | None = None
) -> GatewaySettings:
    """How to reach the gateway. Raises ``ConfigError`` for a CA file that is no use.

    ``authorization`` is a login's token; without it the configuration's is used.
    """
    config = loaded.config
    ca = None
    if config.ca_cert_path is not None:
        ca = _read_certificates(
            loaded.path.absolute().parent / config.ca_cert_path, source=loaded.path
        )
    chain, key = _client_pair(loaded)
    authority = Target(config.gateway, config.port)
    token = config.token
    return GatewaySettings(
        host=config.gateway,
        port=config.port,
        server_name=config.server_name or config.gateway,
        template=config.gateway_template or f"https://{authority}{FORWARD_TEMPLATE_PATH}",
        tcp_template=config.gateway_tcp_template or f"https://{authority}{TCP_TEMPLATE_PATH}",
        ca_certificates_pem=ca,
        authorization=authorization or (token.get_secret_value() if token is not None else None),
        certificate_chain_pem=chain,
        private_key_pem=key,
        engine=config.quic.engine,
        congestion_control=config.quic.congestion_control,
        initial_packet_bytes=max(1200, config.mtu or DEFAULT_MTU),
    )


def _client_pair(loaded: LoadedClientConfig) -> tuple[bytes, bytes]:
    """What the client shows: certificate and open key, or nothing. Raises ``ConfigError``."""
    config, base = loaded.config, loaded.path.absolute().parent
    if config.client_certificate is None or config.client_key is None:
        return b"", b""
    chain = read_file(base / config.client_certificate, "client_certificate")
    key = read_file(base / config.client_key, "client_key")
    passphrase = None
    if config.client_key_passphrase_file is not None:
        where = base / config.client_key_passphrase_file
        passphrase = read_file(where, "client_key_passphrase_file").rstrip(b"\r\n")
    elif is_encrypted(key):
        raise ConfigError(
            f"client_key: {base / config.client_key} is encrypted: set client_key_passphrase_file",
            key="client_key",
        )
    try:
        check_pair(chain, key, now=time.time(), passphrase=passphrase)
        return chain, plain_key_pem(key, passphrase)
    except ValueError as error:
        raise ConfigError(
            f"client_certificate = {config.client_certificate!r}, client_key = "
            f"{config.client_key!r}: {error}; a new one is made by: toppy-gw cert client",
            key="client_certificate",
        ) from None


def _read_certificates(path: Path, *, source: Path) -> bytes:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(
            f"{source}: ca_cert_path: {path} does not exist; copy ca.pem from the gateway",
            key="ca_cert_path",
        ) from None
    except OSError:
        pass  # something is there; whoever reads it says why it cannot be
    pem = read_file(path, "ca_cert_path")
    try:
        x509.load_pem_x509_certificates(pem)
    except ValueError:
        raise ConfigError(
            f"ca_cert_path: {path} has no certificate in PEM, or a broken one; it must be the CA "
            "that issued the gateway's certificate (ca.pem of `toppy-gw init`)",
            key="ca_cert_path",
        ) from None
    return pem
