"""Extents: what block status tells."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from operator import index
from typing import TYPE_CHECKING, NamedTuple

from cbwcore.errors import ConfigError

if TYPE_CHECKING:
    from cbwcore.bitmaps import DirtyBitmap

__all__ = ["Extent"]


class Extent(NamedTuple):
    """A range of one status; offsets and lengths in bytes.

    ``data``: something is stored. ``zero``: it reads as zeroes. ``dirty``: set in the bitmap that was asked about, None
    if none was. ``access``: it can be read at all (a snapshot's clusters outside its scope, or discarded, cannot).
    """

    offset: int
    length: int
    data: bool
    zero: bool
    dirty: bool | None = None
    access: bool = True


def check_range(offset: int, length: int | None, size: int) -> int:
    """The end of a range inside ``size`` bytes; ConfigError."""
    offset, length = index(offset), None if length is None else index(length)
    if offset < 0 or offset > size:
        raise ConfigError(f"offset {offset} is outside 0..{size}")
    if length is None:
        return size
    if length < 0 or length > size - offset:
        raise ConfigError(f"offset {offset} length {length} reaches past the end, {size} bytes")
    return offset + length


def check_bitmap(bitmap: DirtyBitmap | None, size: int) -> None:
    """Refuse to split the extents of ``size`` bytes by a bitmap of another size."""
    if bitmap is not None and bitmap.size != size:
        raise ConfigError(f"bitmap {bitmap.name!r} is of {bitmap.size} bytes, not {size}")


def walk(
    extent_at: Callable[[int, int], Extent], offset: int, end: int, bitmap: DirtyBitmap | None
) -> Iterator[Extent]:
    """The extents of [offset, end), lazily, neighbours of one status joined and split by ``bitmap``."""
    held: Extent | None = None
    while offset < end:
        extent = extent_at(offset, end)
        if bitmap is not None:
            dirty, stop = bitmap.run_at(offset, offset + extent.length)
            extent = extent._replace(length=stop - offset, dirty=dirty)
        offset += extent.length
        if held is not None and held[2:] == extent[2:]:
            held = held._replace(length=held.length + extent.length)
            continue
        if held is not None:
            yield held
        held = extent
    if held is not None:
        yield held
