"""What an image stores of each cluster of the disk, by windows of the disk."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from cbwcore.images.digest import UNIT

__all__ = ["ABSENT", "DATA", "PIECE", "WINDOW", "ZERO", "ImageReader", "Kinds", "Run", "runs"]

ABSENT, DATA, ZERO = 0, 1, 2  # of a cluster: the parent has it; bytes are stored; it is stored as zeroes
WINDOW = 512 << 20  # bytes of the disk that are looked at together
PIECE = 1 << 20  # bytes that are read and worked on at once
Kinds = NDArray[np.uint8]


class ImageReader(Protocol):
    """An image that is read. Thread-safe."""

    path: str
    size: int

    def windows(self) -> list[int]:
        """The windows in which anything is stored, in order."""

    def kinds(self, window: int) -> Kinds:
        """The kind of each cluster of 64 KiB of a window."""

    def read_into(self, view: memoryview, offset: int) -> None:
        """Read clusters that are all data."""


class Run(NamedTuple):
    """A range of the disk, in bytes, whose clusters have one value."""

    offset: int
    length: int
    value: int


def runs(values: NDArray[Any], start: int, size: int) -> Iterator[Run]:
    """The runs of equal ``values``, one for each cluster from ``start`` on, of a disk of ``size`` bytes."""
    edges = [0, *(np.flatnonzero(values[1:] != values[:-1]) + 1).tolist(), len(values)]
    for first, end in itertools.pairwise(edges):
        if first < end:
            offset = start + first * UNIT
            yield Run(offset, min(start + end * UNIT, size) - offset, int(values[first]))
