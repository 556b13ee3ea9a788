"""``toppy-gw``: the gateway's command line. Each command imports the heavy parts that it needs."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from toppy import __version__
from toppy.errors import ConfigError

app = typer.Typer(
    name="toppy-gw",
    help="The toppy gateway: UDP to private targets through one QUIC port (MASQUE).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

ConfigOption = Annotated[
    str | None,
    typer.Option("--config", "-c", metavar="FILE", help="Default: /etc/toppy/gateway.toml"),
]


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
def status(
    config: ConfigOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print facts as JSON.")] = False,
) -> None:
    """Ask the running gateway how it is."""
    from toppy.cli.gateway_status import fetch_status, render_status  # noqa: PLC0415
    from toppy.control.settings import config_path, runtime_directory  # noqa: PLC0415

    try:
        facts = fetch_status(runtime_directory(config_path(config, os.environ), os.environ))
    except ConfigError as error:
        _fail(error)
    _print_facts(facts, as_json=as_json, text=render_status)


def _print_facts(facts: dict[str, Any], *, as_json: bool, text: Any) -> None:
    if as_json:
        import json  # noqa: PLC0415

        typer.echo(json.dumps(facts, indent=2))
    else:
        typer.echo(text(facts))


def _fail(error: Exception) -> None:
    typer.echo(f"toppy-gw: {error}", err=True)
    raise typer.Exit(1)


def main() -> None:
    """Entry point."""
    sys.exit(app())
