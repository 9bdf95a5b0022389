"""Which spans of a snapshot a job copies, in order of offset."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from cbwcore.backup.options import UNIT
from cbwcore.bitmaps import DirtyBitmap
from cbwcore.snapshot import Snapshot

__all__ = ["Plan", "Span", "plan_all", "plan_dirty"]


class Span(NamedTuple):
    """A range of whole units, but for the disk's end; ``zero``: it is known to read as zeroes. Bytes."""

    offset: int
    length: int
    zero: bool


class Plan:
    """The spans, one at a time. An error of `next` leaves the plan as it was: the next call tries again."""

    def __init__(self, make: Callable[[int], Iterator[Span]], total: int) -> None:
        self.total = total  # bytes of all spans
        self._make = make  # the spans from an offset on
        self._spans = make(0)
        self._position = 0

    def next(self) -> Span | None:
        """The next span, None after the last. Raises as `Snapshot.block_status`. Not from two threads at once."""
        try:
            span = next(self._spans, None)
        except BaseException:
            self._spans = self._make(self._position)  # a generator that raised is at its end
            raise
        if span is not None:
            self._position = span.offset + span.length
        return span


def plan_all(snapshot: Snapshot, chunk: int) -> Plan:
    """All of the snapshot: data in spans of at most ``chunk`` bytes, and what is between them."""
    return Plan(lambda start: spans_of(snapshot, start, snapshot.size, chunk), snapshot.size)


def plan_dirty(snapshot: Snapshot, bitmap: DirtyBitmap, chunk: int) -> Plan:
    """What ``bitmap``, which does not change any more, has; rounded outward to whole units."""

    def make(start: int) -> Iterator[Span]:
        for first, end in dirty_units(bitmap, start):
            yield from spans_of(snapshot, first, end, chunk)

    return Plan(make, sum(end - first for first, end in dirty_units(bitmap, 0)))


def dirty_units(bitmap: DirtyBitmap, start: int) -> Iterator[tuple[int, int]]:
    """(first, end) in bytes of the ranges of units that have a dirty byte, from ``start``, a unit's, on; none touch."""
    held: tuple[int, int] | None = None
    for offset, length in bitmap.ranges(start):
        first = max(offset - offset % UNIT, start)
        end = min(round_up(offset + length), bitmap.size)
        if held is not None and first <= held[1]:
            held = (held[0], max(end, held[1]))
            continue
        if held is not None:
            yield held
        held = (first, end)
    if held is not None:
        yield held


def spans_of(snapshot: Snapshot, start: int, end: int, chunk: int) -> Iterator[Span]:
    """The range [start, end), of whole units, completely: data cut at multiples of ``chunk``, and zeroes between
    them."""
    for extent in snapshot.block_status(start, end - start):
        if extent.zero:
            continue
        first = max(start, extent.offset - extent.offset % UNIT)
        stop = min(end, round_up(extent.offset + extent.length))
        if first > start:
            yield Span(start, first - start, True)
        while first < stop:
            cut = min(stop, first - first % chunk + chunk)
            yield Span(first, cut - first, False)
            first = cut
        start = max(start, stop)
    if start < end:
        yield Span(start, end - start, True)


def round_up(offset: int) -> int:
    """To whole units."""
    return -(-offset // UNIT) * UNIT
