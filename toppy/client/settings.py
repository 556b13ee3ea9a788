"""From the client's file to how it reaches its gateway."""

from __future__ import annotations

import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509

from toppy.client.session import GatewaySettings
from toppy.config.client import ClientConfig, client_config_path, parse_client_config
from toppy.errors import ConfigError
from toppy.model.target import Target
from toppy.system.files import read_file
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
    return LoadedClientConfig(config, path, tuple(warnings))


def _has_secret(config: ClientConfig) -> bool:
    secrets = (
        config.token,
        config.auth_token,
        config.audit_signing_key,
        config.audit_ship_token,
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
        ca = _read_certificates(loaded.path.absolute().parent / config.ca_cert_path)
    authority = Target(config.gateway, config.port)
    token = config.token
    return GatewaySettings(
        host=config.gateway,
        port=config.port,
        server_name=config.server_name or config.gateway,
        template=config.gateway_template or f"https://{authority}{FORWARD_TEMPLATE_PATH}",
        ca_certificates_pem=ca,
        authorization=authorization or (token.get_secret_value() if token is not None else None),
        engine=config.quic.engine,
        congestion_control=config.quic.congestion_control,
        initial_packet_bytes=max(1200, config.mtu or DEFAULT_MTU),
    )


def _read_certificates(path: Path) -> bytes:
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
