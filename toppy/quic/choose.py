"""Which engine: the native one where it was built, otherwise the portable one."""

from __future__ import annotations

from typing import Literal

from toppy.errors import ConfigError
from toppy.quic.engine import Engine, EngineConfig, Gate

EngineName = Literal["auto", "native", "aioquic"]

SLOW_ENGINE_NOTICE = (
    "running on the portable engine (aioquic), about ten times slower: "
    "the native one is built by `pip install` where a Rust toolchain is"
)


def has_native_engine() -> bool:
    """Whether the native engine was built for this installation."""
    try:
        import toppy.quic._native  # noqa: F401, PLC0415  # absent where there was no Rust
    except ImportError:
        return False
    return True


def choose_engine(name: str) -> Literal["native", "aioquic"]:
    """What ``name`` (``auto``, ``native`` or ``aioquic``) means here.

    Raises ``ConfigError`` for ``native`` where it was not built.
    """
    if name == "aioquic":
        return "aioquic"
    if has_native_engine():
        return "native"
    if name == "native":
        raise ConfigError(
            "quic.engine = native, but the native engine was not built: install toppy where a "
            "Rust toolchain is, or set quic.engine = auto",
            key="quic.engine",
        )
    return "aioquic"


def make_engine(
    name: str, config: EngineConfig, *, gate: Gate | None = None, now: float = 0.0
) -> Engine:
    """An engine of the chosen kind."""
    if choose_engine(name) == "native":
        from toppy.quic.native_engine import NativeEngine  # noqa: PLC0415

        return NativeEngine(config, gate=gate, now=now)
    from toppy.quic.aioquic_engine import AioquicEngine  # noqa: PLC0415  # slow to import

    return AioquicEngine(config, gate=gate, now=now)
