"""Dirty bitmaps: which parts of a disk its guest has written. In memory, or in a file where they outlive the process.

Names follow QEMU's block-dirty-bitmap commands.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import bitarray as _bitarray
import numpy as np
from numpy.typing import NDArray

from cbwcore._cbwcore import BitmapCore
from cbwcore.errors import ConfigError, StateError

if TYPE_CHECKING:
    from cbwcore.disk import Disk
    from cbwcore.freeze import Freeze

__all__ = ["DirtyBitmap"]

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

    ``inconsistent``: why what it has recorded is not all that was written, or None. Then it can only be removed, and
    whoever asks for its bits gets StateError (the buffer protocol: BufferError).
    """

    def __new__(cls, size: int, granularity: int = 65536, *, name: str = "") -> DirtyBitmap:  # noqa: D102
        return super().__new__(cls, size, check_granularity(granularity))

    def __init__(self, size: int, granularity: int = 65536, *, name: str = "") -> None:
        self.name = name
        self._disk: Disk | None = None
        self._freeze: Freeze | None = None  # the job that has it
        self._since: str | None = None
        self._persistent = False

    def __repr__(self) -> str:
        state = "frozen" if self.frozen else "recording" if self.enabled else "disabled"
        if self.inconsistent is not None:
            return f"<DirtyBitmap {self.name!r} of {self.size} bytes, inconsistent>"
        return (
            f"<DirtyBitmap {self.name!r} {self.count()} of {self.size} bytes, granularity {self.granularity}, {state}>"
        )

    @property
    def frozen(self) -> bool:
        """Whether a job has it: it stays as it was at T0, and a successor records (QEMU's "frozen")."""
        return self._freeze is not None

    @property
    def persistent(self) -> bool:
        """Whether it outlives the process, in the disk's bitmap file."""
        return self._persistent

    @property
    def since(self) -> str | None:
        """The id of the backup since whose T0 it has recorded without a gap; None: of none that is known."""
        return self._since

    @since.setter
    def since(self, value: str | None) -> None:
        with self._owner():
            self._check_usable()
            self._save(since=value)
            self._since = value

    def enable(self) -> None:
        """Record guest writes: all that complete after this returns (QMP block-dirty-bitmap-enable). Needs a disk.

        Of a persistent bitmap also in the processes that open the disk later."""
        with self._changing() as disk:
            if disk is None:
                raise ConfigError(f"bitmap {self.name!r} belongs to no disk; use disk.bitmaps.add()")
            disk._check_open()
            before = self.enabled
            self._record(disk)
            try:
                self._save(enabled=True)
            except BaseException:
                if not before:
                    self._record(None)
                raise

    def disable(self) -> None:
        """Stop recording (QMP block-dirty-bitmap-disable). No incremental backup can rely on it any more."""
        with self._changing():
            # First the file: whoever dies in between has recorded more than it says. The other way round a write that
            # came in between would be missing in a bitmap that is called complete.
            self._save(enabled=False, since=None)
            self._record(None)
            self._since = None

    def clear(self) -> None:
        """Make all clean, at a moment when no guest write is in flight (QMP block-dirty-bitmap-clear).

        No incremental backup can rely on it any more."""
        with self._changing():
            # First the file: whoever dies in the middle of the bits leaves none that anything relies on.
            self._save(since=None)
            self._reset()
            self._since = None

    @contextlib.contextmanager
    def _changing(self) -> Iterator[Disk | None]:
        """As `_owner`; raises as `_check_idle`."""
        with self._owner() as disk:
            self._check_idle()
            yield disk

    def _check_idle(self) -> None:
        """ConfigError while a job has it, or its disk is open read-only; StateError where it is inconsistent;
        ValueError where it is persistent, and its disk closed."""
        if self.frozen:
            raise ConfigError(f"bitmap {self.name!r} is in use by a job")
        self._check_usable()

    def _check_usable(self) -> None:
        self._check_consistent()
        if self._persistent and self._disk is not None:
            self._disk._check_open()
            if self._disk.read_only:
                raise ConfigError(f"bitmap {self.name!r} is in a file, and disk {self._disk.path} is open read-only")

    def _check_consistent(self) -> None:
        if self.inconsistent is not None:
            raise StateError(f"bitmap {self.name!r} is inconsistent, remove it: {self.inconsistent}")

    def _save(self, **fields: Any) -> None:
        """Other fields of its `bitmap_file.Entry`, durable on return; nothing for a bitmap in memory. OSError,
        StateError."""
        if self._persistent and self._disk is not None:
            self._disk.bitmaps._open_store().change(self.name, **fields)

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
            other._check_consistent()
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
        self._check_consistent()
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
        self._check_consistent()
        return np.frombuffer(memoryview(self), dtype=np.uint8)

    def bitarray(self) -> _bitarray.bitarray:
        """The map as a read-only little-endian bitarray that shares its memory; whole bytes, so up to 7 bits longer."""
        self._check_consistent()
        return _bitarray.bitarray(buffer=self, endian="little")

    def _check(self, offset: int, length: int) -> None:
        self._check_consistent()
        if offset < 0 or length < 0 or offset + length > self.size:
            raise ConfigError(f"offset {offset} length {length} is outside the bitmap's {self.size} bytes")


def as_scope(bitmap: object, size: int, cluster_size: int) -> DirtyBitmap:
    """A snapshot's scope from a DirtyBitmap of the same size, or from a bitarray or NumPy bool array with one bit per
    cluster. ConfigError."""
    if isinstance(bitmap, DirtyBitmap):
        if bitmap.size != size:
            raise ConfigError(f"scope bitmap {bitmap.name!r} is of {bitmap.size} bytes, the disk of {size}")
        bitmap._check_consistent()
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
