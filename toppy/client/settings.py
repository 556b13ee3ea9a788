"""From the client's file to how it reaches its gateway."""

from __future__ import annotations

import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

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
    if not path.exists():
        raise ConfigError(
            f"there is no configuration at {path}; write one (`toppy-gw init` makes an example, "
            "client.toml), or name one with --config or TOPPY_CONFIG"
        )
    text = read_file(path, "configuration").decode("utf-8", "replace")
    config = parse_client_config(text, str(path), environ)
    warnings = []
    if config.token is not None and path.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
        warnings.append(f"{path} has a token and can be read by others; run: chmod 600 {path}")
    return LoadedClientConfig(config, path, tuple(warnings))


def gateway_settings(loaded: LoadedClientConfig) -> GatewaySettings:
    """How to reach the gateway. Raises ``ConfigError`` for a CA file that cannot be read."""
    config = loaded.config
    ca = None
    if config.ca_cert_path is not None:
        ca = read_file(loaded.path.absolute().parent / config.ca_cert_path, "ca_cert_path")
    authority = Target(config.gateway, config.port)
    token = config.token
    return GatewaySettings(
        host=config.gateway,
        port=config.port,
        server_name=config.server_name or config.gateway,
        template=config.gateway_template or f"https://{authority}{FORWARD_TEMPLATE_PATH}",
        ca_certificates_pem=ca,
        authorization=token.get_secret_value() if token is not None else None,
        engine=config.quic.engine,
        congestion_control=config.quic.congestion_control,
        initial_packet_bytes=max(1200, config.mtu or DEFAULT_MTU),
    )
