"""``toppy``: the client's command line. Heavy parts are imported by the command that needs them."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Literal

import typer

from toppy import __version__
from toppy.cli.audit import audit_app
from toppy.cli.policy import client_policy_app
from toppy.system.descriptors import open_missing_standard_descriptors

app = typer.Typer(
    name="toppy",
    help="Reach private targets through a toppy gateway (MASQUE).",
    pretty_exceptions_enable=False,
)

app.add_typer(audit_app("toppy"), name="audit")
app.add_typer(client_policy_app(), name="policy")

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


def _check_both(listen: str | None, target: str | None) -> None:
    if (listen is None) != (target is None):
        raise typer.BadParameter("--listen and --target go together; or give neither")


@app.command()
def udp(
    listen: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Local UDP address, such as 127.0.0.1:19000."),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Where the gateway sends the datagrams."),
    ] = None,
    config: ConfigOption = None,
) -> None:
    r"""Forward a local UDP port to a target behind the gateway; without --listen and --target,
    every [\[forward]] of UDP in the configuration.
    """
    from toppy.cli.udp import run_udp  # noqa: PLC0415

    _check_both(listen, target)
    raise typer.Exit(run_udp(listen, target, config, os.environ))


@app.command()
def up(
    listen: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Local TCP address, such as 127.0.0.1:13389."),
    ] = None,
    target: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Where connections lead.")
    ] = None,
    config: ConfigOption = None,
    direct: Annotated[
        bool, typer.Option("--direct", help="Connect from here, without a gateway.")
    ] = False,
    once: Annotated[
        bool, typer.Option("--once", help="Serve one connection, then exit; 1 if it failed.")
    ] = False,
) -> None:
    r"""Forward a local TCP port to a target behind the gateway; without --listen and --target,
    every [\[forward]] in the configuration.
    """
    from toppy.cli.up import run_up  # noqa: PLC0415

    _check_both(listen, target)
    if direct and listen is None:
        raise typer.BadParameter("needs --listen and --target; entries have direct = true")
    raise typer.Exit(run_up(listen, target, config, os.environ, is_direct=direct, is_once=once))


@app.command()
def proxy(
    listen: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT", help="Local address. Default: proxy.listen, 127.0.0.1:1080."
        ),
    ] = None,
    config: ConfigOption = None,
) -> None:
    """Serve SOCKS5, SOCKS4a and HTTP on a local port; names are resolved at the gateway."""
    from toppy.cli.proxy import run_proxy  # noqa: PLC0415

    raise typer.Exit(run_proxy(listen, config, os.environ))


@app.command("ssh-proxy")
def ssh_proxy(
    host: Annotated[str, typer.Argument(metavar="HOST", help="%h of OpenSSH.")],
    port: Annotated[int, typer.Argument(metavar="PORT", min=1, max=65535, help="%p of OpenSSH.")],
    config: ConfigOption = None,
) -> None:
    """Connect standard input and output to a target: a ProxyCommand for OpenSSH."""
    from toppy.cli.ssh_proxy import run_ssh_proxy  # noqa: PLC0415

    raise typer.Exit(run_ssh_proxy(host, port, config, os.environ))


@app.command(
    "exec", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False}
)
def exec_(
    command: Annotated[
        list[str], typer.Argument(metavar="COMMAND…", help="After --: the program, its arguments.")
    ],
    config: ConfigOption = None,
) -> None:
    """Run a program with the proxy variables set, and a proxy as long as it runs."""
    from toppy.cli.exec import run_exec  # noqa: PLC0415

    raise typer.Exit(run_exec(command, config, os.environ))


@app.command()
def doctor(
    config: ConfigOption = None,
    target: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Ask both policies about it, too. Default: $TOPPY_DOCTOR_TARGET",
        ),
    ] = None,
    protocol: Annotated[
        Literal["udp", "tcp"] | None,
        typer.Option(help="Ask about the target by this alone. Default: both"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print facts as JSON.")] = False,
) -> None:
    """Check configuration, gateway, path and policy; say what to do about what fails."""
    from toppy.cli.doctor import run_doctor  # noqa: PLC0415

    raise typer.Exit(
        run_doctor(config, os.environ, as_json=as_json, target=target, protocol=protocol)
    )


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
    open_missing_standard_descriptors()
    sys.exit(app())
