"""``toppy-gw``: the gateway's command line. Each command imports the heavy parts that it needs."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from toppy import __version__
from toppy.cli.audit import audit_app
from toppy.cli.cert import cert_app
from toppy.cli.policy import gateway_policy_app
from toppy.errors import ConfigError, ToppyError
from toppy.system.descriptors import open_missing_standard_descriptors

app = typer.Typer(
    name="toppy-gw",
    help="The toppy gateway: UDP and TCP to private targets through one QUIC port (MASQUE).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

app.add_typer(audit_app("toppy-gw"), name="audit")
app.add_typer(cert_app, name="cert")
app.add_typer(gateway_policy_app(), name="policy")

ConfigOption = Annotated[
    str | None,
    typer.Option("--config", "-c", metavar="FILE", help="Default: /etc/toppy/gateway.toml"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print facts, or the error, as JSON.")]


_LONGEST_DRAIN_S = 30 * 86_400
"""As long as ``reload.drain_timeout_s`` may be."""


def _refuse_nan(value: float | None) -> float | None:
    if value is not None and math.isnan(value):
        raise typer.BadParameter("nan is no number of seconds.")
    return value


def _show_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"toppy-gw {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Say which.")
    ] = False,
) -> None:
    pass


@app.command()
def init(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where the files go.")],
    listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="UDP address of the gateway.")
    ] = "127.0.0.1:4433",
    health: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="TCP address of /healthz and /metrics.")
    ] = "127.0.0.1:8080",
    name: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Another name or address for the certificate."),
    ] = None,
    force: Annotated[bool, typer.Option(help="Overwrite files that exist.")] = False,
) -> None:
    """Write a private CA, a certificate, a token and both configuration files."""
    from toppy.control.init import write_development_files  # noqa: PLC0415

    try:
        written = write_development_files(
            directory, listen=listen, health=health, names=tuple(name or ()), force=force
        )
    except ConfigError as error:
        _fail(error)
    for path in written:
        typer.echo(f"wrote {path}")
    typer.echo(f"\nnext: toppy-gw run --config {directory / 'gateway.toml'}")


@app.command()
def run(config: ConfigOption = None) -> None:
    """Run the gateway in the foreground until SIGTERM."""
    from toppy.system.stop_signals import hold_stop_signals  # noqa: PLC0415

    hold_stop_signals()  # an early one would end what it was to reload; imports take a while
    from toppy.control.main import run_gateway  # noqa: PLC0415
    from toppy.control.settings import config_path  # noqa: PLC0415

    raise typer.Exit(run_gateway(config_path(config, os.environ), os.environ))


@app.command("check-config")
def check_config(config: ConfigOption = None) -> None:
    """Read the configuration and every file it names; say what is wrong."""
    from toppy.control.settings import config_path, load_settings  # noqa: PLC0415

    try:
        settings = load_settings(config_path(config, os.environ), os.environ)
    except ConfigError as error:
        _fail(error)
    for warning in settings.warnings:
        typer.echo(f"warning: {warning}", err=True)
    typer.echo(f"configuration ok: {settings.source}")


@app.command()
def status(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Show the running gateway: generations, workers, what they do and have dropped."""
    _operate(config, "status", as_json=as_json)


@app.command()
def reload(
    config: ConfigOption = None,
    policy_only: Annotated[
        bool,
        typer.Option(
            "--policy-only",
            help="Only what is hot: policy, credentials, log level. The workers stay.",
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Apply the configuration file; wait until a new generation of workers serves with it."""
    _operate(config, "reload", policy_only=policy_only, as_json=as_json)


@app.command()
def upgrade(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Replace the running code by what is installed now; connections stay."""
    _operate(config, "upgrade", as_json=as_json)


@app.command()
def drain(
    what: Annotated[
        str, typer.Argument(metavar="WORKER|GENERATION", help="Such as s3 or g2; see status.")
    ],
    config: ConfigOption = None,
    timeout: Annotated[
        float | None,
        typer.Option(
            metavar="S",
            min=0,
            max=_LONGEST_DRAIN_S,
            callback=_refuse_nan,
            help="Seconds after which live tunnels are closed; 0: never. "
            "Default: reload.drain_timeout_s.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Have a worker or an earlier generation end once its tunnels have."""
    _operate(config, "drain", what, timeout, as_json=as_json)


@app.command()
def connections(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """List the open connections."""
    _operate(config, "connections", as_json=as_json)


@app.command()
def tunnels(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """List the open tunnels."""
    _operate(config, "tunnels", as_json=as_json)


@app.command()
def kick(
    what: Annotated[
        str, typer.Argument(metavar="TUNNEL|SUBJECT", help="As the list of tunnels has it.")
    ],
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Close a tunnel, or all of a subject; their clients are told why."""
    _operate(config, "kick", what, as_json=as_json)


@app.command()
def stop(config: ConfigOption = None) -> None:
    """Stop the gateway and its workers; wait until they have ended."""
    _operate(config, "stop", as_json=False)


def _operate(
    config: str | None, command: str, *arguments: Any, as_json: bool, **options: Any
) -> None:
    """Have the running gateway do ``command``, a method of ``GatewayAdmin``; print its answer."""
    from toppy.cli import gateway_tables  # noqa: PLC0415
    from toppy.cli.gateway_admin import (  # noqa: PLC0415
        GatewayAdmin,
        RefusedError,
        find_runtime_dir,
    )

    try:
        admin = GatewayAdmin(find_runtime_dir(config, os.environ))
        facts = getattr(admin, command)(*arguments, **options)
    except ToppyError as error:
        if as_json:
            _print_json({"error": str(error)})
        _fail(error, error.exit_code if isinstance(error, RefusedError) else 1)
    if as_json:
        _print_json(facts)
    else:
        typer.echo(getattr(gateway_tables, f"render_{command}")(facts))


def _print_json(facts: dict[str, Any]) -> None:
    import json  # noqa: PLC0415

    typer.echo(json.dumps(facts, indent=2))


def _fail(error: Exception, exit_code: int = 1) -> NoReturn:
    typer.echo(f"toppy-gw: {error}", err=True)
    raise typer.Exit(exit_code)


def main() -> None:
    """Entry point."""
    open_missing_standard_descriptors()
    sys.exit(app())
