"""Raw images: the disk's bytes at their own offsets, in a sparse file or on a block device."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

from cbwcore.images.digest import UNIT, Piece
from cbwcore.images.fileio import sync, write_all, zero_range

__all__ = ["RawDevice", "RawFile", "data_runs"]


def data_runs(view: memoryview, zeroes: bytes, unit: int = UNIT) -> Iterator[tuple[int, memoryview]]:
    """(offset in ``view``, bytes) of each longest run of units that are not flagged in ``zeroes``."""
    first, count = zeroes.find(0), len(zeroes)
    while first >= 0:
        end = zeroes.find(1, first)
        end = count if end < 0 else end
        yield first * unit, view[first * unit : end * unit]
        first = zeroes.find(0, end)


class RawFile:
    """A new sparse file, open as ``fd``: what is not written is a hole. OSError where it cannot be that large."""

    def __init__(self, fd: int, size: int) -> None:
        self._fd = fd
        self._size = size
        os.ftruncate(fd, size)

    def begin(self, piece: Piece) -> None:
        """A piece will come; what is between two pieces is zeroes."""

    def write(self, piece: Piece, view: memoryview, zeroes: bytes) -> None:
        """Store the units that are not zeroes. Thread-safe."""
        for start, run in data_runs(view, zeroes):
            write_all(self._fd, run, piece.offset + start)

    def write_zeroes(self, piece: Piece) -> None:
        """Zeroes are there already."""

    def settle(self, offset: int) -> None:
        """All pieces below ``offset`` are done."""

    def seal(self, backup_id: str) -> int:
        """Make all durable; the file's bytes."""
        sync(self._fd)
        return self._size

    def complete(self) -> None:
        """It is complete by its name alone."""

    def spoil(self) -> None:
        """It is incomplete by its name alone."""


class RawDevice:
    """A block device, open as ``fd``, of ``size`` bytes or more; what is beyond is left alone.

    Its first unit is zeroed at once and written last of all, so that nothing takes it for a disk before it is one. All
    that is not written reads as zeroes afterwards. OSError."""

    def __init__(self, fd: int, size: int) -> None:
        self._fd = fd
        self._size = size
        self._head_size = min(UNIT, size)
        self._head = bytes(self._head_size)
        self._lock = threading.Lock()
        self._gaps: list[tuple[int, int]] = []  # guarded by _lock: not to be written, not yet zeroed
        self._next = self._head_size  # guarded by _lock: all below is in a piece, or was in a gap
        self.spoil()

    def begin(self, piece: Piece) -> None:
        """A piece will come; what is between it and the one before it is to be zeroed. In order of offset."""
        with self._lock:
            self._add_gap(piece.offset)
            self._next = max(self._next, piece.offset + piece.length)

    def write(self, piece: Piece, view: memoryview, zeroes: bytes) -> None:
        """Store a piece. Thread-safe."""
        self._zero_gaps()
        offset = piece.offset
        if offset == 0:
            self._head = bytes(view[: self._head_size])
            offset, view, zeroes = UNIT, view[UNIT:], zeroes[1:]
        for start, run in data_runs(view, zeroes):
            write_all(self._fd, run, offset + start)
        for start, run in data_runs(view, zeroes.translate(FLIP)):
            zero_range(self._fd, offset + start, len(run))

    def write_zeroes(self, piece: Piece) -> None:
        """Make a piece read as zeroes. Thread-safe."""
        self._zero_gaps()
        start, end = max(piece.offset, self._head_size), piece.offset + piece.length
        if piece.offset == 0:
            self._head = bytes(self._head_size)
        if start < end:
            zero_range(self._fd, start, end - start)

    def settle(self, offset: int) -> None:
        """All pieces below ``offset`` are done."""

    def seal(self, backup_id: str) -> int:
        """Zero what is left and make all but the first unit durable; the disk's bytes."""
        with self._lock:
            self._add_gap(self._size)
        self._zero_gaps()
        sync(self._fd)
        return self._size

    def complete(self) -> None:
        """Write the first unit, durably."""
        write_all(self._fd, memoryview(self._head), 0)
        sync(self._fd)

    def spoil(self) -> None:
        """Zero the first unit, durably."""
        write_all(self._fd, memoryview(bytes(self._head_size)), 0)
        sync(self._fd)

    def _add_gap(self, end: int) -> None:
        if end > self._next:
            self._gaps.append((self._next, end - self._next))
            self._next = end

    def _zero_gaps(self) -> None:
        """Zero the gaps known so far, each by one thread; one that fails is tried again with the next piece."""
        while True:
            with self._lock:
                if not self._gaps:
                    return
                gap = self._gaps.pop()
            try:
                zero_range(self._fd, *gap)
            except BaseException:
                with self._lock:
                    self._gaps.append(gap)
                raise


FLIP = bytes([1, 0]) + bytes(254)
