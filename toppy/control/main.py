"""``toppy-gw run``: the control plane as a process."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import uvloop

from toppy import __version__
from toppy.control.control_plane import ControlPlane
from toppy.control.saved_state import UnreadableStateError, read_state
from toppy.control.settings import GatewaySettings, load_settings
from toppy.control.upgrade import TRIAL_DIRECTORY, UpgradeError
from toppy.errors import ToppyError
from toppy.observe.log import configure_logging, get_logger
from toppy.system.descriptors import raise_descriptor_limit
from toppy.system.process_title import set_process_title

_log = get_logger("control")


def run_gateway(path: Path | None, environ: Mapping[str, str]) -> int:
    """Until a signal; returns the exit code. Signals are held until it can obey them."""
    try:
        settings = load_settings(path, environ)
        config = settings.config
        trial = environ.get(TRIAL_DIRECTORY)
        if trial is not None:
            configure_logging("warning", "console", process="trial")
            _check_state(settings.runtime_dir)
            uvloop.run(_run(settings.for_trial(Path(trial)), path, environ, until_serving=True))
            print(__version__)
            return 0
        configure_logging(config.log.level, config.log.format, process="control")
        set_process_title("toppy-gw: control")
        raise_descriptor_limit()
        for warning in settings.warnings:
            _log.warning("configuration", warning=warning)
        uvloop.run(_run(settings, path, environ))
    except ToppyError as error:
        print(f"toppy-gw: {error}", file=sys.stderr)
        return 1
    except BaseExceptionGroup as group:
        first = group.exceptions[0]
        print(f"toppy-gw: {first}", file=sys.stderr)
        return 1
    return 0


def _check_state(runtime_dir: Path) -> None:
    """Whether this code can take over what the running gateway will leave to it."""
    try:
        read_state(runtime_dir)
    except UnreadableStateError as error:
        raise UpgradeError(
            f"it cannot take over the running workers ({error}); use a restart instead of an "
            "upgrade: connections end then"
        ) from None


async def _run(
    settings: GatewaySettings,
    path: Path | None,
    environ: Mapping[str, str],
    *,
    until_serving: bool = False,
) -> None:
    await ControlPlane(settings, path, environ).run(until_serving=until_serving)
