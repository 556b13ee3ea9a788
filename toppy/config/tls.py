"""``[tls]`` and ``[auth.client_certificate]`` of ``gateway.toml``."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import SecretStr, field_validator, model_validator

from toppy.config.section import CommaList, Section, setting

ClientCertificates = Literal["none", "optional", "required"]
CIPHER_SUITES = (
    "TLS_AES_256_GCM_SHA384",
    "TLS_AES_128_GCM_SHA256",
    "TLS_CHACHA20_POLY1305_SHA256",
)
"""Of TLS 1.3 (RFC 8446 appendix B.4), those that QUIC and both engines have."""


class TlsSection(Section):
    """The gateway's certificate, and those of clients; see `docs/certificates.md`. Without a
    certificate: self-signed for localhost, made at start.
    """

    enabled: bool = setting(True, "Always true: QUIC is encrypted by TLS.", applies="reload")
    min_version: str = setting(
        "TLSv1.3", "Always `TLSv1.3`: QUIC has no other (RFC 9001 section 4.2).", applies="reload"
    )
    certificate: str = setting("", "PEM file: the certificate, then its chain.", applies="reload")
    private_key: str = setting("", "PEM file: the certificate's key; mode 0600.", applies="reload")
    private_key_passphrase: SecretStr | None = setting(
        None, "Opens an encrypted key; rather use the file.", applies="reload"
    )
    private_key_passphrase_file: str = setting(
        "", "File with the passphrase of an encrypted key; mode 0600.", applies="reload"
    )
    allow_open_private_key: bool = setting(
        False,
        "Serve although every user of this machine can read the private key. Files below "
        "`/run/secrets` and `/run/credentials` are taken anyway.",
        applies="reload",
    )
    client_ca: str = setting(
        "", "PEM file: the CAs whose client certificates are accepted.", applies="reload"
    )
    client_certificates: ClientCertificates | None = setting(
        None,
        "`none`: not asked for; `optional`: verified where a client has one; `required`: nobody "
        "connects without one. Default: `required` with `client_ca`, else `none`.",
        applies="reload",
    )
    cipher_suites: CommaList = setting(
        (),
        f"Of TLS 1.3, in order of preference: {', '.join(f'`{each}`' for each in CIPHER_SUITES)}. "
        "Empty: all of them, as the engine prefers.",
        applies="reload",
    )

    @property
    def wanted_client_certificates(self) -> ClientCertificates:
        """``client_certificates``, with its default."""
        return self.client_certificates or ("required" if self.client_ca else "none")

    @field_validator("enabled")
    @classmethod
    def _always(cls, value: bool) -> bool:
        if not value:
            raise ValueError("must be true: QUIC is always encrypted; leave it out")
        return value

    @field_validator("min_version")
    @classmethod
    def _only_one(cls, value: str) -> str:
        if value.lower().replace(" ", "") not in ("tlsv1.3", "tls1.3", "1.3"):
            raise ValueError("must be 'TLSv1.3': QUIC has no earlier TLS; leave it out")
        return "TLSv1.3"

    @field_validator("cipher_suites")
    @classmethod
    def _of_tls_13(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name not in CIPHER_SUITES:
                raise ValueError(
                    f"{name!r} is no cipher suite of TLS 1.3 that QUIC uses; known are "
                    f"{', '.join(CIPHER_SUITES)}"
                )
        if len(set(value)) < len(value):
            raise ValueError("names a cipher suite twice")
        return value

    @model_validator(mode="after")
    def _complete(self) -> TlsSection:
        if bool(self.certificate) != bool(self.private_key):
            missing = "private_key" if self.certificate else "certificate"
            raise ValueError(f"certificate and private_key go together; {missing} is missing")
        if self.private_key_passphrase is not None and self.private_key_passphrase_file:
            raise ValueError("give private_key_passphrase or private_key_passphrase_file, not both")
        if self.has_passphrase and not self.private_key:
            raise ValueError("a passphrase, but no private_key that it could open")
        if self.wanted_client_certificates != "none" and not self.client_ca:
            raise ValueError(
                f"client_certificates = '{self.client_certificates}' needs client_ca: the CA that "
                "signs them (`toppy-gw cert ca`)"
            )
        return self

    @property
    def has_passphrase(self) -> bool:
        """Whether there is one, from wherever."""
        return self.private_key_passphrase is not None or bool(self.private_key_passphrase_file)


class ClientCertificateSection(Section):
    """Client certificates as credentials; `[tls] client_ca` says whose are accepted."""

    accept: bool = setting(
        False,
        "A verified certificate is enough: a client that shows no token is the subject "
        "`cert:NAME`. Without this it is asked for in addition to a token.",
        applies="hot",
    )
    name_from: Literal["san", "common_name"] = setting(
        "san",
        "What NAME is: `san`, the first DNS name, else mail address, else URI of its "
        "subjectAltName; or the `common_name` of its subject.",
        applies="hot",
    )

    @model_validator(mode="before")
    @classmethod
    def _not_in_vain(cls, value: Any) -> Any:
        if isinstance(value, dict) and value and "accept" not in value:
            raise ValueError("accept is missing: true makes a certificate a credential")
        return value
