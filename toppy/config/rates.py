"""Rates and quotas as they are written: ``[rates]``, and ``limits`` of a rule."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from toppy.config.section import Section, setting
from toppy.model.rate import UNLIMITED, Rate

_MOST_PER_SEC = 10**12
_LEAST_QUOTA_BYTES = 1 << 20
"""Less would be used up before anybody noticed; a datagram has up to 65,507 bytes."""
_DAY_S = 86_400


def _rate(bytes_per_sec: int, burst_bytes: int | None) -> Rate:
    if not bytes_per_sec:
        return UNLIMITED
    return Rate(bytes_per_sec, bytes_per_sec if burst_bytes is None else burst_bytes)


def _check_pair(what: str, bytes_per_sec: int, burst_bytes: int | None) -> None:
    """T-037: half a limit is a mistake."""
    if bytes_per_sec and burst_bytes == 0:
        raise ValueError(
            f"{what}burst_bytes = 0 lets nothing through; leave it out (then it is as large as "
            f"{what}bytes_per_sec), or set both to 0 for no limit"
        )
    if not bytes_per_sec and burst_bytes:
        raise ValueError(
            f"{what}burst_bytes has no effect without {what}bytes_per_sec; set both or neither"
        )


def _bytes_per_sec(description: str) -> int:
    value: int = setting(0, f"{description} 0: no limit.", ge=0, le=_MOST_PER_SEC, applies="hot")
    return value


def _burst_bytes(name: str) -> int | None:
    value: int | None = setting(
        None,
        f"So much at once. Default: as much as `{name}`. A larger datagram never passes.",
        ge=0,
        le=_MOST_PER_SEC,
        applies="hot",
    )
    return value


class RatesSection(Section):
    """How many payload bytes per second may go through, in each direction. Over a rate, datagrams
    are dropped and counted, TCP is slowed. See `docs/rates.md`.
    """

    udp_bytes_per_sec: int = _bytes_per_sec("Of each UDP tunnel (one local peer of a client).")
    udp_burst_bytes: int | None = _burst_bytes("udp_bytes_per_sec")
    tcp_bytes_per_sec: int = _bytes_per_sec("Of each TCP tunnel.")
    tcp_burst_bytes: int | None = _burst_bytes("tcp_bytes_per_sec")
    subject_bytes_per_sec: int = _bytes_per_sec("Of all tunnels of one subject together.")
    subject_burst_bytes: int | None = _burst_bytes("subject_bytes_per_sec")

    @model_validator(mode="after")
    def _whole(self) -> RatesSection:
        _check_pair("udp_", self.udp_bytes_per_sec, self.udp_burst_bytes)
        _check_pair("tcp_", self.tcp_bytes_per_sec, self.tcp_burst_bytes)
        _check_pair("subject_", self.subject_bytes_per_sec, self.subject_burst_bytes)
        return self

    @property
    def udp(self) -> Rate:
        """Of each UDP tunnel and direction."""
        return _rate(self.udp_bytes_per_sec, self.udp_burst_bytes)

    @property
    def tcp(self) -> Rate:
        """Of each TCP tunnel and direction."""
        return _rate(self.tcp_bytes_per_sec, self.tcp_burst_bytes)

    @property
    def subject(self) -> Rate:
        """Of each subject and direction."""
        return _rate(self.subject_bytes_per_sec, self.subject_burst_bytes)


class RuleLimits(BaseModel):
    """What all tunnels that a rule allows share. A 0 means no limit."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bytes_per_sec: int = Field(
        0,
        description="Payload bytes, of all tunnels of the rule together, in each direction.",
        ge=0,
        le=_MOST_PER_SEC,
    )
    burst_bytes: int | None = Field(
        None,
        description=(
            "So much at once. Default: as much as `bytes_per_sec`. A larger datagram never passes."
        ),
        ge=0,
        le=_MOST_PER_SEC,
    )
    datagrams_per_sec: int = Field(
        0,
        description="UDP datagrams, likewise; as many at once.",
        ge=0,
        le=_MOST_PER_SEC,
    )
    tunnels: int = Field(0, description="Open at once, of all subjects together.", ge=0, le=10**9)
    tunnels_per_subject: int = Field(0, description="Open at once, of one subject.", ge=0, le=10**9)
    quota_bytes: int = Field(
        0,
        description=(
            "Payload bytes of one subject in a period, both directions together; then its tunnels "
            f"end. At least {_LEAST_QUOTA_BYTES}, or 0."
        ),
        ge=0,
        le=10**18,
    )
    quota_period_s: int = Field(
        _DAY_S,
        description=(
            "Seconds. Periods are counted from the beginning of 1970 in UTC: one of 86400 begins "
            "at 00:00 UTC."
        ),
        ge=60,
        le=366 * _DAY_S,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _is_number(cls, value: object) -> object:
        # pydantic takes true for 1
        if isinstance(value, bool):
            raise ValueError("must not be true or false")  # noqa: TRY004  # pydantic's protocol
        return value

    @field_validator("quota_bytes")
    @classmethod
    def _large_enough(cls, value: int) -> int:
        if 0 < value < _LEAST_QUOTA_BYTES:
            raise ValueError(f"must be 0 or at least {_LEAST_QUOTA_BYTES}")
        return value

    @model_validator(mode="after")
    def _whole(self) -> RuleLimits:
        _check_pair("", self.bytes_per_sec, self.burst_bytes)
        return self

    @property
    def rate(self) -> Rate:
        """Bytes, of all tunnels and per direction."""
        return _rate(self.bytes_per_sec, self.burst_bytes)

    @property
    def datagram_rate(self) -> Rate:
        """Datagrams, likewise."""
        return Rate(self.datagrams_per_sec, self.datagrams_per_sec)


NO_RULE_LIMITS = RuleLimits.model_validate({})
