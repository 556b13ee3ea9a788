"""``toppy policy check`` and ``toppy-gw policy check``: what the rules say, without a tunnel."""

from __future__ import annotations

import os
from enum import StrEnum
from typing import Annotated

import typer

from toppy.model.target import Protocol

ConfigOption = Annotated[
    str | None, typer.Option("--config", "-c", metavar="FILE", help="As the other commands.")
]
TargetOption = Annotated[
    str, typer.Option("--target", metavar="HOST:PORT", help="Where a tunnel would lead.")
]
AtOption = Annotated[
    str | None,
    typer.Option(
        "--at", metavar="TIME", help="Another moment: 2026-03-01T08:30Z; without an offset, UTC."
    ),
]
ExplainOption = Annotated[
    bool, typer.Option("--explain", help="Say of every rule why it does or does not match.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print facts, or the error, as JSON.")]
_HELP = "The policy: who may reach what, and by which rule."


class Transport(StrEnum):
    UDP = "udp"
    TCP = "tcp"


ProtocolOption = Annotated[
    Transport | None, typer.Option("--protocol", help="Of the tunnel. Default: ask for both.")
]


def _asked(protocol: Transport | None) -> tuple[Protocol, ...]:
    return ("udp", "tcp") if protocol is None else (protocol.value,)


def client_policy_app() -> typer.Typer:
    """The commands for ``toppy``."""
    app = typer.Typer(help=_HELP, no_args_is_help=True)

    @app.callback()
    def _policy() -> None:
        pass

    @app.command()
    def check(
        *,
        target: TargetOption,
        protocol: ProtocolOption = None,
        at: AtOption = None,
        explain: ExplainOption = False,
        config: ConfigOption = None,
        as_json: JsonOption = False,
    ) -> None:
        """Ask this client's own policy: exit code 0 all that was asked is allowed, 2 something is
        denied, 1 cannot be said.
        """
        from toppy.cli.policy_check import check_client, show  # noqa: PLC0415

        raise typer.Exit(
            show(
                "toppy",
                lambda: check_client(config, os.environ, target, _asked(protocol), at),
                explains=explain,
                as_json=as_json,
                is_list=protocol is None,
            )
        )

    return app


def gateway_policy_app() -> typer.Typer:
    """The commands for ``toppy-gw``."""
    app = typer.Typer(help=_HELP, no_args_is_help=True)

    @app.callback()
    def _policy() -> None:
        pass

    @app.command()
    def check(
        *,
        target: TargetOption,
        subject: Annotated[
            str,
            typer.Option(metavar="NAME", help="The token's sub; `token` is the static token."),
        ] = "token",
        role: Annotated[
            list[str] | None,
            typer.Option(metavar="ROLE", help="Has this role, beside those that rules give."),
        ] = None,
        group: Annotated[
            list[str] | None, typer.Option(metavar="GROUP", help="In the token's claim groups.")
        ] = None,
        claim: Annotated[
            list[str] | None,
            typer.Option(
                metavar="NAME=VALUE",
                help="A claim of the token. true, false and numbers are no texts; 'n=\"3\"' is.",
            ),
        ] = None,
        protocol: ProtocolOption = None,
        at: AtOption = None,
        explain: ExplainOption = False,
        config: ConfigOption = None,
        as_json: JsonOption = False,
    ) -> None:
        """Ask the policy of the configuration file, which need not run yet: exit code 0 all that
        was asked is allowed, 2 something is denied, 1 cannot be said. Names are resolved as the
        gateway would.
        """
        from toppy.cli.policy_check import check_gateway, show  # noqa: PLC0415

        raise typer.Exit(
            show(
                "toppy-gw",
                lambda: check_gateway(
                    config,
                    os.environ,
                    target,
                    _asked(protocol),
                    at,
                    subject=subject,
                    roles=tuple(role or ()),
                    groups=tuple(group or ()),
                    claims=tuple(claim or ()),
                ),
                explains=explain,
                as_json=as_json,
                is_list=protocol is None,
            )
        )

    return app
