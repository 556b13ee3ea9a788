"""``toppy-gw cert``: make, show and check certificates."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from toppy.errors import ConfigError
from toppy.model.key_type import MAX_DAYS, KeyType

if TYPE_CHECKING:
    from toppy.control.certificates import AuthorityFiles, Wish

cert_app = typer.Typer(
    help="Certificates: a private CA, what it signs, and whether it is good.", no_args_is_help=True
)

Directory = Annotated[Path, typer.Argument(metavar="DIR", help="Where the files go.")]
KeyTypeOption = Annotated[KeyType, typer.Option("--key-type", help="Kind of the new key.")]
DaysOption = Annotated[
    int | None,
    typer.Option("--days", min=1, max=MAX_DAYS, metavar="N", help="How long it is good."),
]
EncryptOption = Annotated[
    bool, typer.Option("--encrypt", help="Encrypt the new key; the passphrase is asked for.")
]
PassphraseOption = Annotated[
    Path | None,
    typer.Option(
        "--passphrase-file", metavar="FILE", help="The same, with the first line of a file."
    ),
]
CaOption = Annotated[
    Path | None,
    typer.Option("--ca", metavar="FILE", help="The CA's certificate. Default: DIR/ca.pem"),
]
CaKeyOption = Annotated[
    Path | None,
    typer.Option("--ca-key", metavar="FILE", help="Its key. Default: ca-key.pem beside it"),
]
CaPassphraseOption = Annotated[
    Path | None,
    typer.Option(
        "--ca-passphrase-file",
        metavar="FILE",
        help="Opens the CA's key. Without it the passphrase is asked for.",
    ),
]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace files that exist.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print facts as JSON.")]


@cert_app.command()
def ca(
    directory: Directory,
    *,
    name: Annotated[
        str, typer.Option("--name", metavar="NAME", help="Common name.")
    ] = "toppy private CA",
    key_type: KeyTypeOption = KeyType.ECDSA_P256,
    days: DaysOption = None,
    encrypt: EncryptOption = False,
    passphrase_file: PassphraseOption = None,
    force: ForceOption = False,
) -> None:
    """Make a CA: ca.pem for everybody, ca-key.pem for a safe place (default 3,650 days)."""
    from toppy.control.certificates import write_ca  # noqa: PLC0415

    try:
        wish = _wish(directory, key_type, days, passphrase_file, encrypt=encrypt, force=force)
        _say_written(write_ca(wish, name))
    except ConfigError as error:
        _fail(error)


@cert_app.command()
def server(
    directory: Directory,
    *,
    name: Annotated[
        list[str] | None,
        typer.Option("--name", metavar="NAME", help="Host name or address; several may be given."),
    ] = None,
    ca: CaOption = None,
    ca_key: CaKeyOption = None,
    ca_passphrase_file: CaPassphraseOption = None,
    key_type: KeyTypeOption = KeyType.ECDSA_P256,
    days: DaysOption = None,
    encrypt: EncryptOption = False,
    passphrase_file: PassphraseOption = None,
    force: ForceOption = False,
) -> None:
    """Make a gateway's server.pem and server-key.pem: localhost and every --name (825 days)."""
    from toppy.control.certificates import write_server  # noqa: PLC0415

    try:
        signer = _authority(directory, ca, ca_key, ca_passphrase_file)
        wish = _wish(directory, key_type, days, passphrase_file, encrypt=encrypt, force=force)
        _say_written(write_server(wish, signer, tuple(name or ())))
    except ConfigError as error:
        _fail(error)
    typer.echo("\na running gateway takes it with: toppy-gw reload")


@cert_app.command()
def client(
    directory: Directory,
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="Who it is; rules call it cert:NAME.")
    ],
    *,
    ca: CaOption = None,
    ca_key: CaKeyOption = None,
    ca_passphrase_file: CaPassphraseOption = None,
    key_type: KeyTypeOption = KeyType.ECDSA_P256,
    days: DaysOption = None,
    encrypt: EncryptOption = False,
    passphrase_file: PassphraseOption = None,
    force: ForceOption = False,
) -> None:
    """Make a client's NAME.pem and NAME-key.pem (365 days)."""
    from toppy.control.certificates import write_client  # noqa: PLC0415
    from toppy.control.init import toml_text  # noqa: PLC0415

    try:
        signer = _authority(directory, ca, ca_key, ca_passphrase_file)
        wish = _wish(directory, key_type, days, passphrase_file, encrypt=encrypt, force=force)
        written = write_client(wish, signer, name)
        _say_written(written)
    except ConfigError as error:
        _fail(error)
    subject = name if "@" in name else name.lower()  # host names have no case
    typer.echo(f'\nrules of the gateway call it: subjects = ["cert:{subject}"]')
    typer.echo("\nin the client's configuration:")
    for key, path in zip(("client_certificate", "client_key"), written, strict=True):
        typer.echo(f"  {key} = {toml_text(str(path))}")


