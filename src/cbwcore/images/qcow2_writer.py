"""Writing qcow2 images."""

from __future__ import annotations

import os

from cbwcore.errors import ConfigError
from cbwcore.images.digest import Piece

__all__ = ["Qcow2Writer", "backing_name"]


def backing_name(image: str, backing: str) -> bytes:
    """How ``image`` names ``backing``: relative to its own folder, and never such that QEMU takes it for a protocol."""
    folder = os.path.realpath(os.path.dirname(os.path.abspath(image)))
    name = os.fsencode(os.path.relpath(os.path.realpath(backing), folder))
    return b"./" + name if b":" in name.split(b"/", 1)[0] else name


class Qcow2Writer:
    """To come."""

    def __init__(
        self,
        fd: int,
        size: int,
        *,
        compress: str | None,
        layered: bool,
        backing: bytes | None,
        backing_format: str | None,
    ) -> None:
        raise ConfigError("qcow2 is not there yet")

    def begin(self, piece: Piece) -> None:
        """A piece was announced."""

    def write(self, piece: Piece, view: memoryview, zeroes: bytes) -> None:
        """Store a piece."""

    def write_zeroes(self, piece: Piece) -> None:
        """Store a piece of zeroes."""

    def settle(self, offset: int) -> None:
        """All pieces below ``offset`` are stored."""

    def seal(self, backup_id: str) -> int:
        """Write all but the header, durably."""
        return 0

    def complete(self) -> None:
        """Write the header, durably."""

    def spoil(self) -> None:
        """Take the header back."""
