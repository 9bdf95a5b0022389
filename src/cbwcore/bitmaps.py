"""Dirty bitmaps in memory: which parts of a disk its guest has written.

Names follow QEMU's block-dirty-bitmap commands.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import bitarray as _bitarray
import numpy as np
from numpy.typing import NDArray

from cbwcore._cbwcore import BitmapCore
from cbwcore.errors import ConfigError
from cbwcore.options import check_name

if TYPE_CHECKING:
    from cbwcore.disk import Disk
    from cbwcore.freeze import Freeze

__all__ = ["Bitmaps", "DirtyBitmap"]

MIN_GRANULARITY = 512
MAX_GRANULARITY = 1 << 31


def check_granularity(value: int) -> int:
    """The shift of a granularity in bytes."""
    if not isinstance(value, int) or not MIN_GRANULARITY <= value <= MAX_GRANULARITY or value & (value - 1):
        raise ConfigError(f"granularity {value} is no power of two from {MIN_GRANULARITY} to {MAX_GRANULARITY}")
    return value.bit_length() - 1


class DirtyBitmap(BitmapCore):
    """One bit for every ``granularity`` bytes of ``size`` bytes.

    Made by ``disk.bitmaps.add()`` it records the disk's guest writes while enabled: a bit is set before the write is
    submitted. Made by itself it is a plain set of ranges. The buffer protocol shows its bytes read-only and without a
    copy, bit i at byte i // 8, lowest bit first; bits past the last are 0.
    """

    def __new__(cls, size: int, granularity: int = 65536, *, name: str = "") -> DirtyBitmap:  # noqa: D102
        return super().__new__(cls, size, check_granularity(granularity))

    def __init__(self, size: int, granularity: int = 65536, *, name: str = "") -> None:
        self.name = name
        self._disk: Disk | None = None
        self._freeze: Freeze | None = None  # the job that has it
        # The id of the backup since which it has recorded without a gap; None: of none that is known.
        self.since: str | None = None

    def __repr__(self) -> str:
        state = "frozen" if self.frozen else "recording" if self.enabled else "disabled"
        return (
            f"<DirtyBitmap {self.name!r} {self.count()} of {self.size} bytes, granularity {self.granularity}, {state}>"
        )

    @property
    def frozen(self) -> bool:
        """Whether a job has it: it stays as it was at T0, and a successor records (QEMU's "frozen")."""
        return self._freeze is not None

    def enable(self) -> None:
        """Record guest writes: all that complete after this returns (QMP block-dirty-bitmap-enable). Needs a disk."""
        with self._changing() as disk:
            if disk is None:
                raise ConfigError(f"bitmap {self.name!r} belongs to no disk; use disk.bitmaps.add()")
            disk._check_open()
            self._record(disk)

    def disable(self) -> None:
        """Stop recording (QMP block-dirty-bitmap-disable). No incremental backup can rely on it any more."""
        with self._changing():
            self._record(None)
            self.since = None

    def clear(self) -> None:
        """Make all clean, at a moment when no guest write is in flight (QMP block-dirty-bitmap-clear).

        No incremental backup can rely on it any more."""
        with self._changing():
            self._reset()
            self.since = None

    @contextlib.contextmanager
    def _changing(self) -> Iterator[Disk | None]:
        """As `_owner`; ConfigError while a job has it."""
        with self._owner() as disk:
            self._check_idle()
            yield disk

    def _check_idle(self) -> None:
        if self.frozen:
            raise ConfigError(f"bitmap {self.name!r} is in use by a job")

    @contextlib.contextmanager
    def _owner(self) -> Iterator[Disk | None]:
        """The disk that has this bitmap, or None; it does not change meanwhile."""
        disk = self._disk
        if disk is not None:
            disk._check_forked()
        with disk._admin if disk is not None else contextlib.nullcontext():
            yield self._disk

    def merge(self, *others: DirtyBitmap) -> None:
        """Add what others have (QMP block-dirty-bitmap-merge); a bit rounds outward to this granularity."""
        for other in others:
            if not isinstance(other, DirtyBitmap):
                raise ConfigError(f"a DirtyBitmap merges DirtyBitmaps, not {type(other).__name__}")
            if other.size != self.size:
                raise ConfigError(f"bitmap {other.name!r} is of {other.size} bytes, not {self.size}")
        with self._changing():
            for other in others:
                self._merge(other)

    def set_range(self, offset: int, length: int) -> None:
        """Mark a range (bytes), rounded outward."""
        self._check(offset, length)
        self._check_idle()
        if length:
            self._put(offset // self.granularity, (offset + length - 1) // self.granularity + 1, True)

    def is_dirty(self, offset: int) -> bool:
        """Whether the byte at ``offset`` lies in a marked range."""
        self._check(offset, 1)
        bit = offset // self.granularity
        return bool(self._next(bit, True) == bit)

    def count(self) -> int:
        """Marked bytes, in whole granules but for a short last one."""
        bits: int = self._count()
        tail = self.size % self.granularity
        if tail and self.is_dirty(self.size - 1):
            return (bits - 1) * self.granularity + tail
        return bits * self.granularity

    def run_at(self, offset: int, end: int) -> tuple[bool, int]:
        """Whether ``offset`` is marked, and where that ends, at most at ``end``; all in bytes."""
        self._check(offset, 1)
        dirty, stop = self._run_at(offset // self.granularity)
        return dirty, min(stop * self.granularity, end)

    def ranges(self, offset: int = 0) -> Iterator[tuple[int, int]]:
        """The marked ranges from ``offset`` on, as (offset, length) in bytes, lazily; at memory speed between them."""
        self._check(offset, 0)
        return self._ranges(offset) if offset < self.size else iter(())

    def _ranges(self, offset: int) -> Iterator[tuple[int, int]]:
        run, size, granularity = self._run, self.size, self.granularity
        first, end = run(offset // granularity)
        while first < end:
            start = max(first * granularity, offset)
            yield start, min(end * granularity, size) - start
            first, end = run(end)

    def numpy(self) -> NDArray[np.uint8]:
        """The map's bytes as a read-only array that shares its memory (``np.unpackbits(a, bitorder="little")``)."""
        return np.frombuffer(memoryview(self), dtype=np.uint8)

    def bitarray(self) -> _bitarray.bitarray:
        """The map as a read-only little-endian bitarray that shares its memory; whole bytes, so up to 7 bits longer."""
        return _bitarray.bitarray(buffer=self, endian="little")

    def _check(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise ConfigError(f"offset {offset} length {length} is outside the bitmap's {self.size} bytes")


class Bitmaps(Mapping[str, DirtyBitmap]):
    """A disk's bitmaps by name."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._by_name: dict[str, DirtyBitmap] = {}

    def __getitem__(self, name: str) -> DirtyBitmap:
        return self._by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._by_name))

    def __len__(self) -> int:
        return len(self._by_name)

    def add(self, name: str, *, granularity: int = 65536, enabled: bool = True) -> DirtyBitmap:
        """Make a bitmap (QMP block-dirty-bitmap-add).

        ConfigError for a name in use, or a granularity that is no power of two from 512 to 2**31 bytes."""
        self._disk._check_open()
        with self._disk._admin:
            self._disk._check_open()
            if check_name(name) in self._by_name:
                raise ConfigError(f"disk {self._disk.path} has a bitmap {name!r} already")
            bitmap = DirtyBitmap(self._disk.size, granularity, name=name)
            bitmap._disk = self._disk
            if enabled:
                bitmap.enable()
            self._by_name[name] = bitmap
            return bitmap

    def remove(self, name: str) -> None:
        """Stop and forget a bitmap (QMP block-dirty-bitmap-remove). KeyError where there is none of that name."""
        self._disk._check_forked()
        with self._disk._admin:
            bitmap = self._by_name[name]
            bitmap.disable()  # ConfigError while a job has it
            bitmap._disk = None
            del self._by_name[name]


def as_scope(bitmap: object, size: int, cluster_size: int) -> DirtyBitmap:
    """A snapshot's scope from a DirtyBitmap of the same size, or from a bitarray or NumPy bool array with one bit per
    cluster. ConfigError."""
    if isinstance(bitmap, DirtyBitmap):
        if bitmap.size != size:
            raise ConfigError(f"scope bitmap {bitmap.name!r} is of {bitmap.size} bytes, the disk of {size}")
        return bitmap
    if isinstance(bitmap, _bitarray.bitarray):
        bits = np.frombuffer(bitmap.unpack(), dtype=np.bool_)
    elif isinstance(bitmap, np.ndarray) and bitmap.dtype == np.bool_ and bitmap.ndim == 1:
        bits = bitmap
    else:
        raise ConfigError(
            f"a scope is a DirtyBitmap, a bitarray or a 1-D NumPy bool array, not {type(bitmap).__name__}"
        )
    clusters = -(-size // cluster_size)
    if len(bits) != clusters:
        raise ConfigError(f"the scope has {len(bits)} bits, the disk {clusters} clusters of {cluster_size} bytes")
    scope = DirtyBitmap(size, cluster_size)
    edges = np.flatnonzero(np.diff(np.concatenate(([False], bits, [False]))))
    for first, end in edges.reshape(-1, 2).tolist():
        scope._put(first, end, True)
    return scope