@cert_app.command()
def show(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="PEM files.")],
    *,
    as_json: JsonOption = False,
) -> None:
    """Say what is in certificates: names, issuer, key, days left, fingerprint."""
    from toppy.cli.certificate_report import show_files  # noqa: PLC0415

    try:
        typer.echo(show_files(files, as_json=as_json))
    except ConfigError as error:
        _fail(error)


@cert_app.command()
def check(
    certificate: Annotated[
        Path | None,
        typer.Argument(metavar="[FILE]", help="PEM file. Default: the configured certificate."),
    ] = None,
    *,
    key: Annotated[
        Path | None, typer.Option("--key", metavar="FILE", help="Its private key.")
    ] = None,
    ca: Annotated[
        Path | None, typer.Option("--ca", metavar="FILE", help="The CA that clients trust.")
    ] = None,
    name: Annotated[
        list[str] | None,
        typer.Option("--name", metavar="NAME", help="A name that clients use for the gateway."),
    ] = None,
    is_client: Annotated[
        bool, typer.Option("--client", help="It is a client's, not a gateway's.")
    ] = False,
    passphrase_file: Annotated[
        Path | None,
        typer.Option("--passphrase-file", metavar="FILE", help="Opens an encrypted key."),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option("--config", "-c", metavar="FILE", help="Default: /etc/toppy/gateway.toml"),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check that a certificate fits its key, is valid, is for its names and leads to its CA."""
    from toppy.cli.certificate_report import Question, check_files  # noqa: PLC0415

    question = Question(
        certificate=certificate,
        key=key,
        ca=ca,
        names=tuple(name or ()),
        is_client=is_client,
        passphrase_file=passphrase_file,
        config=config,
    )
    try:
        text, is_good = check_files(question, os.environ, ask=_ask, as_json=as_json)
    except ConfigError as error:
        _fail(error)
    typer.echo(text)
    raise typer.Exit(0 if is_good else 1)


def _wish(
    directory: Path,
    key_type: KeyType,
    days: int | None,
    passphrase_file: Path | None,
    *,
    encrypt: bool,
    force: bool,
) -> Wish:
    from toppy.control.certificates import (  # noqa: PLC0415
        Wish,
        check_new_passphrase,
        read_passphrase,
    )

    passphrase = None
    if passphrase_file is not None:
        passphrase = check_new_passphrase(read_passphrase(passphrase_file))
    elif encrypt:
        passphrase = check_new_passphrase(_ask("passphrase of the new key", confirm=True))
    return Wish(directory, key_type, days, passphrase, force)


def _authority(
    directory: Path, ca: Path | None, ca_key: Path | None, passphrase_file: Path | None
) -> AuthorityFiles:
    from toppy.control.certificates import AuthorityFiles, read_passphrase  # noqa: PLC0415
    from toppy.system.certificate_files import is_encrypted  # noqa: PLC0415
    from toppy.system.files import read_file  # noqa: PLC0415

    certificate = ca or directory / "ca.pem"
    key = ca_key or certificate.with_name("ca-key.pem")
    if not certificate.exists() and ca is None:
        raise ConfigError(
            f"there is no CA in {directory}; make one (toppy-gw cert ca {directory}), or name "
            "yours with --ca and --ca-key"
        )
    passphrase = None
    if is_encrypted(read_file(key, "--ca-key")):
        passphrase = (
            read_passphrase(passphrase_file)
            if passphrase_file is not None
            else _ask(f"passphrase of {key}")
        )
    return AuthorityFiles(certificate, key, passphrase)


def _ask(what: str, *, confirm: bool = False) -> bytes:
    """From the terminal, unseen. Raises ``ConfigError`` where there is none."""
    import getpass  # noqa: PLC0415

    if not has_terminal():
        raise ConfigError(
            f"{what}: there is no terminal to ask on; use --passphrase-file (or "
            "--ca-passphrase-file)"
        )
    given = getpass.getpass(f"{what}: ")
    if confirm and getpass.getpass("once more: ") != given:
        raise ConfigError("the two passphrases differ; nothing was written")
    return given.encode()


def has_terminal() -> bool:
    """Whether a person can be asked."""
    return sys.stdin.isatty()


def _say_written(paths: list[Path]) -> None:
    for path in paths:
        typer.echo(f"wrote {path}")


def _fail(error: ConfigError) -> NoReturn:
    typer.echo(f"toppy-gw: {error}", err=True)
    raise typer.Exit(1)
