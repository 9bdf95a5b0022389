"""Reading raw images: files, by their holes, and block devices."""

from __future__ import annotations

import errno
import os
import stat

import numpy as np

from cbwcore.images.digest import UNIT
from cbwcore.images.fileio import named, read_all
from cbwcore.images.kinds import ABSENT, DATA, WINDOW, Kinds

__all__ = ["RawReader"]


class RawReader:
    """The first ``size`` bytes of a file or block device, open as ``fd`` (which stays the caller's). OSError."""

    def __init__(self, fd: int, path: str, size: int) -> None:
        self.path = path
        self.size = size
        self._fd = fd
        self._has_holes = stat.S_ISREG(os.fstat(fd).st_mode)

    def windows(self) -> list[int]:
        """The windows in which anything is stored, in order."""
        if not self._has_holes:
            return list(range(-(-self.size // WINDOW)))
        found, position = [], 0
        with named(self.path):
            while (position := self._seek(position, os.SEEK_DATA)) < self.size:
                found.append(position // WINDOW)
                position = (found[-1] + 1) * WINDOW
        return found

    def kinds(self, window: int) -> Kinds:
        """Data, wherever the file system does not know a hole; absent, which here means zeroes, elsewhere."""
        start = window * WINDOW
        end = min(start + WINDOW, self.size)
        count = -(-(end - start) // UNIT)
        if not self._has_holes:
            return np.full(count, DATA, np.uint8)
        found: Kinds = np.full(count, ABSENT, np.uint8)
        position = start
        with named(self.path):
            while position < end:
                position = self._seek(position, os.SEEK_DATA)
                if position >= end:
                    break
                hole = min(self._seek(position, os.SEEK_HOLE), end)
                found[(position - start) // UNIT : -(-(hole - start) // UNIT)] = DATA
                position = max(hole, position + 1)  # whatever a file system says, this ends
        return found

    def read_into(self, view: memoryview, offset: int) -> None:
        """Read bytes."""
        with named(self.path):
            read_all(self._fd, view, offset)

    def _seek(self, position: int, whence: int) -> int:
        try:
            return os.lseek(self._fd, position, whence)
        except OSError as e:
            if e.errno == errno.ENXIO:  # nothing but a hole, or the end
                return self.size
            raise
