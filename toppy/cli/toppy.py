"""``toppy``: the client's command line. Heavy parts are imported by the command that needs them."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from toppy import __version__
from toppy.cli.audit import audit_app

app = typer.Typer(
    name="toppy",
    help="Reach private targets through a toppy gateway (MASQUE).",
    pretty_exceptions_enable=False,
)

app.add_typer(audit_app("toppy"), name="audit")

ConfigOption = Annotated[
    str | None,
    typer.Option(
        "--config", "-c", metavar="FILE", help="Default: $TOPPY_CONFIG, ~/.config/toppy/config.toml"
    ),
]


def _show_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"toppy {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _main(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Say which.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo("toppy: try `toppy doctor` to check the way to your gateway, or `toppy --help`.")


@app.command()
def udp(
    listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Local UDP address, such as 127.0.0.1:19000.")
    ],
    target: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where the gateway sends the datagrams.")
    ],
    config: ConfigOption = None,
) -> None:
    """Forward a local UDP port to a target behind the gateway."""
    from toppy.cli.udp import run_udp  # noqa: PLC0415

    raise typer.Exit(run_udp(listen, target, config, os.environ))


@app.command()
def doctor(
    config: ConfigOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print facts as JSON.")] = False,
) -> None:
    """Check configuration, gateway, path and policy; say what to do about what fails."""
    from toppy.cli.doctor import run_doctor  # noqa: PLC0415

    raise typer.Exit(run_doctor(config, os.environ, as_json=as_json))


@app.command()
def login(
    config: ConfigOption = None,
    print_token: Annotated[
        bool, typer.Option("--print-token", help="Print the access token on standard output.")
    ] = False,
    browser: Annotated[
        bool, typer.Option("--browser/--no-browser", help="Open the browser where one is needed.")
    ] = True,
) -> None:
    """Log in at the OpenID provider that the configuration names; keep the tokens."""
    from toppy.cli.login import run_login  # noqa: PLC0415

    raise typer.Exit(run_login(config, os.environ, prints_token=print_token, opens_browser=browser))


@app.command()
def logout(config: ConfigOption = None) -> None:
    """Forget the login, here and at the provider."""
    from toppy.cli.login import run_logout  # noqa: PLC0415

    raise typer.Exit(run_logout(config, os.environ))


@app.command()
def whoami(
    config: ConfigOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print facts as JSON.")] = False,
) -> None:
    """Say who is logged in, for what, and for how long."""
    from toppy.cli.login import run_whoami  # noqa: PLC0415

    raise typer.Exit(run_whoami(config, os.environ, as_json=as_json))


def main() -> None:
    """Entry point."""
    sys.exit(app())
