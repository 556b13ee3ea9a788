"""What a gateway's configuration means to its workers."""

from __future__ import annotations

from collections.abc import Callable

from toppy.control.generation import SettingsFor
from toppy.control.listeners import Listeners
from toppy.control.runtime import Keys, socket_address
from toppy.control.settings import GatewaySettings
from toppy.system.processes import usable_cores
from toppy.wire.ipc_message import WorkerSettings


def worker_settings(
    settings: GatewaySettings,
    keys: Keys,
    listeners: Listeners,
    *,
    engine: str,
    refuses_unrecorded: bool,
    log_level: Callable[[], str],
) -> SettingsFor:
    """For the workers of a generation with these settings. ``log_level`` is asked at each start of
    one: it may change meanwhile.
    """
    config, runtime = settings.config, settings.runtime_dir
    workers = config.worker_count
    cores = usable_cores() if config.pin_workers else []

    def settings_for(slot: int, generation: int, place: int, secret: str) -> WorkerSettings:
        return WorkerSettings(
            slot=slot,
            generation=generation,
            secret=secret,
            control_address=socket_address(runtime, "control"),
            report_address=socket_address(runtime, "reports"),
            runtime_dir=str(runtime),
            sockets=listeners.descriptors(),
            read=listeners.read_by(slot, place, workers),
            is_steered=listeners.is_steered,
            names=settings.names,
            proxy_name=config.name,
            engine=engine,
            certificate_chain_pem=settings.certificate_chain_pem,
            private_key_pem=settings.private_key_pem,
            reset_key=keys.reset_key,
            token_key=keys.token_key,
            quic=config.quic.model_dump(),
            limits=config.limits.model_dump(),
            orphan_timeout_s=config.reload.orphan_timeout_s,
            refuses_unrecorded=refuses_unrecorded,
            log_level=log_level(),
            log_format=config.log.format,
            core=cores[place % len(cores)] if cores else None,
            client_ca_pem=settings.client_ca_pem,
            requires_client_certificate=config.tls.wanted_client_certificates == "required",
            cipher_suites=config.tls.cipher_suites,
        )

    return settings_for
