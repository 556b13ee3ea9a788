"""The gateway's ``[auth]`` tables: who may use it, by which proof, and under which name."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, SecretStr, field_validator, model_validator

from toppy.config.section import CommaList, Section, check_token, setting
from toppy.config.tls import ClientCertificateSection

JwtAlgorithm = Literal[
    "HS256",
    "HS384",
    "HS512",
    "RS256",
    "RS384",
    "RS512",
    "PS256",
    "PS384",
    "PS512",
    "ES256",
    "ES384",
    "ES512",
    "EdDSA",
]
MIN_TOKEN_CHARACTERS = 8
MIN_SECRET_BYTES = 16
SUBJECT_PREFIX_PATTERN = r"^([A-Za-z0-9._-]{1,64}[:/|])?$"


class JwtSection(Section):
    """JSON Web Tokens that the gateway accepts. `exp` is required in them."""

    secret: SecretStr | None = setting(
        None, "HMAC secret (HS256), at least 16 bytes.", applies="hot"
    )
    secret_file: str = setting("", "File with the HMAC secret; mode 0600.", applies="hot")
    public_key_file: str = setting("", "PEM public key: RSA, EC or Ed25519.", applies="hot")
    jwks_file: str = setting("", "JWK set with public keys, chosen by `kid`.", applies="hot")
    algorithms: tuple[JwtAlgorithm, ...] = setting(
        (),
        "Narrows what the keys allow, for example `['ES256']`. Empty: what fits the key.",
        applies="hot",
    )
    issuer: str = setting("", "Required `iss`; empty: any.", applies="hot")
    audience: str = setting("", "Required in `aud`; empty: any.", applies="hot")
    subject_prefix: str = setting(
        "",
        "Put before `sub` wherever a subject is named: rules, `kick`, the audit log. It ends in "
        "`:`, `/` or `|`, such as `services:`. Required in one of the two where `[auth.jwt]` and "
        "`[auth.oidc]` are both configured: one issuer's alice is not the other's.",
        pattern=SUBJECT_PREFIX_PATTERN,
        applies="hot",
    )
    leeway_s: float = setting(
        60.0, "Clock difference allowed, in seconds.", ge=0, le=600, applies="hot"
    )

    @property
    def is_configured(self) -> bool:
        """Whether there is any key."""
        return bool(self.secret or self.secret_file or self.public_key_file or self.jwks_file)

    @field_validator("secret")
    @classmethod
    def _long_enough(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and len(value.get_secret_value().encode()) < MIN_SECRET_BYTES:
            raise ValueError(f"is too short: at least {MIN_SECRET_BYTES} bytes")
        return value

    @model_validator(mode="after")
    def _has_key(self) -> JwtSection:
        if self.secret is not None and self.secret_file:
            raise ValueError("give secret or secret_file, not both")
        if self.model_fields_set and not self.is_configured:
            raise ValueError("needs one of secret, secret_file, public_key_file, jwks_file")
        return self


class RoleSection(Section):
    """A claim of the issuer's tokens, and the role that it gives; rules name roles."""

    role: str = setting(..., "What rules call it (`roles`).", min_length=1, applies="hot")
    claim: str = setting(
        ...,
        "Of the token; `realm_access.roles` is `roles` in the table `realm_access`.",
        min_length=1,
        applies="hot",
    )
    values: CommaList = setting(
        ..., "The claim is, or has in its list, any of these.", min_length=1, applies="hot"
    )


class OidcSection(Section):
    """Access tokens (JWT) of an OpenID issuer. While it is down, the keys that are known serve."""

    issuer: str = setting(
        "", "Issuer URL, exactly as the provider writes it; https.", applies="hot"
    )
    audience: str = setting(
        "", "Required in `aud`: what the provider calls this gateway.", applies="hot"
    )
    subject_prefix: str = setting(
        "",
        "Put before `sub` wherever a subject is named: rules, `kick`, the audit log. It ends in "
        "`:`, `/` or `|`, such as `staff:`. Required in one of the two where `[auth.jwt]` and "
        "`[auth.oidc]` are both configured: one issuer's alice is not the other's.",
        pattern=SUBJECT_PREFIX_PATTERN,
        applies="hot",
    )
    leeway_s: float = setting(
        60.0, "Clock difference allowed, in seconds.", ge=0, le=600, applies="hot"
    )
    refresh_s: float = setting(
        300.0, "Keys are fetched so often, in seconds.", ge=10, le=86_400, applies="hot"
    )
    roles: tuple[RoleSection, ...] = setting((), "See below.", applies="hot")

    @property
    def is_configured(self) -> bool:
        """Whether there is an issuer."""
        return bool(self.issuer)

    @model_validator(mode="after")
    def _complete(self) -> OidcSection:
        if bool(self.issuer) != bool(self.audience):
            missing = "audience" if self.issuer else "issuer"
            raise ValueError(
                f"issuer and audience go together; {missing} is missing (without an audience, "
                "tokens that the issuer made for others would be taken)"
            )
        if not self.issuer and self.model_fields_set:
            raise ValueError("needs issuer and audience")
        if self.issuer and not re.fullmatch(
            r"https://[!-~]+|http://(localhost|127\.0\.0\.1|\[::1\])([:/][!-~]*)?", self.issuer
        ):
            raise ValueError("issuer: must begin with https:// (http:// only on loopback)")
        return self


class AuthSection(Section):
    """Who may use the gateway. Every method that is configured is accepted."""

    token: SecretStr | None = setting(None, "A shared token, at least 8 characters.", applies="hot")
    token_file: str = setting("", "File with the shared token; mode 0600.", applies="hot")
    jwt: JwtSection = Field(default_factory=JwtSection)
    oidc: OidcSection = Field(default_factory=OidcSection)
    client_certificate: ClientCertificateSection = Field(default_factory=ClientCertificateSection)

    @field_validator("token")
    @classmethod
    def _sendable(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            check_token(value.get_secret_value(), min_characters=MIN_TOKEN_CHARACTERS)
        return value

    @model_validator(mode="after")
    def _one_token(self) -> AuthSection:
        if self.token is not None and self.token_file:
            raise ValueError("give token or token_file, not both")
        return self

    @model_validator(mode="after")
    def _names_apart(self) -> AuthSection:
        jwt, oidc = self.jwt.subject_prefix, self.oidc.subject_prefix
        for prefix in (jwt, oidc):
            if prefix == "cert:":
                raise ValueError("subject_prefix: cert: stands for client certificates")
        if not (self.jwt.is_configured and self.oidc.is_configured):
            return self
        if jwt == oidc or (jwt and oidc and (jwt.startswith(oidc) or oidc.startswith(jwt))):
            raise ValueError(
                "[auth.jwt] and [auth.oidc] would name their subjects alike, and one issuer's "
                "alice could be the other's: set subject_prefix in one of the two tables, such "
                'as subject_prefix = "staff:" in [auth.oidc], and write rules with it'
            )
        return self

    @property
    def is_configured(self) -> bool:
        """Whether anybody must prove anything."""
        return bool(
            self.token
            or self.token_file
            or self.jwt.is_configured
            or self.oidc.is_configured
            or self.client_certificate.accept
        )
