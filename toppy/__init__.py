"""toppy: a self-hosted secure-access gateway (MASQUE over QUIC) and its client."""

__version__ = "0.1.0"
