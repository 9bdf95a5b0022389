"""Limits of an NBD server, against clients that ask for too much, or for nothing and stay."""

from __future__ import annotations

import msgspec

from cbwcore.errors import ConfigError
from cbwcore.nbd.protocol import NBD_MAX_STRING

__all__ = ["NbdLimits"]

MAX_SECONDS = 86400.0
RANGES = {
    "request": (4096, 1 << 27),  # the largest buffer of the core
    "drain": (4096, (1 << 32) - 1),
    "connections": (1, 4096),  # the seats of the core
    "negotiating": (1, 65536),
    "options": (1, 65536),
    "option_bytes": (64, 1 << 24),
    "string_bytes": (1, NBD_MAX_STRING),
    "queries": (1, 64),  # each may select a context, and a connection of the core has no more
    "extents": (1, 1 << 20),
    "bytes_in_flight": (4096, 1 << 62),
}


class NbdLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What a server and each of its connections may take; raises ConfigError with the value and the limit.

    A connection: ``request`` (bytes of a READ or WRITE that is served), ``drain`` (bytes of a larger WRITE, or of an
    option, that are read and refused; above, the client is dropped), ``handshake_seconds`` (for all of the handshake),
    ``stall_seconds`` (without progress inside a request or a reply), ``options`` (how many), ``option_bytes`` (of
    one), ``string_bytes`` (of a name or query), ``queries`` (of one meta context option), ``extents`` (of one reply).

    The server: ``connections``, ``negotiating`` (those of them in the handshake), ``bytes_in_flight`` (of requests and
    replies, reserved before they are allocated)."""

    request: int = 32 << 20
    drain: int = 64 << 20
    connections: int = 100
    negotiating: int = 16
    handshake_seconds: float = 10.0
    stall_seconds: float = 30.0
    options: int = 32
    option_bytes: int = 65536
    string_bytes: int = NBD_MAX_STRING
    queries: int = 64
    extents: int = 1 << 17
    bytes_in_flight: int = 256 << 20

    def __post_init__(self) -> None:
        for name, (least, most) in RANGES.items():
            value = getattr(self, name)
            if not isinstance(value, int) or not least <= value <= most:
                raise ConfigError(f"{name} {value!r} is no number in {least}..{most}")
        for name in ("handshake_seconds", "stall_seconds"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 < value <= MAX_SECONDS:
                raise ConfigError(f"{name} {value!r} is no number of seconds above 0, up to {MAX_SECONDS}")
        buffer = 1 << (self.request - 1).bit_length()  # they come in powers of two
        for name, needed in (("drain", self.request), ("bytes_in_flight", buffer)):
            value = getattr(self, name)
            if value < needed:
                raise ConfigError(f"{name} {value} is less than the {needed} bytes of a request of {self.request}")
