"""``toppy audit`` and ``toppy-gw audit``: the same commands, each on its own program's log."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from toppy.cli.audit_log import AuditPlace

ConfigOption = Annotated[
    str | None, typer.Option("--config", "-c", metavar="FILE", help="As the other commands.")
]
PathOption = Annotated[
    Path | None, typer.Option("--path", metavar="FILE", help="Another log than the program's own.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print facts as JSON.")]


class ExportFormat(StrEnum):
    CSV = "csv"
    JSON = "json"
    JSONL = "jsonl"


def audit_app(program: str) -> typer.Typer:
    """The commands for ``toppy`` or ``toppy-gw``."""
    app = typer.Typer(
        help="The audit log: what happened, and that it is what was written.",
        no_args_is_help=True,
    )

    def place(config: str | None, path: Path | None) -> AuditPlace:
        from toppy.cli.audit_log import find_client_log, find_gateway_log  # noqa: PLC0415

        find = find_gateway_log if program == "toppy-gw" else find_client_log
        return find(config, os.environ, path)

    @app.command()
    def verify(
        *,
        path: PathOption = None,
        signing_key: Annotated[
            str | None,
            typer.Option(
                metavar="KEY", help="HMAC secret. Default: the configuration's, which `ps` hides."
            ),
        ] = None,
        public_key: Annotated[
            Path | None, typer.Option(metavar="FILE", help="Ed25519 public key in PEM.")
        ] = None,
        checkpoints: Annotated[
            Path | None, typer.Option(metavar="FILE", help="Another file of checkpoints.")
        ] = None,
        allow_unsigned: Annotated[
            bool, typer.Option("--allow-unsigned", help="Entries may be without a signature.")
        ] = False,
        every_signature: Annotated[
            bool,
            typer.Option(
                "--every-signature",
                help="Check also the Ed25519 signatures that a later one covers.",
            ),
        ] = False,
        config: ConfigOption = None,
        as_json: JsonOption = False,
    ) -> None:
        """Check every entry, the chain, the signatures, and that the end was not cut off."""
        from toppy.cli.audit_log import run_verify  # noqa: PLC0415

        raise typer.Exit(
            run_verify(
                lambda: place(config, path),
                signing_key=signing_key,
                public_key=public_key,
                checkpoints=checkpoints,
                unsigned=allow_unsigned,
                every_signature=every_signature,
                as_json=as_json,
            )
        )

    @app.command()
    def tail(
        path: PathOption = None,
        lines: Annotated[
            int, typer.Option("--lines", "-n", min=0, max=100_000, help="How many entries.")
        ] = 10,
        follow: Annotated[
            bool, typer.Option("--follow", "-f", help="Then each new one, until Ctrl-C.")
        ] = False,
        config: ConfigOption = None,
        as_json: JsonOption = False,
    ) -> None:
        """Show the last entries."""
        from toppy.cli.audit_log import run_tail  # noqa: PLC0415

        raise typer.Exit(
            run_tail(lambda: place(config, path), lines, follow=follow, as_json=as_json)
        )

    @app.command()
    def ship(
        path: PathOption = None,
        batch_size: Annotated[
            int | None,
            typer.Option(min=1, max=10_000, help="Entries of one request; 1: one as an object."),
        ] = None,
        url: Annotated[str | None, typer.Option(metavar="URL", help="Another collector.")] = None,
        config: ConfigOption = None,
        as_json: JsonOption = False,
    ) -> None:
        """Send what the collector does not have yet."""
        from toppy.cli.audit_log import run_ship  # noqa: PLC0415

        raise typer.Exit(run_ship(lambda: place(config, path), batch_size, url, as_json=as_json))

    @app.command("remote-verify")
    def remote_verify(
        path: PathOption = None,
        url: Annotated[
            str | None, typer.Option(metavar="URL", help="Default: $TOPPY_AUDIT_VERIFY_URL.")
        ] = None,
        config: ConfigOption = None,
        as_json: JsonOption = False,
    ) -> None:
        """Send the whole log to one who has a copy, and say what the answer is."""
        from toppy.cli.audit_log import run_remote_verify  # noqa: PLC0415

        raise typer.Exit(run_remote_verify(lambda: place(config, path), url, as_json=as_json))

    @app.command()
    def export(
        *,
        path: PathOption = None,
        format: Annotated[ExportFormat, typer.Option("--format", "-f")] = ExportFormat.CSV,
        output: Annotated[
            Path | None, typer.Option("--output", "-o", metavar="FILE", help="Default: stdout.")
        ] = None,
        since: Annotated[
            str | None,
            typer.Option(metavar="TIME", help="ISO 8601, such as 2026-11-21 or 2026-11-21T09:00Z."),
        ] = None,
        until: Annotated[str | None, typer.Option(metavar="TIME", help="Before that.")] = None,
        action: Annotated[
            list[str] | None,
            typer.Option(metavar="NAME", help="Only such, such as tunnel.denied; may be repeated."),
        ] = None,
        denied: Annotated[
            bool, typer.Option("--denied", help="Only what was not allowed.")
        ] = False,
        config: ConfigOption = None,
    ) -> None:
        """Write entries as a table or as JSON, with their facts taken apart."""
        from toppy.cli.audit_log import run_export  # noqa: PLC0415

        raise typer.Exit(
            run_export(
                lambda: place(config, path),
                format.value,
                output,
                since=since,
                until=until,
                actions=frozenset(action or ()),
                only_denied=denied,
            )
        )

    return app
