"""A snapshot as a file object."""

from __future__ import annotations

import io
import os
from operator import index
from typing import TYPE_CHECKING, Any

from cbwcore.errors import ConfigError

if TYPE_CHECKING:
    from cbwcore.snapshot import Snapshot

__all__ = ["SnapshotFile"]


class SnapshotFile(io.RawIOBase):
    """The T0 data as a read-only, seekable raw stream; errors are those of `Snapshot.pread`. Several may be open."""

    def __init__(self, snapshot: Snapshot) -> None:
        super().__init__()
        self._snapshot = snapshot
        self._position = 0

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Move to ``offset`` bytes from start, position or end; past the end, reads give nothing."""
        self._check()
        offset = index(offset)
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._snapshot.size}
        if whence not in base:
            raise ConfigError(f"whence {whence} is not 0, 1 or 2")
        if base[whence] + offset < 0:
            raise ConfigError(f"position {base[whence] + offset} is negative")
        self._position = base[whence] + offset
        return self._position

    def tell(self) -> int:
        """The position in bytes."""
        self._check()
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        """Fill ``buffer`` from the position on; how many bytes, 0 at the end."""
        self._check()
        with memoryview(buffer).cast("B") as view:
            n = max(0, min(len(view), self._snapshot.size - self._position))
            with view[:n] as part:
                self._snapshot.pread_into(part, min(self._position, self._snapshot.size))
        self._position += n
        return n

    def _check(self) -> None:
        if self.closed:
            raise ValueError("I/O operation on closed file")
